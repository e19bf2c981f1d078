package main

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// A closing is what is left to close of a tenant's, where close(2) may take any time, or never return:
// descriptors that his backends have passed, such as of a file on a file system of his own, and sockets
// that may hold some. They are closed by one thread at a time.
type closing struct {
	mu      sync.Mutex
	fds     []int
	running bool
	left    atomic.Int64
}

// closeAway closes descriptors in another thread.
func (t *tenant) closeAway(threads *threads, fds ...int) {
	c := &t.closing
	c.left.Add(int64(len(fds)))
	threads.closing.Add(int64(len(fds)))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fds = append(c.fds, fds...)
	if c.running {
		return
	}
	c.running = true
	t.users.Add(1)
	threads.start(&task{tenant: t, do: func(*hostdir.Dialer) {
		for t.closeSome(threads) {
		}
		t.release()
	}})
}

func (t *tenant) closeSome(threads *threads) bool {
	c := &t.closing
	c.mu.Lock()
	fds := c.fds
	c.fds = nil
	c.running = len(fds) > 0
	c.mu.Unlock()
	for _, fd := range fds {
		unix.Close(fd)
		c.left.Add(-1)
		threads.closing.Add(-1)
	}
	return len(fds) > 0
}

// clogged tells whether so much of his is left to close that he gets no connection more.
func (t *tenant) clogged() bool { return t.closing.left.Load() > closingMost }
