package inherit

import (
	"time"

	"golang.org/x/sys/unix"
)

// Keepalive, which sniproxy-rs does not set, finds clients that vanished without a word: after
// keepaliveIdle of silence they are probed every keepaliveInterval and given up after keepaliveCount
// probes. The first is long enough not to wake up sleeping phones all the time and shorter than what
// middleboxes commonly remember a connection for.
const (
	keepaliveIdle     = 4 * time.Minute
	keepaliveInterval = 30 * time.Second
	keepaliveCount    = 4
)

// setListenerOptions sets the options of a listening socket. On Linux accepted sockets inherit them.
func setListenerOptions(fd int) error {
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
	// An accept that finds the socket blocking after all ends with EAGAIN after this time.
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000})
}

// setClientOptions sets the options of a connection that was inherited.
func setClientOptions(fd int) error {
	if err := setListenerOptions(fd); err != nil {
		return err
	}
	return boundWaits(fd)
}

func dup2(from, to int) error { return unix.Dup3(from, to, 0) }
