package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: the same as in TestZoo, for hosts on file systems that do not answer, or that are gone.
func TestZooFileSystems(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t) // the programs that this thread starts see them too
	z := newZoo(t)
	mount := func(name string) *hostdirtest.UserFS {
		dir := filepath.Join(z.others, name)
		must(t, os.Mkdir(dir, 0o755))
		// With default_permissions the kernel first asks for the permissions of the root. If
		// several processes waited for the same file in it instead, only the first could be killed.
		return hostdirtest.MountUserFS(t, dir, unix.S_IFDIR, "default_permissions")
	}
	stuck, broken := mount("stuck"), mount("broken")
	broken.Break(t)
	memory := filepath.Join(z.others, "memory")
	must(t, os.Mkdir(memory, 0o755))
	hostdirtest.Mount(t, "memory", memory, "tmpfs", 0, "mode=755")
	serve(t, memory)
	slow := mount("slow")
	elsewhere := filepath.Join(z.others, "elsewhere")
	serve(t, elsewhere)
	slow.Add(hostdirtest.RootNode, "tls-socket", unix.S_IFLNK|0o777, elsewhere+"/tls-socket")
	slow.Serve(0)
	z.add(
		animal{name: "stuck.example", make: symlink(t, stuck.Dir), says: is(hangs)},
		animal{name: "gone.example", make: symlink(t, broken.Dir), says: is(gone)},
		animal{name: "memory.example", make: symlink(t, memory), says: finding{what: "ok", mentions: []string{"chroot"}, unsaid: "another file system"}},
		animal{name: "slow.example", make: symlink(t, slow.Dir), says: is("ok", "chroot", "another", "system")},
		absent,
	)
	expectReasons(t, visitAll(z), hangs, gone)
}
