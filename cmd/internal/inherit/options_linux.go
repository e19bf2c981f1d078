package inherit

import (
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/socket"
)

// setListenerOptions sets the options of a listening socket. On Linux accepted sockets inherit
// them.
func setListenerOptions(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(limits.KeepaliveIdle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(limits.KeepaliveInterval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, limits.KeepaliveCount},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return err
		}
	}
	// An accept that finds the socket blocking after all ends with EAGAIN after this time.
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000})
}

// setClientOptions sets the options of a connection that was inherited.
func setClientOptions(fd int) error {
	if err := setListenerOptions(fd); err != nil {
		return err
	}
	return BoundWaits(fd)
}

// accept accepts a client. Its socket has inherited its options from the listener.
func accept(listener int) (client int, from socket.Address, err error) {
	client, sa, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	return client, socket.AddressOf(sa), err
}

func dup2(from, to int) error { return unix.Dup3(from, to, 0) }
