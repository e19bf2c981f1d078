package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// addFileSystems adds hosts on file systems that do not answer, or that are gone.
func (z *zoo) addFileSystems() {
	t := z.t
	// The mounts are those of this thread, and of the programs that it starts.
	runtime.LockOSThread() // for good, so that the thread ends with the test
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Logf("no mounts: %v", err)
		return
	}
	for _, c := range []struct {
		name, says string
		gone       bool
	}{
		{name: "stuck.example", says: "the look-up has waited for a file system until the time limit: .*"},
		{name: "gone.example", gone: true, says: "cannot connect to tls-socket: transport endpoint is not connected"},
	} {
		dir := filepath.Join(z.others, c.name)
		must(t, os.Mkdir(dir, 0o755))
		// The kernel has to ask for the permissions of the root, before anything else. Of several processes that look
		// for the same file in it, all but the first could not even be killed.
		fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", fd)
			err = unix.Mount("stuck", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options)
		}
		if err != nil {
			t.Logf("no file system in user space: %v", err)
			return
		}
		closeIt := sync.OnceFunc(func() { unix.Close(fd) })
		t.Cleanup(func() {
			closeIt()
			unix.Unmount(dir, unix.MNT_DETACH|unix.MNT_FORCE)
		})
		if c.gone {
			closeIt()
		}
		z.add(animal{name: c.name, make: symlink(t, dir), says: c.says})
	}
	z.mounts = true
	dir := filepath.Join(z.others, "memory")
	must(t, os.Mkdir(dir, 0o755))
	if err := unix.Mount("memory", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Logf("no tmpfs: %v", err)
		return
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	// The socket cannot be moved there, only bound.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	unix.CloseOnExec(fd)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}))
	must(t, os.Chmod(dir+"/tls-socket", 0o777))
	answer(t, fd, "memory")
	z.add(animal{name: "memory.example", make: symlink(t, dir),
		says: "ok; it leads to another file system, which may keep look-ups waiting"})
}
