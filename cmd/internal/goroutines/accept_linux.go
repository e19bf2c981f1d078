package goroutines

import "golang.org/x/sys/unix"

// accept accepts a client. Its socket has inherited its options from the listener.
func accept(listener int) (fd int, err error) {
	fd, _, err = unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	return fd, err
}
