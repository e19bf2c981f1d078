package hostdir

import (
	"bytes"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// These system calls take a flag, slow: the call may wait for more than a local disk. Then the
// scheduler must know of it, or goroutines behind the waiting thread do not run. Telling it is
// expensive, mostly because its monitor then looks after the thread, so calls that are not slow do
// not. A signal can interrupt a slow call, which is then made again.

// The files in a host's directory, as system calls want their names.
var (
	tlsSocket      = []byte("tls-socket\x00")
	sendProxyV2    = []byte("send-proxy-v2\x00")
	sendProxyV1    = []byte("send-proxy-v1\x00")
	logConnections = []byte("log-connections\x00")
	dot            = []byte(".\x00")
	empty          = []byte("\x00")
	tooLong        = append(bytes.Repeat([]byte{'x'}, nameMax+1), 0)

	tlsSocketAddr = struct {
		family uint16
		path   [len("tls-socket\x00")]byte
	}{unix.AF_UNIX, [len("tls-socket\x00")]byte(tlsSocket)}
)

// here is AT_FDCWD: the working directory in place of a descriptor.
const here = ^uintptr(-unix.AT_FDCWD - 1)

// What package unix does not have yet.
const (
	resolveCached = 0x20 // RESOLVE_CACHED of openat2(2)
	soPassRights  = 83   // SO_PASSRIGHTS of unix(7)
)

// Ways to open a directory, or any entry.
var (
	// An entry of the hosts directory, no symlink and no mount.
	ownDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_XDEV,
	}
	// The same, if the kernel has it in its cache.
	ownCached = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: resolveCached | unix.RESOLVE_NO_XDEV,
	}
	// An entry of any kind, or that there is none, if the kernel has it in its cache.
	cachedEntry = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: resolveCached,
	}
	// What a symlink or a mount leads to, if the kernel has it in its cache.
	cachedDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached,
	}
	// The same, if it is on the mount that the path begins on.
	nearDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached | unix.RESOLVE_NO_XDEV,
	}
)

// openat opens a directory, or an entry of one, as a place only (O_PATH). It is always slow.
func openat(dir uintptr, path *byte, flags uintptr) (uintptr, unix.Errno) {
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT, dir, uintptr(unsafe.Pointer(path)), unix.O_PATH|unix.O_CLOEXEC|flags, 0, 0, 0)
		if errno != unix.EINTR {
			return fd, errno
		}
	}
}

func openat2(dir uintptr, path *byte, how *unix.OpenHow, slow bool) (uintptr, unix.Errno) {
	if !slow {
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

// stat tells about something in a directory, or about the directory itself if name is empty. It
// follows no symlink and does not ask a network server again (AT_STATX_DONT_SYNC), but finding the
// name may wait.
func stat(dir uintptr, name []byte, slow bool) (st unix.Statx_t, errno unix.Errno) {
	const flags = unix.AT_EMPTY_PATH | unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	const mask = unix.STATX_TYPE | unix.STATX_UID | unix.STATX_INO | unix.STATX_CTIME
	if !slow {
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

// readlink is the cheapest way to ask whether a name exists without following a symlink: for what
// is not a symlink the error is EINVAL.
func readlink(dir uintptr, name, link []byte, slow bool) (int, unix.Errno) {
	if !slow {
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

func fchdir(fd uintptr, slow bool) unix.Errno {
	if !slow {
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

// connectSocket connects a socket, which is non-blocking, to the tls-socket in the working
// directory.
func connectSocket(s uintptr, slow bool) unix.Errno {
	if !slow {
		_, _, errno := syscall.RawSyscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&tlsSocketAddr)), unsafe.Sizeof(tlsSocketAddr))
		return errno
	}
	for {
		_, _, errno := syscall.Syscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&tlsSocketAddr)), unsafe.Sizeof(tlsSocketAddr))
		if errno != unix.EINTR {
			return errno
		}
	}
}

func closeRaw(fd uintptr) { syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }
