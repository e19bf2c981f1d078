//go:build !linux

package main

import "golang.org/x/sys/unix"

// tuneListener finds nothing to do: accepted sockets do not inherit options everywhere.
func tuneListener(int) error { return nil }

// accept accepts a connection, or fails with EAGAIN if there is none. Whoever shares the
// socket may have made it blocking, so the flag is set anew each time.
func (l *listener) accept() (fd int, err error) {
	if err := unix.SetNonblock(l.fd, true); err != nil {
		return -1, err
	}
	fd, _, err = unix.Accept(l.fd)
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, err
	}
	setClientOptions(fd)
	return fd, nil
}

// setClientOptions fails only for a connection that is gone already.
func setClientOptions(fd int) {
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// tuneClient sets the options of a connection that was inherited.
func tuneClient(fd int) error {
	setClientOptions(fd)
	boundWaits(fd)
	return nil
}

func dup2(from, to int) error { return unix.Dup2(from, to) }
