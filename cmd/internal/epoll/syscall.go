//go:build linux

package epoll

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
)

// The system calls that a connection is made of. They never block, on the non-blocking
// descriptors that they are used with, so the scheduler is not told of them: that is what
// RawSyscall saves. Those that are interrupted before they did anything are made again.

func read(fd int32, b []byte) (int, unix.Errno) { return transfer(unix.SYS_READ, fd, b) }

func write(fd int32, b []byte) (int, unix.Errno) { return transfer(unix.SYS_WRITE, fd, b) }

func transfer(call uintptr, fd int32, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// acceptFrom is accept4(2). The address of the client comes with it, and costs no call.
func acceptFrom(fd int) (client int32, from socket.Address, errno unix.Errno) {
	var sa unix.RawSockaddrInet6 // the longest
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	switch {
	case errno != 0:
	case sa.Family == unix.AF_INET:
		from = socket.Address4((*unix.RawSockaddrInet4)(unsafe.Pointer(&sa)))
	case sa.Family == unix.AF_INET6:
		from = socket.Address6(&sa)
	}
	return int32(n), from, errno
}

// recv is read, with flags.
func recv(fd int32, b []byte, flags int) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(flags), 0, 0)
	return int(n), errno
}

// receive is read, for a Unix socket, and returns what was passed with the bytes as well: control
// has room for that.
func receive(fd int32, b, control []byte) (n int, passed []int, errno unix.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(b)}
	iov.SetLen(len(b))
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: unsafe.SliceData(control)}
	msg.SetControllen(len(control))
	for {
		r, _, errno := syscall.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_CMSG_CLOEXEC)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == 0 && msg.Controllen > 0:
			passed = socket.Passed(control[:msg.Controllen])
		}
		return int(r), passed, errno
	}
}

// setPlain is like [socket.SetPlain], for a socket that was accepted here: it has no time limit for
// what is sent.
func setPlain(fd int32) {
	syscall.RawSyscall(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFL, unix.O_RDWR)
	var never unix.Timeval
	syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_RCVTIMEO, uintptr(unsafe.Pointer(&never)), unsafe.Sizeof(never), 0)
}

// lingers is like [socket.Lingers].
func lingers(fd int32) bool {
	var l unix.Linger
	size := uint32(unsafe.Sizeof(l))
	_, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), uintptr(unsafe.Pointer(&size)), 0)
	return errno != 0 || l.Onoff != 0
}

// rights is a control message that passes one descriptor (SCM_RIGHTS).
type rights struct {
	header unix.Cmsghdr
	fd     int32
	_      int32
}

// handOver is like [socket.HandOver], without anything that the scheduler or the allocator must
// know.
func handOver(to int, b []byte, client int32) (sent bool, err error) {
	r := rights{header: unix.Cmsghdr{Level: unix.SOL_SOCKET, Type: unix.SCM_RIGHTS}, fd: client}
	r.header.SetLen(unix.CmsgLen(4))
	iov := unix.Iovec{Base: unsafe.SliceData(b)}
	iov.SetLen(len(b))
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: (*byte)(unsafe.Pointer(&r))}
	msg.SetControllen(unix.CmsgSpace(4))
	for {
		_, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(to), uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT)
		switch errno {
		case 0:
			return true, nil
		case unix.EINTR:
		default:
			return false, hostdir.SendError(errno)
		}
	}
}

// sendBuffer returns how much a Unix socket takes that its peer does not read.
func sendBuffer() (int32, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("cannot make a Unix socket: %w", err)
	}
	defer unix.Close(fd)
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	return int32(n), err
}

// unsent returns how many bytes a socket has that its peer did not acknowledge, or read.
func unsent(fd int32) int32 {
	var n int32
	syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCOUTQ, uintptr(unsafe.Pointer(&n)))
	return n
}

func splice(from, to int32, size int) (int, unix.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(size), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

func setNonblock(fd int32) {
	syscall.RawSyscall(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFL, unix.O_RDWR|unix.O_NONBLOCK)
}

func closeFd(fd int32) { syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func epollCtl(epoll, op int, fd int32, event *unix.EpollEvent) unix.Errno {
	_, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(event)), 0, 0)
	return errno
}

// epollWait waits for events for at most the given number of milliseconds.
func epollWait(epoll int, events []unix.EpollEvent, msec int) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), uintptr(msec), 0, 0)
	return int(n), errno
}

// epollWaitLong is like epollWait, but the scheduler is told, and there may be no limit: a
// negative number.
func epollWaitLong(epoll int, events []unix.EpollEvent, msec int) (int, unix.Errno) {
	n, _, errno := syscall.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), uintptr(msec), 0, 0)
	return int(n), errno
}
