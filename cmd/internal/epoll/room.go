//go:build linux

package epoll

import (
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
	"sniproxy/hostdir"
)

// Redials are the clients that wait for room, in lines: one for each entry whose backend's backlog
// is full or whose directory is being exchanged, and one for each tenant that gets no descriptor.
// (An entry of the administrator's is a tenant by itself, so for it these two are one.) After a
// pause the first client of a line tries again, and then the next while that helps.
type redials struct {
	lines []*line
	of    map[shares.Key]*line
	users map[uint32]int // how many of the lines are a user's
	next  int            // the line to go on with
	due   int64          // when the first of them is due, 0 if nobody waits
}

type line struct {
	key     shares.Key
	clients []*pending // some of them may have left
	due     int64
	pause   time.Duration // grows from least to limits.Redial while trying does not help
	least   time.Duration
}

// first returns the first client in a line, nil if there is none.
func (q *line) first() *pending {
	for len(q.clients) > 0 {
		if p := q.clients[0]; p.line == q {
			return p
		}
		q.clients[0] = nil
		q.clients = q.clients[1:]
	}
	return nil
}

// turn tells whether c may try to connect to an entry of t now: nobody else waits for it, or c is
// the first of those who do.
func (w *redials) turn(t *shares.Tenant, entry []byte, c *conn) bool {
	if len(w.lines) == 0 {
		return true
	}
	q := w.of[t.EntryKey(entry)]
	if q == nil {
		return true
	}
	p := q.first()
	return p == nil || p.conn == c
}

// redialLater has c try again later to connect to the backend of an entry, since err is in the way
// now.
func (c *conn) redialLater(err error, entry, name, hello []byte) {
	p := c.wait(redialing, name, hello)
	p.err = err
	key := c.tenant.Key
	if err != hostdir.NoRoom {
		key = c.tenant.EntryKey(entry)
	}
	w := &c.loop.redials
	q := w.of[key]
	if q == nil {
		pause := limits.Redial
		if err == hostdir.BacklogFull && c.tenant.HasDatagrams() {
			pause = limits.RedialHandOver
		}
		q = &line{key: key, due: limits.Now() + int64(pause), pause: pause, least: pause}
		if w.of == nil {
			w.of, w.users = map[shares.Key]*line{}, map[uint32]int{}
		}
		w.of[key] = q
		w.users[key.User]++
		w.lines = append(w.lines, q)
	}
	if p.line != q {
		p.line = q
		q.clients = append(q.clients, p)
	}
	if w.due == 0 || q.due < w.due {
		w.due = q.due
	}
}

// redial lets those who wait try again: some now, and the others when everything else had its turn.
func (l *loop) redial() {
	w, now := &l.redials, limits.Now()
	for n := 0; w.next < len(w.lines); {
		q := w.lines[w.next]
		p := q.first()
		switch {
		case p == nil:
			w.remove(w.next)
			continue
		case q.due > now:
			w.next++
			continue
		case n >= redialMost:
			w.due = now
			return
		case p.conn.phase == redialing: // otherwise another thread tries, and found goes on
			p.conn.dial(p.name, p.hello)
		}
		n++
		if q.first() != p {
			q.pause = q.least
			continue
		}
		q.pause = min(2*q.pause, limits.Redial)
		q.due = now + int64(max(q.pause, w.share(q)))
		w.next++
	}
	w.next, w.due = 0, 0
	for _, q := range w.lines {
		if w.due == 0 || q.due < w.due {
			w.due = q.due
		}
	}
}

// share returns the pause that leaves a user with many lines no more tries than redialSpacing
// allows. The administrator's entries are tenants by themselves.
func (w *redials) share(q *line) time.Duration {
	user := q.key.User
	if user == 0 {
		return 0
	}
	return time.Duration(w.users[user]) * redialSpacing
}

// remove removes a line that nobody waits in. The last one takes its place.
func (w *redials) remove(i int) {
	key := w.lines[i].key
	delete(w.of, key)
	if w.users[key.User]--; w.users[key.User] == 0 {
		delete(w.users, key.User)
	}
	last := len(w.lines) - 1
	w.lines[i], w.lines[last] = w.lines[last], nil
	w.lines = w.lines[:last]
}

// DropOldest makes room for c, as [shares.RoomMaker] says.
func (c *conn) DropOldest(age time.Duration) bool { return c.loop.dropOldest(c, age) }

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

// ResetSilent makes room for c, as [shares.RoomMaker] says. If none of rich's relays is in this
// loop, the others are asked one after the other, and that takes a moment.
func (c *conn) ResetSilent(rich, needy *shares.Tenant) bool {
	return c.loop.lose(loss{rich, needy, len(c.loop.engine.loops)})
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
	silent.abort(report.ResetForRoom)
	return true
}
