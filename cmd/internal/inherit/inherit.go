// Package inherit takes over the sockets that the program was given, checks them, and accepts from
// them.
package inherit

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/socket"
)

// A Listener is a listening socket that was inherited. Its open file description is shared: other
// processes may accept from it and change its flags at any time. So set O_NONBLOCK anew before each
// accept. (sniproxy-rs checks only that there is a TCP socket, and relies on the flag.)
type Listener struct {
	FD   int
	Addr netip.AddrPort
}

// Take takes over the sockets that systemd has passed (LISTEN_FDS), or else the one on standard
// input. They all listen, or there is just one, and that is the connection of a client.
// (sniproxy-rs knows only a listening standard input.) The error says what was found and what to
// do.
func Take() (listeners []*Listener, clients []int, err error) {
	n, err := passed()
	if err != nil {
		return nil, nil, err
	}
	first, want := 3, "it must be a listening TCP socket, as systemd, inetd and s6 hand it over"
	if n == 0 {
		first, n = 0, 1
	}
	if n == 1 {
		want += ", or a TCP connection"
	}
	for fd := first; fd < first+n; fd++ {
		addr, err := check(fd)
		connected := err == errConnection && n == 1
		if err != nil && !connected {
			return nil, nil, fmt.Errorf("%s %w; %s", describe(fd), err, want)
		}
		own := fd
		if fd == 0 {
			if own, err = unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3); err != nil {
				return nil, nil, fmt.Errorf("cannot duplicate standard input: %w", err)
			}
		}
		if err := coverStandard(own); err != nil {
			if own != fd {
				unix.Close(own)
			}
			return nil, nil, fmt.Errorf("cannot replace %s: %w", describe(fd), err)
		}
		if connected {
			clients = append(clients, own)
			err = setClientOptions(own)
		} else {
			listeners = append(listeners, &Listener{own, addr})
			err = setListenerOptions(own)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("cannot set options of the socket on %s: %w", describe(fd), err)
		}
	}
	return listeners, clients, nil
}

// Datagram returns the Unix datagram socket that systemd has passed (LISTEN_FDS), or -1 if it has
// passed nothing. The error says what was found and what to do.
func Datagram() (fd int, err error) {
	n, err := passed()
	if n == 0 || err != nil {
		return -1, err
	}
	const first, want = 3, "it must be a Unix datagram socket, as systemd makes it for ListenDatagram="
	if n > 1 {
		return -1, fmt.Errorf("there are %d sockets (LISTEN_FDS), and a host has one; %s", n, want)
	}
	if err := checkDatagram(first); err != nil {
		return -1, fmt.Errorf("%s %w; %s", describe(first), err, want)
	}
	unix.CloseOnExec(first)
	return first, nil
}

// passed returns how many sockets systemd has passed to this process, on descriptors from 3 on; see
// sd_listen_fds(3). It ignores variables that are for another process.
func passed() (int, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0, nil
	}
	s, ok := os.LookupEnv("LISTEN_FDS")
	if !ok {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 30)
	if err != nil {
		return 0, fmt.Errorf("LISTEN_FDS is %q, which is not a number of sockets", s)
	}
	return int(n), nil
}

// describe names a descriptor where a socket is expected.
func describe(fd int) string {
	if fd == 0 {
		return "standard input"
	}
	return fmt.Sprintf("descriptor %d (LISTEN_FDS)", fd)
}

var errConnection = errors.New("is a TCP connection")

// check returns the address that the socket fd listens on, errConnection, or an error that says
// what else fd is.
func check(fd int) (netip.AddrPort, error) {
	none := netip.AddrPort{}
	sa, err := name(fd)
	if err != nil {
		return none, err
	}
	addr := socket.AddrPort(sa)
	if !addr.IsValid() {
		if _, ok := sa.(*unix.SockaddrUnix); ok {
			return none, errors.New("is a Unix socket")
		}
		return none, errors.New("is a socket of another kind than TCP")
	}
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_STREAM {
		return none, errors.New("is a UDP or other socket that is not a stream")
	}
	if _, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY); err != nil {
		return none, errors.New("is a stream socket of another kind than TCP")
	}
	if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens == 0 {
		// One that the client has reset already has no peer any more, but an end to read.
		if _, err := unix.Getpeername(fd); err == nil || socket.Events(fd)&unix.POLLIN != 0 {
			return none, errConnection
		}
		return none, errors.New("is a TCP socket that does not listen")
	}
	return addr, nil
}

// checkDatagram returns an error that says what fd is, unless that is a Unix datagram socket with a
// path.
func checkDatagram(fd int) error {
	sa, err := name(fd)
	if err != nil {
		return err
	}
	addr, ok := sa.(*unix.SockaddrUnix)
	if !ok {
		return errors.New("is a socket of another kind than Unix")
	}
	if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_DGRAM {
		return errors.New("is a Unix socket of another kind, such as one for ListenStream=")
	}
	if addr.Name == "" || addr.Name[0] == '@' {
		return errors.New("is a Unix socket without a path")
	}
	return nil
}

// name returns the address that the socket fd has, or an error that says what fd is.
func name(fd int) (unix.Sockaddr, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("is closed (%w)", err)
	}
	if what, ok := map[uint32]string{
		unix.S_IFREG: "a file",
		unix.S_IFDIR: "a directory",
		unix.S_IFIFO: "a pipe",
		unix.S_IFBLK: "a block device",
		unix.S_IFCHR: "a terminal or another character device (such as /dev/null, when it was closed)",
	}[uint32(st.Mode)&unix.S_IFMT]; ok {
		return nil, fmt.Errorf("is %s", what)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("is not a socket (%w)", err)
	}
	return sa, nil
}

// coverStandard puts something harmless over each of the descriptors 0, 1 and 2 that is the same
// socket as fd: the reading end of a pipe that nobody writes to, since a chroot may have no
// /dev/null. It does not close them, so that no connection gets their numbers. Then only fd is left
// to close at the stop, and nothing that is printed gets to a client.
func coverStandard(fd int) error {
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	var own, st unix.Stat_t
	if err := unix.Fstat(fd, &own); err != nil {
		return err
	}
	for i := range 3 {
		if unix.Fstat(i, &st) == nil && st.Dev == own.Dev && st.Ino == own.Ino {
			if err := dup2(pipe[0], i); err != nil {
				return err
			}
		}
	}
	return nil
}

// BoundWaits is for a connection that others share, such as a wrapper of the program or systemd,
// and may make blocking: reads and writes then end with EAGAIN after this time.
func BoundWaits(fd int) error {
	for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, name, &unix.Timeval{Usec: 10_000}); err != nil {
			return err
		}
	}
	return unix.SetNonblock(fd, true)
}

// StillListens tells whether the socket can be accepted from at all: whoever shares it can shut it
// down for all.
func (l *Listener) StillListens() bool {
	listens, err := unix.GetsockoptInt(l.FD, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	return err != nil || listens != 0
}

// ShutDown is why the program cannot go on if a socket does not listen any more.
func (l *Listener) ShutDown() error {
	return fmt.Errorf("the listening socket %v was shut down by another process that shares it", l.Addr)
}

// Pending tells whether accept(2) has something to say: that a client is waiting, or that the
// socket was shut down.
func (l *Listener) Pending() bool { return socket.Events(l.FD) != 0 }
