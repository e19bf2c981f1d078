//go:build linux

package epoll

import (
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/shares"
)

// Redials are the clients that wait for room, in lines: one for each entry whose backend's backlog is
// full, and one for each tenant that gets no descriptor. Every limits.Redial the first client of each
// line tries again, and then the next while that helps.
type redials struct {
	lines []*line
	of    map[shares.Key]*line
	next  int   // the line to go on with
	due   int64 // when to try again, 0 if nobody waits
}

type line struct {
	key     shares.Key
	clients []*pending // some of them may have gone on
}

// first returns the first client in a line, nil if there is none.
func (q *line) first() *pending {
	for len(q.clients) > 0 {
		if e := q.clients[0]; e.line == q {
			return e
		}
		q.clients[0] = nil
		q.clients = q.clients[1:]
	}
	return nil
}

// redialLater has c try again later, for the reason that it was turned away for.
func (c *conn) redialLater(key shares.Key, why error, name, hello []byte) {
	e := c.wait(redialing, name, hello)
	e.why = why
	w := &c.loop.redials
	q := w.of[key]
	if q == nil {
		q = &line{key: key}
		if w.of == nil {
			w.of = map[shares.Key]*line{}
		}
		w.of[key] = q
		w.lines = append(w.lines, q)
	}
	if e.line != q {
		e.line = q
		q.clients = append(q.clients, e)
	}
	if w.due == 0 {
		w.due = limits.Now() + int64(limits.Redial)
	}
}

// redial lets those who wait try again: some now, and the others when everything else had its turn.
func (l *loop) redial() {
	w := &l.redials
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
		case n >= redialMost:
			w.due = limits.Now()
			return
		case e.conn.phase == redialing:
			e.conn.dial(e.name, e.hello)
		}
		if q.first() == e {
			w.next++
		}
	}
	w.next, w.due = 0, 0
	if len(w.lines) > 0 {
		w.due = limits.Now() + int64(limits.Redial)
	}
}
