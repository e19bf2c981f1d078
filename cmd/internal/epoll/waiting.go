//go:build !portable

package main

import "time"

// Clients wait in a line for each entry whose backend's backlog is full, and for each tenant that gets no
// descriptor. Of each line the first one tries again, every redialPeriod, and then the next while that helps.
type waiting struct {
	lines []*line
	of    map[tenantKey]*line
	next  int   // of the lines, the one to go on with
	redo  int64 // when to try again, 0 if nobody waits
}

type line struct {
	key     tenantKey
	clients []*early // some of them may have left
}

// first returns the first client in a line, nil if there is none.
func (q *line) first() *early {
	for len(q.clients) > 0 {
		if e := q.clients[0]; e.line == q {
			return e
		}
		q.clients[0] = nil
		q.clients = q.clients[1:]
	}
	return nil
}

// wait has c try again later, for the reason that it was turned away for.
func (l *loop) wait(c *conn, key tenantKey, why error, name, hello []byte) {
	l.keep(c, redialing, name, hello)
	c.early.why = why
	w := &l.waiting
	q := w.of[key]
	if q == nil {
		q = &line{key: key}
		if w.of == nil {
			w.of = map[tenantKey]*line{}
		}
		w.of[key] = q
		w.lines = append(w.lines, q)
	}
	if c.early.line != q {
		c.early.line = q
		q.clients = append(q.clients, c.early)
	}
	if w.redo == 0 {
		w.redo = now() + int64(redialPeriod)
	}
}

// redial lets those who wait try again: some now, and the others when everything else had its turn.
func (l *loop) redial() {
	w := &l.waiting
	for n := 0; w.next < len(w.lines); n++ {
		q := w.lines[w.next]
		e := q.first()
		switch {
		case e == nil:
			delete(w.of, q.key)
			last := len(w.lines) - 1
			w.lines[w.next], w.lines[last] = w.lines[last], nil
			w.lines = w.lines[:last]
			continue
		case n >= redialTurn:
			w.redo = now()
			return
		case e.conn.phase == redialing:
			l.dial(e.conn, e.name, e.hello)
		}
		if q.first() == e {
			w.next++
		}
	}
	w.next, w.redo = 0, 0
	if len(w.lines) > 0 {
		w.redo = now() + int64(redialPeriod)
	}
}

// dropOldest is for those who make room.
func (l *loop) dropOldest(c *conn, age time.Duration) bool {
	oldest := l.hellos.first
	if oldest == c && oldest != nil {
		oldest = c.next
	}
	if l.lingers.first == nil && (oldest == nil || age > 0 && now()-oldest.began <= int64(age)) {
		return false
	}
	return l.makeRoom(c)
}

// resetSilent is for those who make room. If none of rich's relays is in this loop, the others are asked, and that takes
// a moment.
func (l *loop) resetSilent(rich, needy *tenant) bool {
	if l.resetOne(rich, needy) {
		return true
	}
	for _, other := range l.engine.loops {
		if other != l && rich.mayLose(needy) && other.give(func(g *given) { g.rich, g.needy = rich, needy }) {
			other.wakeUp()
		}
	}
	return false
}

// resetOne ends the relay of rich that has been silent for longest, of those in this loop.
func (l *loop) resetOne(rich, needy *tenant) bool {
	if !rich.mayLose(needy) {
		return false
	}
	var silent *conn
	for _, c := range l.conns {
		if c.phase == relaying && c.tenant == rich && (silent == nil || c.active < silent.active) {
			silent = c
		}
	}
	if silent == nil {
		return false
	}
	complainReset(int(silent.sockets[client].fd), rich)
	l.counters.dropped.Add(1)
	l.tell(silent, resetForRoom)
	l.abort(silent)
	return true
}
