//go:build !linux

package goroutines

import (
	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/inherit"
)

// accept accepts a connection, or fails with EAGAIN if there is none. Whoever shares the
// socket may have made it blocking, so the flag is set anew each time.
func accept(listener int) (fd int, err error) {
	if err := unix.SetNonblock(listener, true); err != nil {
		return -1, err
	}
	fd, _, err = unix.Accept(listener)
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, err
	}
	inherit.SetAccepted(fd)
	return fd, nil
}
