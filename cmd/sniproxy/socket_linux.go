package main

import (
	"time"

	"golang.org/x/sys/unix"
)

// tuneListener sets the options of the listening socket fd. On Linux accepted sockets
// inherit those of TCP.
func tuneListener(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepaliveIdle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepaliveInterval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepaliveCount},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return err
		}
	}
	// For an accept that finds the socket blocking after all: it then ends with
	// EAGAIN after this time.
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000})
}

// accept accepts a connection, or fails with EAGAIN if there is none. Whoever shares the
// socket may have made it blocking, as systemd does whenever it starts something with
// it. So the flag is set anew each time, and should it be gone again before the next
// instruction, SO_RCVTIMEO bounds the wait.
func (l *listener) accept() (fd int, client unix.Sockaddr, err error) {
	if err := unix.SetNonblock(l.fd, true); err != nil {
		return -1, nil, err
	}
	return unix.Accept4(l.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
}

func dup2(from, to int) error { return unix.Dup3(from, to, 0) }
