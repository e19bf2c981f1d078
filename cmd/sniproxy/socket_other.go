//go:build !linux

package main

import "golang.org/x/sys/unix"

// tuneListener finds nothing to do: accepted sockets do not inherit options everywhere.
func tuneListener(int) error { return nil }

// accept accepts a connection, or fails with EAGAIN if there is none. Whoever shares the
// socket may have made it blocking, so the flag is set anew each time.
func (l *listener) accept() (fd int, client unix.Sockaddr, err error) {
	if err := unix.SetNonblock(l.fd, true); err != nil {
		return -1, nil, err
	}
	fd, client, err = unix.Accept(l.fd)
	if err != nil {
		return -1, nil, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	// These fail only for a connection that is gone already.
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	return fd, client, nil
}

func dup2(from, to int) error { return unix.Dup2(from, to) }
