package backend

import (
	"testing"

	"golang.org/x/sys/unix"
)

// DataMost is the most bytes that a message may have.
const DataMost = dataMost

// Ways are the names of the ways to reach something in a directory.
var Ways = []string{"directly", "through /proc", "in a thread", "through a link"}

// OnlyWays has directories reached in these ways only, by their numbers.
func OnlyWays(t *testing.T, numbers ...int) {
	all := ways
	t.Cleanup(func() { ways = all })
	ways = nil
	for _, i := range numbers {
		ways = append(ways, all[i])
	}
}

// BeforeRename has Close call f after it has found the socket to be its own.
func BeforeRename(t *testing.T, f func()) {
	t.Cleanup(func() { beforeRename = func() {} })
	beforeRename = f
}

// Ignored returns how many descriptors are left to close, and by how many threads.
func Ignored() (left, running int) {
	ignored.mu.Lock()
	defer ignored.mu.Unlock()
	return len(ignored.fds), ignored.running
}

// Recvmsg has f called in place of recvmsg(2).
func Recvmsg(t *testing.T, f func(fd int, data, control []byte, flags int) (n, controls, receivedFlags int, from unix.Sockaddr, err error)) {
	t.Cleanup(func() { recvmsg = unix.Recvmsg })
	recvmsg = f
}
