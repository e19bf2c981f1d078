//go:build portable

package main

import "golang.org/x/sys/unix"

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
