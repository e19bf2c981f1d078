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

// tuneClient sets the options of a connection that was inherited.
func tuneClient(fd int) error {
	if err := tuneListener(fd); err != nil {
		return err
	}
	return boundWaits(fd)
}

func dup2(from, to int) error { return unix.Dup3(from, to, 0) }
