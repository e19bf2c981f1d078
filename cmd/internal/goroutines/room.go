package goroutines

import (
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
)

// leave takes c out of the queue. It fails if c was dropped to make room. The caller has the lock.
func (e *Engine) leave(c *conn) bool {
	if c.queued == nil {
		return false
	}
	e.queue.Remove(c.queued)
	c.queued = nil
	if !c.refused {
		e.counters.Waiting.Add(-1)
	}
	return true
}

// beginRelay makes c, which is queued, a relay. It fails if c was dropped to make room.
func (c *conn) beginRelay() bool {
	e := c.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.leave(c) {
		return false
	}
	c.moved.Store(limits.Now())
	e.relays[c] = struct{}{}
	e.shares.CountRelays(c.tenant, 1)
	return true
}

// drop counts c as ended, unless that was done. The caller has the lock.
func (e *Engine) drop(c *conn) {
	if c.dropped {
		return
	}
	c.dropped = true
	e.leave(c)
	if _, is := e.relays[c]; is {
		delete(e.relays, c)
		e.shares.CountRelays(c.tenant, -1)
	}
	e.counters.Ended.Add(1)
}

// DropOldest makes room for c, as [shares.RoomMaker] says.
func (c *conn) DropOldest(age time.Duration) bool { return c.engine.dropOldest(c, age) }

func (e *Engine) dropOldest(needy *conn, age time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := e.queue.Front()
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
	e.drop(oldest)
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
	e.drop(silent)
	return true
}
