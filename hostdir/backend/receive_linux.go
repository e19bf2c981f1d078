package backend

import "golang.org/x/sys/unix"

const (
	peeks        = true
	cloexec      = unix.MSG_CMSG_CLOEXEC
	receiveFlags = unix.MSG_PEEK | unix.MSG_DONTWAIT | cloexec
)

// prepare does nothing: the sender's buffer counts.
func prepare(int) {}
