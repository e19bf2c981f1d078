package goroutines

import "golang.org/x/sys/unix"

// accept accepts a connection, or fails with EAGAIN if there is none. Whoever shares the
// socket may have made it blocking, as systemd does whenever it starts something with
// it. So the flag is set anew each time, and should it be gone again before the next
// instruction, SO_RCVTIMEO bounds the wait.
func accept(listener int) (fd int, err error) {
	if err := unix.SetNonblock(listener, true); err != nil {
		return -1, err
	}
	fd, _, err = unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	return fd, err
}
