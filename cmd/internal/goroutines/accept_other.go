//go:build !linux

package goroutines

import (
	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/inherit"
)

// accept accepts a client. No program is started that could inherit its socket meanwhile.
func accept(listener int) (fd int, err error) {
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
