//go:build !linux

package hostdir

import "golang.org/x/sys/unix"

// socket takes two more calls than on Linux, since darwin has no flags for them.
// No other process is started that could inherit the descriptor in between.
func socket() (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
