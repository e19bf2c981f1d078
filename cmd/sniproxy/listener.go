package main

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A listener is the socket that was inherited. Its open file description is shared:
// other processes may accept from it and change its flags at any time. So O_NONBLOCK,
// although it is set here, is not to be relied upon: it is set anew before each accept. (sniproxy-rs
// checks only that there is a TCP socket, and relies on the flag.)
type listener struct {
	fd   int
	addr netip.AddrPort
}

// inheritListener takes the listening socket over from standard input, to a descriptor
// of its own, the only one that is kept.
func inheritListener() (*listener, error) {
	addr, err := checkListener(0)
	if err != nil {
		return nil, fmt.Errorf("%w; it must be a listening TCP socket, as systemd, inetd and s6 hand it over", err)
	}
	fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("cannot duplicate standard input: %w", err)
	}
	if err := tuneListener(fd); err != nil {
		return nil, fmt.Errorf("cannot set options of the socket on standard input: %w", err)
	}
	if err := coverStandard(fd); err != nil {
		return nil, fmt.Errorf("cannot replace standard input: %w", err)
	}
	return &listener{fd, addr}, nil
}

// checkListener returns the address that the socket fd listens on, or an error that
// says what fd is instead.
func checkListener(fd int) (netip.AddrPort, error) {
	none := netip.AddrPort{}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return none, fmt.Errorf("standard input is closed (%w)", err)
	}
	if what, ok := map[uint32]string{
		unix.S_IFREG: "a file",
		unix.S_IFDIR: "a directory",
		unix.S_IFIFO: "a pipe",
		unix.S_IFBLK: "a block device",
		unix.S_IFCHR: "a terminal or another character device (such as /dev/null, when it was closed)",
	}[uint32(st.Mode)&unix.S_IFMT]; ok {
		return none, fmt.Errorf("standard input is %s", what)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return none, fmt.Errorf("standard input is not a socket (%w)", err)
	}
	addr := addrPort(sa)
	if !addr.IsValid() {
		if _, ok := sa.(*unix.SockaddrUnix); ok {
			return none, fmt.Errorf("standard input is a Unix socket")
		}
		return none, fmt.Errorf("standard input is a socket of another kind than TCP")
	}
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_STREAM {
		return none, fmt.Errorf("standard input is a UDP or other socket that is not a stream")
	}
	if _, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY); err != nil {
		return none, fmt.Errorf("standard input is a stream socket of another kind than TCP")
	}
	if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens == 0 {
		if _, err := unix.Getpeername(fd); err == nil {
			return none, fmt.Errorf("standard input is a TCP connection")
		}
		return none, fmt.Errorf("standard input is a TCP socket that does not listen")
	}
	return addr, nil
}

// coverStandard puts something harmless over each of the descriptors 0, 1 and 2 that is
// the same socket as fd: the reading end of a pipe that nobody writes to, since a chroot
// may have no /dev/null. They are not closed, so that no connection gets their numbers.
// Only fd is left to close at the stop.
func coverStandard(fd int) error {
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	var listening, st unix.Stat_t
	if err := unix.Fstat(fd, &listening); err != nil {
		return err
	}
	for i := range 3 {
		if unix.Fstat(i, &st) == nil && st.Dev == listening.Dev && st.Ino == listening.Ino {
			if err := dup2(pipe[0], i); err != nil {
				return err
			}
		}
	}
	return nil
}

// stillListens tells whether the socket can be accepted from at all: whoever shares it
// can shut it down for all.
func (l *listener) stillListens() bool {
	listens, err := unix.GetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err != nil || listens != 0
}

// pending tells whether there is a connection to accept.
func (l *listener) pending() bool {
	p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0
}

// addrPort returns the address in sa, not valid if it is of another family than IP.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
