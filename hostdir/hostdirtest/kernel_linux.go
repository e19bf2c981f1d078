package hostdirtest

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SOPassRights is SO_PASSRIGHTS, which package unix does not have.
const SOPassRights = 83

// Deny has the kernel refuse this process a system call with an error, as container engines do, and
// kernels that do not have it. Args are those arguments, by their numbers, that the call must have.
// It cannot be undone.
func Deny(call uint32, args map[int]uint32, errno unix.Errno) error {
	// What a filter looks at is struct seccomp_data: the number of the call comes first, the
	// arguments from 16 on, with the lower halves first on the machines that there are. See
	// seccomp(2).
	var filter []unix.SockFilter
	test := func(offset, value uint32) {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value})
	}
	test(0, call)
	for arg, value := range args {
		test(16+8*uint32(arg), value)
	}
	for i := 1; i < len(filter); i += 2 {
		filter[i].Jf = uint8(len(filter) - i) // to the instruction that allows the call
	}
	filter = append(filter,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// OwnMounts gives the thread of the test a mount namespace: the programs that it starts see its
// mounts and nobody else does, and the mounts end with them, whatever happens.
func OwnMounts(t testing.TB) {
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

// Mount mounts something until the end of the test.
func Mount(t testing.TB, source, path, kind string, flags uintptr, options string) {
	t.Helper()
	if err := unix.Mount(source, path, kind, flags, options); err != nil {
		t.Skipf("mount of %s on %s: %v", source, path, err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH|unix.MNT_FORCE) })
}

// LockDirectory has a directory locked, as any user can who may read it and change it: somebody
// reads it into memory that is not there yet, and meanwhile something is to be removed from it.
// Until unlock is called, which also happens at the end of the test, looking for a name that the
// kernel does not know already waits, and nothing interrupts that.
func LockDirectory(t testing.TB, dir string) (unlock func()) {
	t.Helper()
	NeedRoot(t)
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	Must(t, err)
	memory, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	Must(t, err)
	faults, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		t.Skipf("userfaultfd: %v", errno)
	}
	// See ioctl_userfaultfd(2).
	const uffdioAPI, uffdioRegister, registerMissing = 0xc018aa3f, 0xc020aa00, 1
	api := struct{ api, features, ioctls uint64 }{api: 0xaa}
	register := struct{ start, length, mode, ioctls uint64 }{
		start: uint64(uintptr(unsafe.Pointer(&memory[0]))), length: uint64(len(memory)), mode: registerMissing,
	}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, faults, uffdioAPI, uintptr(unsafe.Pointer(&api)))
	if errno == 0 {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, faults, uffdioRegister, uintptr(unsafe.Pointer(&register)))
	}
	if errno != 0 {
		t.Fatalf("userfaultfd: %v", errno)
	}
	var users sync.WaitGroup
	unlock = sync.OnceFunc(func() {
		unix.Close(int(faults)) // then there is memory
		users.Wait()
		unix.Munmap(memory)
		unix.Close(fd)
	})
	t.Cleanup(unlock)
	asleep := func(call int, use func()) {
		id := make(chan int)
		users.Go(func() {
			runtime.LockOSThread()
			id <- unix.Gettid()
			use()
		})
		now := fmt.Sprintf("/proc/self/task/%d/syscall", <-id)
		Await(t, "a thread to wait for "+dir, func() bool {
			text, _ := os.ReadFile(now)
			return bytes.HasPrefix(text, fmt.Append(nil, call, " "))
		})
	}
	asleep(unix.SYS_GETDENTS64, func() { unix.Getdents(fd, memory) })
	asleep(unix.SYS_UNLINKAT, func() { unix.Unlinkat(unix.AT_FDCWD, dir+"/absent", unix.AT_REMOVEDIR) })
	return unlock
}
