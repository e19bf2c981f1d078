//go:build linux

package epoll

import (
	"slices"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
)

// shareWork finds out now and then how busy the loop is. A busy loop has the next one, in a ring,
// accept connections too, and moves relays there.
func (l *loop) shareWork() {
	if l.rounds%measureRounds != 0 || l.next == l {
		return
	}
	busy, ok := l.load.sample(limits.Now())
	if !ok {
		return
	}
	if busy > busyMost && l.invited.Load() {
		l.invite(true)
	} else if busy < busyLeast {
		l.invite(false)
	}
	if busy > MoveFrom {
		l.moveRelays()
	}
}

// invite has the next loop accept connections, or not. The first one always does.
func (l *loop) invite(yes bool) {
	if l.next != l.engine.loops[0] && l.next.invited.Swap(yes) != yes {
		l.next.poller.wakeUp()
	}
}

// moveRelays moves relays to the next loop, if that has fewer connections. It takes only those that
// were there at the last two samples: short connections stay where they are, and so do those in a
// queue, which wait for a second hello. Call it between two batches of events: one that is left for
// a relay would be lost.
func (l *loop) moveRelays() {
	most := min(int(l.open.Load()-l.next.open.Load())/2, movedMost)
	for i := 0; i < len(l.conns.all) && most > 0; i++ {
		if c := l.conns.all[i]; c.phase == relaying && c.queue == nil && l.load.samples-c.sample > 1 {
			l.move(c)
			most--
		}
	}
}

// move moves c to the next loop, or leaves it where it is if that has ended.
func (l *loop) move(c *conn) {
	for i := range c.sockets {
		if errno := l.poller.remove(c.sockets[i].fd); errno != 0 {
			c.abort(report.CutForMemory) // its events would be taken for those of another
			return
		}
	}
	if c.flows[client].turn || c.flows[backend].turn {
		c.flows[client].turn, c.flows[backend].turn = false, false
		l.turns = slices.DeleteFunc(l.turns, func(f *flow) bool { return f.conn == c })
	}
	l.conns.take(c)
	c.loop = l.next
	if !l.next.give(func(b *inbox) {
		b.relays = append(b.relays, c)
		l.next.open.Add(1)
		l.open.Add(-1)
	}) {
		c.loop = l
		l.adopt(c)
	}
}

// adopt makes c a connection of this loop. Once it is registered epoll tells whatever there is to
// do.
func (l *loop) adopt(c *conn) {
	l.conns.put(c)
	c.sample, c.active = l.load.samples, l.rounds
	l.checkHalfClosed()
	for i := range c.sockets {
		events := c.sockets[i].registered
		c.sockets[i].registered = 0
		if !c.register(side(i), events) {
			return
		}
	}
}

// A load is how busy a thread is.
type load struct {
	samples   int32
	wall, cpu int64 // at the last sample, in nanoseconds
}

// restart begins anew, for another thread.
func (m *load) restart(now int64) {
	m.wall, m.cpu = now, threadTime()
}

// sample returns which part of the time since the last sample the calling thread has worked. It
// fails if measurePeriod has not passed.
func (m *load) sample(now int64) (busy float64, ok bool) {
	passed := now - m.wall
	if passed < int64(measurePeriod) {
		return 0, false
	}
	cpu := threadTime()
	busy = float64(cpu-m.cpu) / float64(passed)
	m.wall, m.cpu = now, cpu
	m.samples++
	return busy, true
}

// threadTime returns the processor time of the calling thread, in nanoseconds.
func threadTime() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return ts.Nano()
}
