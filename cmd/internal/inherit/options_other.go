//go:build !linux

package inherit

import "golang.org/x/sys/unix"

// setListenerOptions finds nothing to do: accepted sockets do not inherit options everywhere.
func setListenerOptions(int) error { return nil }

// setClientOptions sets the options of a connection that was inherited.
func setClientOptions(fd int) error {
	setAccepted(fd)
	BoundWaits(fd)
	return nil
}

// Accept accepts a client. No program is started that could inherit its socket meanwhile.
func Accept(listener int) (fd int, err error) {
	fd, _, err = unix.Accept(listener)
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, err
	}
	setAccepted(fd)
	return fd, nil
}

// setAccepted sets the options of an accepted connection. It fails only for one that is gone.
func setAccepted(fd int) {
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

func dup2(from, to int) error { return unix.Dup2(from, to) }
