package shares

import "golang.org/x/sys/unix"

// underWay tells whether a datagram that was sent with a socket was not received yet.
func underWay(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	return err == nil && n > 0
}
