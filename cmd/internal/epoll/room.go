//go:build linux

package epoll

import (
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
)

// DropOldest is for [shares.Room.ForRelay], which makes room for the connection of the runner.
func (l *loop) DropOldest(age time.Duration) bool { return l.dropOldest(l.runner.Load().conn, age) }

// A roomFor makes room for another connection than that of the runner.
type roomFor struct {
	*loop
	c *conn
}

// DropOldest is like that of the loop.
func (r roomFor) DropOldest(age time.Duration) bool { return r.dropOldest(r.c, age) }

// dropOldest drops a client that lingers, or else the one, other than except, that has waited
// longest for its relay, if it has waited longer than age. It reports whether there was one.
func (l *loop) dropOldest(except *conn, age time.Duration) bool {
	if told := l.lingers.first; told != nil {
		told.close()
		return true
	}
	oldest := l.hellos.first
	if oldest != nil && oldest == except {
		oldest = oldest.next
	}
	if oldest == nil || age > 0 && limits.Now()-oldest.accepted <= int64(age) {
		return false
	}
	report.Dropped(oldest.peer)
	l.counters.Dropped.Add(1)
	oldest.close()
	return true
}

// ResetSilent is for [shares.Room.ForRelay]. If none of rich's relays is in this loop, the others
// are asked one after the other, and that takes a moment.
func (l *loop) ResetSilent(rich, needy *shares.Tenant) bool {
	return l.lose(loss{rich, needy, len(l.engine.loops)})
}

// lose resets a relay, or asks the next loop for one. It reports whether it has done so itself.
func (l *loop) lose(s loss) bool {
	if l.resetOne(s.rich, s.needy) {
		return true
	}
	if s.loops--; s.loops > 0 && s.rich.MayLose(s.needy) {
		l.next.give(func(b *inbox) { b.loss = s })
	}
	return false
}

// resetOne resets the relay of rich that has been silent longest, of those in this loop.
func (l *loop) resetOne(rich, needy *shares.Tenant) bool {
	if !rich.MayLose(needy) {
		return false
	}
	var silent *conn
	for _, c := range l.conns.all {
		if c.phase == relaying && c.tenant == rich && (silent == nil || c.active < silent.active) {
			silent = c
		}
	}
	if silent == nil {
		return false
	}
	report.Reset(silent.peer, rich)
	l.counters.Dropped.Add(1)
	silent.printAccess(report.ResetForRoom)
	silent.abort()
	return true
}
