//go:build !linux

package backend

import "golang.org/x/sys/unix"

// Not every system here has MSG_CMSG_CLOEXEC, and on none are descriptors of messages that were
// peeked at of any use.
const (
	peeks        = false
	cloexec      = 0
	receiveFlags = unix.MSG_DONTWAIT
)

// prepare makes room for the longest message, since the receiver's buffer counts.
func prepare(s int) {
	unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_RCVBUF, 2*dataMost)
}
