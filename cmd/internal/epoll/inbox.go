//go:build linux

package epoll

import (
	"sync"

	"sniproxy/cmd/internal/shares"
)

// An inbox has what other threads give a loop.
type inbox struct {
	mu      sync.Mutex
	closed  bool      // the loop has ended
	relays  []*conn   // that another loop has handed over
	lookups []*lookup // that have ended
	reset   reset     // a relay, to make room
}

// A reset is one tenant's giving up a relay for another.
type reset struct{ rich, needy *shares.Tenant }

// give has put give the loop something, and wakes it up. It fails if the loop has ended.
func (l *loop) give(put func(*inbox)) bool {
	b := &l.inbox
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	put(b)
	l.poller.wakeUp()
	return true
}

// emptyInbox deals with what the loop was given.
func (l *loop) emptyInbox() {
	b := &l.inbox
	b.mu.Lock()
	relays, lookups, reset := b.relays, b.lookups, b.reset
	b.relays, b.lookups, b.reset.rich, b.reset.needy = nil, nil, nil, nil
	b.mu.Unlock()
	for _, c := range relays {
		l.adopt(c)
	}
	for _, k := range lookups {
		l.found(k)
	}
	if reset.rich != nil {
		l.resetOne(reset.rich, reset.needy)
	}
}

// over reports whether the last connection has ended. Then the loop gets no others.
func (l *loop) over() bool {
	l.inbox.mu.Lock()
	defer l.inbox.mu.Unlock()
	l.inbox.closed = l.open.Load() == 0
	return l.inbox.closed
}
