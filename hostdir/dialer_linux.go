package hostdir

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Dialer connects to backends, as [Dial] does, from a thread that has a working directory
// of its own. It makes each host's directory the working directory of that thread, so all
// that is looked up is of one directory, whatever takes its place meanwhile, and the path of
// the socket is short: a name of any length fits.
type Dialer struct {
	own   bool // the thread has a working directory of its own
	away  bool // it is that of a host
	hosts int  // the hosts directory
}

// NewDialer returns a Dialer for the calling goroutine, which must be locked to its thread
// for good and be the only one to use it. What it takes to have a working directory for the
// thread, unshare(2) with CLONE_FS, needs no privilege; where it is forbidden all the same,
// the Dialer does what the function [Dial] does.
func NewDialer() *Dialer {
	hosts, err := unix.Open(".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &Dialer{}
	}
	if unix.Unshare(unix.CLONE_FS) != nil {
		unix.Close(hosts)
		return &Dialer{}
	}
	return &Dialer{own: true, hosts: hosts}
}

// The files in a host's directory, as system calls want them.
var (
	tlsSocket = struct {
		family uint16
		path   [len("tls-socket") + 1]byte
	}{unix.AF_UNIX, [...]byte{'t', 'l', 's', '-', 's', 'o', 'c', 'k', 'e', 't', 0}}

	sendProxyV1 = append([]byte("send-proxy-v1"), 0)
)

// Dial is like the function [Dial].
func (d *Dialer) Dial(name []byte) (fd int, proxyV1 bool, err error) {
	if !d.own {
		return Dial(name)
	}
	var buf [MaxName + 1]byte
	dir, errno := d.enter(append(AppendName(buf[:0], name), 0))
	if errno != 0 {
		return -1, false, enterError(errno)
	}
	defer closeRaw(dir)
	s, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1, false, socketError(errno)
	}
	// What has a path in it may wait for a file system, so the scheduler is told of it.
	_, _, errno = syscall.Syscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&tlsSocket)), unsafe.Sizeof(tlsSocket))
	if errno != 0 {
		closeRaw(s)
		return -1, false, connectError(".", errno)
	}
	// The shortest way to ask whether there is something, without following a symlink: of
	// what exists and is none, readlink(2) says EINVAL.
	var link [1]byte
	_, _, errno = syscall.Syscall6(unix.SYS_READLINKAT, dir, uintptr(unsafe.Pointer(&sendProxyV1[0])), uintptr(unsafe.Pointer(&link)), 1, 0, 0)
	switch errno {
	case 0, unix.EINVAL:
		return int(s), true, nil
	case unix.ENOENT:
		return int(s), false, nil
	}
	closeRaw(s)
	return -1, false, &Error{Other, errno}
}

// enter opens a host's directory and makes it the working directory.
func (d *Dialer) enter(dir []byte) (uintptr, unix.Errno) {
	fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT, uintptr(d.hosts), uintptr(unsafe.Pointer(&dir[0])), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	if _, _, errno = syscall.RawSyscall(unix.SYS_FCHDIR, fd, 0, 0); errno != 0 {
		closeRaw(fd)
		return 0, errno
	}
	d.away = true
	return fd, 0
}

// Leave makes the hosts directory the working directory again. That of a host, if it is used
// for long, keeps what it is on from being unmounted.
func (d *Dialer) Leave() {
	if d.away {
		unix.Fchdir(d.hosts)
		d.away = false
	}
}

func enterError(errno unix.Errno) error {
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG:
		// The last two come from a symlink.
		return &Error{NoDirectory, errno}
	case unix.EACCES, unix.EPERM:
		return &Error{NotPermitted, errno}
	}
	return socketError(errno)
}

func closeRaw(fd uintptr) { syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }
