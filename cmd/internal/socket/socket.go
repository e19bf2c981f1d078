// Package socket knows sockets: whose they are, which PROXY protocol header describes them, which
// descriptors came with a message, and how one is handed over.
package socket

import (
	"encoding/binary"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/proxyproto"
)

// AddrPort returns the address in sa. It is not valid if sa is of another family than IP.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// An Address is that of a client: small, since it is kept for as long as the client is served. The
// system tells it only while the client is there, and the log is to name those above all that are
// gone. The zero Address is none.
type Address struct {
	ip    [16]byte // an IPv4 address is one of ::ffff:0:0/96
	port  uint16
	known bool
}

// AddressOf returns the address in sa.
func AddressOf(sa unix.Sockaddr) Address { return AddressFrom(AddrPort(sa)) }

// AddressFrom returns an address as it is kept.
func AddressFrom(addr netip.AddrPort) Address {
	return Address{addr.Addr().As16(), addr.Port(), addr.IsValid()}
}

// Address4 returns an address as accept(2) writes it.
func Address4(sa *unix.RawSockaddrInet4) Address {
	a := Address{port: hostOrder(sa.Port), known: true}
	a.ip[10], a.ip[11] = 0xff, 0xff
	copy(a.ip[12:], sa.Addr[:])
	return a
}

// Address6 is Address4 for IPv6.
func Address6(sa *unix.RawSockaddrInet6) Address { return Address{sa.Addr, hostOrder(sa.Port), true} }

// hostOrder returns a port that is in the byte order of the network.
func hostOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

// Peer returns the address of the client with the socket fd, if it is not gone.
func Peer(fd int) Address {
	sa, err := unix.Getpeername(fd)
	if err != nil {
		return Address{}
	}
	return AddressOf(sa)
}

// String returns the address as people read it.
func (a Address) String() string {
	if !a.known {
		return "a client that is gone"
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a.ip).Unmap(), a.port).String()
}

// Header returns the header of a version of the PROXY protocol for the client with the socket fd,
// at most [proxyproto.MaxV2] bytes. The addresses are those that a balancer has sent, or those of
// the socket if from is nil. The name is the one that the client asked for, empty if none. An error
// means that the client is gone.
func Header(fd int, from *proxyproto.Header, version uint8, name []byte) ([]byte, error) {
	remote, err := unix.Getpeername(fd)
	if err != nil {
		return nil, err
	}
	if from == nil {
		local, err := unix.Getsockname(fd)
		if err != nil {
			return nil, err
		}
		from = &proxyproto.Header{Client: AddrPort(remote), Listener: AddrPort(local)}
	}
	header := make([]byte, 0, proxyproto.MaxV2)
	if version == 1 {
		return proxyproto.AppendV1(header, from.Client, from.Listener), nil
	}
	return proxyproto.AppendV2(header, from.Client, from.Listener, name), nil
}

// ControlSize is more than it takes for as many descriptors as one message can pass (253 on Linux).
// The kernel closes those that there is no room for, and that may take any time.
const ControlSize = 2048

// Passed returns the descriptors (SCM_RIGHTS) in the control messages that recvmsg(2) has received.
func Passed(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if more, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, more...)
		}
	}
	return fds
}

// HandOver sends b with a datagram socket that is connected, and with it the descriptor of a
// client. It reports whether that was sent; the error is of package hostdir.
func HandOver(to int, b []byte, client int) (sent bool, err error) {
	for wide := false; ; {
		err := unix.Sendmsg(to, b, unix.UnixRights(client), nil, unix.MSG_DONTWAIT)
		switch errno, _ := err.(unix.Errno); {
		case errno == 0:
			return true, nil
		case errno == unix.EINTR:
		case errno == unix.EMSGSIZE && !wide:
			wide = true
			defer Widen(to, len(b))()
		default:
			return false, hostdir.SendError(errno)
		}
	}
}

// Widen lets a datagram socket send up to size bytes at once, although its buffer is for less,
// until narrow is called. It still sends nothing while more than that is under way.
func Widen(fd, size int) (narrow func()) {
	was, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return func() {}
	}
	// Linux doubles what it is told. Elsewhere a socket sends once, so nobody needs it narrow.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size+1024)
	return func() { unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, was/2) }
}

// Lingers tells whether closing a socket may wait (SO_LINGER).
func Lingers(fd int) bool {
	l, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
	return err != nil || l.Onoff != 0
}

// SetPlain makes a client's socket what accept(2) would have returned: blocking, without the time
// limits that it has from the listening socket.
func SetPlain(client int) {
	unix.SetNonblock(client, false)
	for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		unix.SetsockoptTimeval(client, unix.SOL_SOCKET, name, &unix.Timeval{})
	}
}

// Events returns what poll(2) tells of a socket: POLLIN if there is something to read or to accept,
// or an end; POLLERR after a reset; POLLHUP after the end of both directions, and of a listening
// socket that was shut down.
func Events(fd int) int16 {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil {
		return 0
	}
	return p[0].Revents
}

// EventsOf is Events for a file, 0 if it is closed.
func EventsOf(f *os.File) (events int16) {
	Control(f, func(fd int) { events = Events(fd) })
	return events
}

// Shutdown ends a direction of a file. It fails only where there is nothing left to end.
func Shutdown(f *os.File, how int) {
	Control(f, func(fd int) { unix.Shutdown(fd, how) })
}

// Control calls do with the descriptor of a file, unless it is closed.
func Control(f *os.File, do func(fd int)) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { do(int(fd)) })
}
