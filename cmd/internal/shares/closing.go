package shares

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
)

// A closing has what is left to close for a tenant where close(2) may take any time, or never
// return. His backends can pass descriptors, and a file on a file system of his own may never be
// closed; a socket may hold such a descriptor. One thread at a time closes them.
type closing struct {
	mu      sync.Mutex
	fds     []int
	running bool
	left    atomic.Int64
}

// CloseAway closes descriptors in another thread.
func (t *Tenant) CloseAway(threads *Threads, fds ...int) {
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
	threads.Start(&Task{Tenant: t, closing: true, Do: func(*hostdir.Dialer) {
		for t.closeSome(threads) {
		}
		t.Release()
	}})
}

func (t *Tenant) closeSome(threads *Threads) bool {
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

// Clogged tells whether so much is left to close for him that he gets no connection more.
func (t *Tenant) Clogged() bool { return t.closing.left.Load() > limits.Closing }
