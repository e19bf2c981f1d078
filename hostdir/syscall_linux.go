package hostdir

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The scheduler is told of system calls that may wait for a file system: a thread that waits without
// its knowledge keeps others from running. That is dear, most of all because its monitor then looks
// after the thread, so it is not told of those that wait for a local disk at most. A call that waits
// can be interrupted, by a signal of the scheduler's, and is made again.

// What there is in a host's directory, as system calls want it.
var (
	tlsSocket      = []byte("tls-socket\x00")
	sendProxyV2    = []byte("send-proxy-v2\x00")
	sendProxyV1    = []byte("send-proxy-v1\x00")
	logConnections = []byte("log-connections\x00")
	dot            = []byte(".\x00")
	empty          = []byte("\x00")

	tlsSocketAddr = struct {
		family uint16
		path   [len("tls-socket\x00")]byte
	}{unix.AF_UNIX, [len("tls-socket\x00")]byte(tlsSocket)}
)

// here is AT_FDCWD, the working directory, in place of a descriptor.
const here = ^uintptr(-unix.AT_FDCWD - 1)

// What package unix does not have.
const (
	resolveCached = 0x20 // RESOLVE_CACHED of openat2(2)
	soPassRights  = 83   // SO_PASSRIGHTS of unix(7)
)

// Ways to open what is at a path.
var (
	// A directory that is in the hosts directory itself.
	ownDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_XDEV,
	}
	// One that a symlink or a mount leads to, without waiting.
	cachedDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached,
	}
	// One that is on the same mount as what it is in, without waiting.
	nearDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached | unix.RESOLVE_NO_XDEV,
	}
)

// openat opens a directory, as a place to look things up in, or an entry of one.
func openat(dir uintptr, path *byte, flags uintptr) (uintptr, unix.Errno) {
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT, dir, uintptr(unsafe.Pointer(path)), unix.O_PATH|unix.O_CLOEXEC|flags, 0, 0, 0)
		if errno != unix.EINTR {
			return fd, errno
		}
	}
}

func openat2(dir uintptr, path *byte, how *unix.OpenHow, waits bool) (uintptr, unix.Errno) {
	if !waits {
		fd, _, errno := syscall.RawSyscall6(unix.SYS_OPENAT2, dir, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(how)), unsafe.Sizeof(*how), 0, 0)
		return fd, errno
	}
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT2, dir, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(how)), unsafe.Sizeof(*how), 0, 0)
		if errno != unix.EINTR {
			return fd, errno
		}
	}
}

// stat tells about something in a directory, or about that itself if name is empty. It follows no
// symlink, and takes what the system knows already of what is there; but to find it may have to wait.
func stat(dir uintptr, name []byte, waits bool) (st unix.Statx_t, errno unix.Errno) {
	const flags = unix.AT_EMPTY_PATH | unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	const mask = unix.STATX_TYPE | unix.STATX_UID | unix.STATX_INO | unix.STATX_CTIME
	if !waits {
		_, _, errno = syscall.RawSyscall6(unix.SYS_STATX, dir, uintptr(unsafe.Pointer(&name[0])), flags, mask, uintptr(unsafe.Pointer(&st)), 0)
		return st, errno
	}
	for {
		_, _, errno = syscall.Syscall6(unix.SYS_STATX, dir, uintptr(unsafe.Pointer(&name[0])), flags, mask, uintptr(unsafe.Pointer(&st)), 0)
		if errno != unix.EINTR {
			return st, errno
		}
	}
}

// readlink is the shortest way to ask whether there is something in a directory, without
// following a symlink: of what exists and is none, readlink(2) says EINVAL.
func readlink(dir uintptr, name, link []byte, waits bool) (int, unix.Errno) {
	if !waits {
		n, _, errno := syscall.RawSyscall6(unix.SYS_READLINKAT, dir, uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&link[0])), uintptr(len(link)), 0, 0)
		return int(n), errno
	}
	for {
		n, _, errno := syscall.Syscall6(unix.SYS_READLINKAT, dir, uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&link[0])), uintptr(len(link)), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func fchdir(fd uintptr, waits bool) unix.Errno {
	if !waits {
		_, _, errno := syscall.RawSyscall(unix.SYS_FCHDIR, fd, 0, 0)
		return errno
	}
	for {
		_, _, errno := syscall.Syscall(unix.SYS_FCHDIR, fd, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

func socket() (uintptr, unix.Errno) {
	s, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return s, errno
}

// setInt sets an option of a socket, at the level SOL_SOCKET.
func setInt(s, option uintptr, value int32) unix.Errno {
	_, _, errno := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, s, unix.SOL_SOCKET, option, uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	return errno
}

// shutdown shuts a socket down for reading.
func shutdown(s uintptr) unix.Errno {
	_, _, errno := syscall.RawSyscall(unix.SYS_SHUTDOWN, s, unix.SHUT_RD, 0)
	return errno
}

// connectHere connects a socket to the tls-socket in the working directory.
func connectHere(s uintptr) unix.Errno {
	for {
		_, _, errno := syscall.Syscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&tlsSocketAddr)), unsafe.Sizeof(tlsSocketAddr))
		if errno != unix.EINTR {
			return errno
		}
	}
}

func closeRaw(fd uintptr) { syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }
