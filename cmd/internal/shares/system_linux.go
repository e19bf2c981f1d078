package shares

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// roomForThreads tells whether the system lets this user have threadsRoom threads more. It starts
// as many processes, which count as threads do, and ends them at once. Where it cannot find out, it
// trusts that there is room.
func roomForThreads() bool {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The processes have the signal handlers of this one, and nothing that these need.
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before) != nil {
		return true
	}
	defer unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
	var pids [threadsRoom]int
	var errno syscall.Errno
	n := 0
	for ; n < len(pids); n++ {
		if pids[n], errno = startSleeper(); errno != 0 {
			break
		}
	}
	// Go's runtime may just now want a thread, and tries for a fifth of a second. The scheduler is
	// not told of these calls, so that nothing keeps them until then.
	for _, pid := range pids[:n] {
		syscall.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(unix.SIGKILL), 0)
	}
	for _, pid := range pids[:n] {
		for {
			if _, _, errno := syscall.RawSyscall6(unix.SYS_WAIT4, uintptr(pid), 0, 0, 0, 0, 0); errno != unix.EINTR {
				break
			}
		}
	}
	return errno != unix.EAGAIN && errno != unix.ENOMEM
}

// startSleeper starts a process that is a copy of this one and does nothing but sleep for a second,
// or until the thread ends that started it. It shares the descriptors: a socket that is closed
// meanwhile would otherwise stay open, and in epoll.
//
//go:nosplit
//go:norace
func startSleeper() (pid int, errno syscall.Errno) {
	second := unix.Timespec{Sec: 1}
	// Not clone3(2), which systemd and container engines forbid.
	flags, stack := uintptr(unix.CLONE_FILES)|uintptr(unix.SIGCHLD), uintptr(0)
	if runtime.GOARCH == "s390x" {
		flags, stack = stack, flags
	}
	r, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags, stack, 0, 0, 0, 0)
	if errno != 0 || r != 0 {
		return int(r), errno
	}
	syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&second)), 0, 0)
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// underWay tells whether a datagram that was sent with a socket was not received yet.
func underWay(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	return err == nil && n > 0
}
