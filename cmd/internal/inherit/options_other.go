//go:build !linux

package inherit

import (
	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/socket"
)

// setListenerOptions finds nothing to do: accepted sockets do not inherit options everywhere.
func setListenerOptions(int) error { return nil }

// setClientOptions sets the options of a connection that was inherited.
func setClientOptions(fd int) error {
	SetAccepted(fd)
	BoundWaits(fd)
	return nil
}

// SetAccepted sets the options of an accepted connection. It fails only for one that is gone.
func SetAccepted(fd int) {
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// accept accepts a client. No program is started that could inherit its socket meanwhile.
func accept(listener int) (client int, from socket.Address, err error) {
	client, sa, err := unix.Accept(listener)
	if err != nil {
		return -1, from, err
	}
	unix.CloseOnExec(client)
	if err := unix.SetNonblock(client, true); err != nil {
		unix.Close(client)
		return -1, from, err
	}
	SetAccepted(client)
	return client, socket.AddressOf(sa), nil
}

func dup2(from, to int) error { return unix.Dup2(from, to) }
