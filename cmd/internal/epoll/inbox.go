//go:build linux

package epoll

import (
	"sync"

	"sniproxy/cmd/internal/shares"
)

// An inbox has what other threads give a loop.
type inbox struct {
	mu      sync.Mutex
	closed  bool     // the loop has ended
	relays  []*conn  // that another loop has moved here
	queries []*query // that were answered
	loss    loss
}

// A loss is that rich gives up a relay for needy, to make room. So many loops are still to be asked
// for one.
type loss struct {
	rich, needy *shares.Tenant
	loops       int
}

// give has put give the loop something. It fails if the loop has ended.
func (l *loop) give(put func(*inbox)) bool {
	b := &l.inbox
	b.mu.Lock()
	closed := b.closed
	if !closed {
		put(b)
	}
	b.mu.Unlock()
	if !closed {
		l.poller.wakeUp()
	}
	return !closed
}

// emptyInbox takes what the loop was given. Queries wait in the loop until found has dealt with
// each: it may end this goroutine.
func (l *loop) emptyInbox() {
	b := &l.inbox
	b.mu.Lock()
	relays, loss := b.relays, b.loss
	l.queries = append(l.queries, b.queries...)
	b.relays, b.queries, b.loss.rich = nil, nil, nil
	b.mu.Unlock()
	for _, c := range relays {
		l.adopt(c)
	}
	if loss.rich != nil {
		l.lose(loss)
	}
}

// closeIfEmpty reports whether the last connection has ended. Then the loop gets nothing any more,
// and nobody waits for the queries that it has.
func (l *loop) closeIfEmpty() bool {
	b := &l.inbox
	b.mu.Lock()
	closed := l.open.Load() == 0
	b.closed = closed
	b.mu.Unlock() // before others are locked: those who give hold them
	if closed {
		for _, q := range b.queries {
			l.engine.shares.Discard(&q.Query)
		}
	}
	return closed
}
