package goroutines

import (
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
)

// leave takes c out of those that wait. It fails if c was dropped to make room. The caller has the
// lock.
func (e *Engine) leave(c *conn) bool {
	if c.queued == nil {
		return false
	}
	e.waiting.Remove(c.queued)
	c.queued = nil
	if !c.refused {
		e.counters.Waiting.Add(-1)
	}
	return true
}

// beginRelay makes c, which waits, a relay. It fails if c was dropped to make room.
func (c *conn) beginRelay() bool {
	e := c.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.leave(c) {
		return false
	}
	c.moved.Store(limits.Now())
	e.relays[c] = struct{}{}
	c.tenant.Relays.Add(1)
	return true
}

// endRelay takes c out of the relays. The caller has the lock.
func (e *Engine) endRelay(c *conn) {
	if _, is := e.relays[c]; is {
		delete(e.relays, c)
		c.tenant.Relays.Add(-1)
	}
}

// DropOldest makes room for c, as [shares.RoomMaker] says.
func (c *conn) DropOldest(age time.Duration) bool { return c.engine.dropOldest(c, age) }

func (e *Engine) dropOldest(needy *conn, age time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := e.waiting.Front()
	if first != nil && first.Value == needy {
		first = first.Next()
	}
	if first == nil {
		return false
	}
	oldest := first.Value.(*conn)
	if !oldest.refused {
		if age > 0 && limits.Now()-oldest.accepted <= int64(age) {
			return false
		}
		report.Dropped(oldest.peer)
		e.counters.Dropped.Add(1)
	}
	e.leave(oldest)
	oldest.cancel()
	oldest.client.Close()
	return true
}

// ResetSilent makes room for c, as [shares.RoomMaker] says.
func (c *conn) ResetSilent(rich, needy *shares.Tenant) bool {
	e := c.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if !rich.MayLose(needy) {
		return false
	}
	var silent *conn
	for r := range e.relays {
		if r.tenant == rich && (silent == nil || r.moved.Load() < silent.moved.Load()) {
			silent = r
		}
	}
	if silent == nil {
		return false
	}
	report.Reset(silent.peer, rich)
	e.counters.Dropped.Add(1)
	silent.end(report.ResetForRoom)
	e.endRelay(silent)
	return true
}

// RelayDescriptors returns how many descriptors relays have.
func (e *Engine) RelayDescriptors() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return 2 * int64(len(e.relays))
}

// NotRelays returns how many clients have no relay.
func (e *Engine) NotRelays() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return int64(e.waiting.Len())
}
