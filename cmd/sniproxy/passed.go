package main

import (
	"golang.org/x/sys/unix"
)

// controlSize is more than it takes for as many descriptors as one message can pass (253 on Linux): the kernel closes those that
// there is no room for.
const controlSize = 2048

// descriptorsIn returns the descriptors in what recvmsg(2) has received besides bytes.
func descriptorsIn(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if more, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, more...)
		}
	}
	return fds
}
