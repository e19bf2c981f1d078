package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// forbidUnshare has the system refuse this process unshare(2), as container engines do by default.
func forbidUnshare() {
	// In struct seccomp_data the number of the call comes first, and the architecture does not matter here.
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_UNSHARE},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil {
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
		if errno != 0 {
			err = errno
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "no filter of system calls:", err)
		os.Exit(3)
	}
}

// Goal: where unshare(2) is forbidden that is said once, and hosts whose names are too long are told of.
func TestUnshareForbidden(t *testing.T) {
	t.Parallel()
	hosts := directory(t)
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	long := strings.Repeat("a", 200)
	good(t)(filepath.Join(hosts, entryOf(long)))
	cmd := users()[0].command(self(t), hosts, "one.example", long)
	cmd.Env = append(cmd.Env, "SNIPROXY_CHECK_NO_UNSHARE=1")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	want := "one.example: ok\n" + long + ": the path of tls-socket is too long for a socket address, use hashed names: it has 211 bytes, and 107 is the most\n"
	if hostdir.Hashed {
		want = "one.example: ok\n" + long + ": ok\n"
	}
	if stdout.String() != want || strings.Count(stderr.String(), "\n") != 1 || (err == nil) != hostdir.Hashed ||
		!strings.HasPrefix(stderr.String(), "sniproxy-check: the system forbids unshare(2) (operation not permitted), as container engines do: ") {
		t.Errorf("%v, stdout %q, stderr %q", err, stdout.String(), stderr.String())
	}
}

// Goal: in a user namespace that does not know the owner of the hosts directory that is said, and so is it of entries.
func TestUserNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for the owners")
	}
	t.Parallel()
	hosts := directory(t)
	for _, name := range []string{"one.example", "*.theirs.example"} {
		theirs(t, good(t))(filepath.Join(hosts, entryOf(name)))
	}
	good(t)(filepath.Join(hosts, entryOf("*.ours.example")))
	must(t, os.Chown(hosts, 1000, 1000))
	mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd := users()[0].command(self(t), hosts, "one.example", "a.theirs.example", "a.ours.example")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespace: %v", err)
	}
	cmd.Wait()
	const want = "one.example: ok; it cannot be told whose it is (uid 65534), and it shares its limits with all such entries\n" +
		"a.theirs.example: no directory, and the wildcard for it belongs neither to root nor to the owner of the hosts directory: " +
		"it is that of uid 65534, chown -h it to root\n" +
		"a.ours.example: ok, served by *.ours.example\n"
	if stdout.String() != want || strings.Count(stderr.String(), "\n") != 1 ||
		!strings.HasPrefix(stderr.String(), "sniproxy-check: the hosts directory belongs to uid 65534, which in a user namespace stands for all users unknown to it: ") {
		t.Errorf("stdout %q, stderr %q", stdout.String(), stderr.String())
	}
}

// ownMounts gives the thread of the test mounts that nobody else sees, but for the programs that it starts.
func ownMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // for good, so that the thread ends with the test
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Skipf("no mount namespace: %v", err)
	}
}

// mountUserFS mounts a file system in user space. Nobody answers what is asked until somebody reads it.
func mountUserFS(t *testing.T, dir string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("/dev/fuse: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("hostile", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		t.Skipf("mount of a file system in user space: %v", err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	t.Cleanup(func() {
		dev.Close()
		unix.Unmount(dir, unix.MNT_DETACH|unix.MNT_FORCE)
	})
	return dev
}

// Goal: however many hosts lead to a file system that does not answer, not each is waited for ten seconds, and most are not
// waited for at all. All is over at once then.
func TestManyStuck(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	dir := directory(t)
	hosts, stuck := filepath.Join(dir, "hosts"), filepath.Join(dir, "stuck")
	must(t, os.Mkdir(hosts, 0o755))
	must(t, os.Mkdir(stuck, 0o755))
	mountUserFS(t, stuck)
	const many = 1000
	for i := range many {
		symlink(t, "../stuck/x")(filepath.Join(hosts, entryOf(fmt.Sprintf("host-%d", i))))
	}
	good(t)(filepath.Join(hosts, lastEntry))
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if status != 1 || stderr != "" {
		t.Errorf("exit status %d, stderr %q", status, stderr)
	}
	stdout, ok := strings.CutSuffix(stdout, lastEntry+": ok\n")
	if !ok {
		t.Error("the host that does not lead there has no such line")
	}
	expectShortened(t, stdout, many, "does not answer")
}

// Goal: an endless hosts directory is not read to its end, which is said.
func TestEndless(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	hosts := directory(t)
	dev := mountUserFS(t, hosts)
	go serveEndless(dev)
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if n := strings.Count(stdout, "\n"); n > strangersMost || status != 1 || !strings.Contains(stderr, "sniproxy-check: the hosts directory ") ||
		!strings.Contains(stderr, " more entries are no hosts, and have no line\n") {
		t.Errorf("%d lines, exit status %d, stderr %q", n, status, stderr)
	}
}

// serveEndless answers as a file system whose only directory has no end.
func serveEndless(dev *os.File) {
	// See linux/fuse.h: what is asked begins with length, number of the operation, and number of the request; the
	// answer with length, error and that number.
	request := make([]byte, 128<<10)
	for entries := uint64(0); ; {
		n, err := dev.Read(request)
		if err != nil {
			return
		}
		if n < 40 {
			continue
		}
		var body []byte
		errno := unix.Errno(0)
		switch operation := binary.NativeEndian.Uint32(request[4:]); operation {
		case 3: // FUSE_GETATTR: the mode of a directory, and zeros
			body = make([]byte, 104)
			binary.NativeEndian.PutUint64(body[16:], 1)
			binary.NativeEndian.PutUint32(body[16+60:], unix.S_IFDIR|0o755)
			binary.NativeEndian.PutUint32(body[16+64:], 1)
		case 26: // FUSE_INIT: the version, and zeros
			body = make([]byte, 64)
			binary.NativeEndian.PutUint32(body, 7)
			binary.NativeEndian.PutUint32(body[4:], 31)
			binary.NativeEndian.PutUint32(body[20:], 4096)
		case 27: // FUSE_OPENDIR
			body = make([]byte, 16)
		case 28: // FUSE_READDIR: files, as many as fit
			for size := int(binary.NativeEndian.Uint32(request[40+16:])); len(body)+40 <= size; {
				entries++
				entry := make([]byte, 40)
				binary.NativeEndian.PutUint64(entry, entries+1)
				binary.NativeEndian.PutUint64(entry[8:], entries)
				copy(entry[24:], fmt.Sprintf("file-%011d", entries))
				binary.NativeEndian.PutUint32(entry[16:], 16)
				binary.NativeEndian.PutUint32(entry[20:], unix.DT_REG)
				body = append(body, entry...)
			}
		case 29, 34: // FUSE_RELEASEDIR, FUSE_ACCESS
		case 2, 36, 42: // FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET want no answer
			continue
		case 1: // FUSE_LOOKUP
			errno = unix.ENOENT
		default:
			errno = unix.ENOSYS
		}
		var answer bytes.Buffer
		binary.Write(&answer, binary.NativeEndian, uint32(16+len(body)))
		binary.Write(&answer, binary.NativeEndian, -int32(errno))
		answer.Write(request[8:16])
		answer.Write(body)
		dev.Write(answer.Bytes())
	}
}
