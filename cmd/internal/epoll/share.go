//go:build !portable

package main

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Loops share their work with the next one, in a ring, while they are busy: it accepts
// connections too, and it is handed relays. Short connections are never handed over.

// measure finds out now and then how busy the loop is, and acts upon it.
func (l *loop) measure() {
	if l.rounds%32 != 0 || l.next == l {
		return
	}
	t := now()
	passed := t - l.wall
	if passed < int64(measurePeriod) {
		return
	}
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	busy := float64(ts.Nano()-l.cpu) / float64(passed)
	l.wall, l.cpu = t, ts.Nano()
	l.measured++

	if l.next != l.engine.loops[0] {
		switch {
		case busy > busyMost && !l.next.invited.Swap(true), busy < busyLeast && l.next.invited.Swap(false):
			l.next.wakeUp()
		}
	}
	if busy > handOverFrom {
		l.handOver()
	}
}

// handOver hands relays over to the next loop, if that has fewer connections. Only those are
// taken that were there at the last two measurements. It is called between two batches of
// events, so none is left for them.
func (l *loop) handOver() {
	most := min(int(l.open.Load()-l.next.open.Load())/2, handedMost)
	n := 0
	for i := 0; i < len(l.conns) && n < most; i++ {
		if c := l.conns[i]; c.phase == relaying && l.measured-c.begun > 1 {
			l.hand(c)
			n++
		}
	}
	if n > 0 {
		l.next.wakeUp()
	}
}

// hand hands c over to the next loop, or leaves it where it is if that has ended.
func (l *loop) hand(c *conn) {
	for i := range c.sockets {
		if errno := epollCtl(l.epoll, unix.EPOLL_CTL_DEL, c.sockets[i].fd, &unix.EpollEvent{}); errno != 0 {
			l.abort(c) // its events would be taken for those of another
			return
		}
	}
	for i := range c.flows {
		f := &c.flows[i]
		if f.held > 0 {
			l.letGo(c, i)
			l.pipesUsed--
			l.pipesOpen.Add(-1)
		}
		if f.turn {
			f.turn = false
			l.busy = slices.DeleteFunc(l.busy, func(t turn) bool { return t.c == c })
		}
	}
	l.relays.Add(-1)
	l.next.relays.Add(1)
	l.conns[c.number] = &conn{number: c.number}
	l.free = append(l.free, l.conns[c.number])

	if !l.next.give(func(g *given) {
		g.relays = append(g.relays, c)
		l.next.open.Add(1)
		l.open.Add(-1)
	}) {
		l.relays.Add(1)
		l.next.relays.Add(-1)
		l.adopt(c)
	}
}

// given is what a loop is given by others.
type given struct {
	mu      sync.Mutex
	over    bool      // the loop has ended, and takes nothing any more
	relays  []*conn   // that another loop has handed over
	lookups []*lookup // that have ended

	rich, needy *tenant // the first has to give up a relay for the second
}

// give has add give the loop something. It fails if the loop has ended.
func (l *loop) give(add func(*given)) bool {
	g := &l.given
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over {
		return false
	}
	add(g)
	return true
}

// take deals with what the loop was given.
func (l *loop) take() {
	g := &l.given
	g.mu.Lock()
	relays, lookups := g.relays, g.lookups
	rich, needy := g.rich, g.needy
	g.relays, g.lookups, g.rich, g.needy = nil, nil, nil, nil
	g.mu.Unlock()
	for _, c := range relays {
		l.adopt(c)
	}
	for _, k := range lookups {
		l.found(k)
	}
	if rich != nil {
		l.resetOne(rich, needy)
	}
}

// adopt makes c a connection of this loop. Whatever there is to do for it epoll tells of when
// it is registered.
func (l *loop) adopt(c *conn) {
	if n := len(l.free); n > 0 {
		c.number = l.free[n-1].number
		l.free = l.free[:n-1]
		l.conns[c.number] = c
	} else {
		c.number = int32(len(l.conns))
		l.conns = append(l.conns, c)
	}
	c.begun, c.active = l.measured, l.rounds
	l.watchQuiet()
	for i := range c.flows {
		if c.flows[i].held > 0 {
			l.pipesUsed++
			l.pipesOpen.Add(1)
			l.hold(c, i)
		}
	}
	for i := range c.sockets {
		events := c.sockets[i].registered
		c.sockets[i].registered = 0
		if !l.register(c, i, events) {
			return
		}
	}
}

// done reports whether the last connection has ended, after which there are no more.
func (l *loop) done() bool {
	l.given.mu.Lock()
	defer l.given.mu.Unlock()
	l.given.over = l.open.Load() == 0
	return l.given.over
}
