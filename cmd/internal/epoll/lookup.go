//go:build linux

package epoll

import (
	"runtime"
	"slices"
	"sync/atomic"

	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
	"sniproxy/hostdir"
)

// A runner is a goroutine, with a thread of its own, that runs a loop and makes the look-ups of its
// connections as far as they wait for nothing. It can get stuck in one all the same: between
// looking at a socket and connecting to it, a tenant can exchange the socket for a symlink to a
// file system that does not answer. Then another runner goes on with the loop, and this one has
// just that look-up left. So all that a look-up works with is the runner's own.
type runner struct {
	dialer *hostdir.Dialer

	// Odd during a look-up. Whoever moves it from odd to even owns the loop.
	lookups atomic.Uint64
	left    chan *query // gets the look-up, if the loop went on without this runner

	name   []byte
	entry  []byte         // that serves it, once it is found
	sender int            // the tenant's, locked, while it is connected; otherwise -1
	tenant *shares.Tenant // whose the entry is, nil until then

	// For the runner that goes on with the loop.
	conn  *conn
	hello []byte
}

// newRunner returns a runner for the calling goroutine, which has its thread for good.
func newRunner(hosts *hostdir.Hosts) (*runner, error) {
	runtime.LockOSThread()
	dialer, err := hosts.NewDialer()
	if err != nil {
		return nil, err
	}
	return &runner{dialer: dialer, sender: -1, left: make(chan *query, 1)}, nil
}

// A query is one that another thread answers for a connection of a loop.
type query struct {
	shares.Query
	loop      *loop
	conn      *conn // the loop's; nil if it has ended
	entryOnly bool  // it is to find the entry, not to connect
}

// dial tries once to begin the relay. It finds the entry for the name, and so the tenant, and goes
// on with [conn.dialEntry]. Another thread does what may wait, what has no room is tried again
// later, and what fails is refused. Hello is all that was read so far, behind headroom.
//
// The goroutine may end in a look-up, and another one go on with the loop: then dial does not
// return.
func (c *conn) dial(name, hello []byte) {
	l := c.loop
	r, s := l.runner.Load(), l.engine.shares
	r.name = append(r.name[:0], name...)
	r.conn, r.hello, r.tenant, r.sender = c, hello, nil, -1

	var t *shares.Tenant
	entry, err := l.find(r)
	for {
		if err != nil && err != hostdir.NoRoom && err != hostdir.MayWait {
			c.refuse(name, err)
			return
		}
		if entry.Name == nil {
			c.askEntry(name, hello)
			return
		}
		t = s.Tenants.Of(entry)
		shares.Hold(&c.tenant, t)
		if err != hostdir.NoRoom || !s.RoomForRelay(c, t, true) {
			break
		}
		entry, err = l.find(r)
	}
	c.dialEntry(t, entry, err, name, hello)
}

// dialEntry goes on with the entry that serves the name, and the tenant whose it is: it makes room,
// and connects to the backend. The error is nil, [hostdir.MayWait] or [hostdir.NoRoom].
func (c *conn) dialEntry(t *shares.Tenant, entry hostdir.Entry, err error, name, hello []byte) {
	l, s := c.loop, c.loop.engine.shares
	r := l.runner.Load()
	datagram := t.HasDatagram(entry.Name)
	switch {
	case t.Clogged():
		c.refuse(name, report.ErrClogged)
		return
	case err == hostdir.NoRoom, !datagram && !s.RoomForRelay(c, t, false):
		c.redialLater(hostdir.NoRoom, nil, name, hello)
		return
	case datagram && !l.redials.turn(t, entry.Name, c):
		c.redialLater(hostdir.BacklogFull, entry.Name, name, hello)
		return
	case err == hostdir.MayWait, !l.mayConnect(t, entry):
		c.lookUp(t, entry.Name, name, hello)
		return
	}

	r.entry, r.tenant = entry.Name, t
	b, err := l.connect(r, datagram)
	if err == hostdir.Stream { // it is one now, which takes room
		if !s.RoomForRelay(c, t, false) {
			c.redialLater(hostdir.NoRoom, nil, name, hello)
			return
		}
		b, err = l.connect(r, false)
	}
	for err == hostdir.NoRoom && s.RoomForRelay(c, t, true) {
		b, err = l.connect(r, t.HasDatagram(entry.Name))
	}
	if err == hostdir.MayWait {
		c.lookUp(t, entry.Name, name, hello)
		return
	}
	c.dialled(entry.Name, name, hello, b, err)
}

// find finds the entry for the name of the runner. Like connect it does not return if the loop goes
// on with another runner meanwhile.
func (l *loop) find(r *runner) (hostdir.Entry, error) {
	this := r.lookups.Add(1)
	l.engine.watch.wakeUp()
	entry, err := r.dialer.Find(r.name, false)
	if !r.lookups.CompareAndSwap(this, this+1) {
		r.finish(entry, hostdir.Backend{}, err)
	}
	return entry, err
}

// connect connects to the backend of the entry that was found: to a datagram socket with the sender
// of the tenant, which is locked then. Was tells whether it was one the last time. If it is none
// now, the error is [hostdir.Stream].
func (l *loop) connect(r *runner, was bool) (b hostdir.Backend, err error) {
	s, t := l.engine.shares, r.tenant
	if !was {
		if b, err = l.connectWith(r, -1); err != hostdir.Datagram {
			return b, err
		}
	}
	sender, err := s.Sender(t)
	if err != nil {
		return hostdir.Backend{FD: -1}, err
	}
	b, err = l.connectWith(r, sender)
	if err != nil {
		s.Sent(t, sender, false)
	}
	switch {
	case err == nil && !was:
		t.SetDatagram(r.entry, true)
	case err == hostdir.Stream && was:
		t.SetDatagram(r.entry, false)
	case err == hostdir.Stream: // it was exchanged just now, or is neither
		if b, err = l.connectWith(r, -1); err == hostdir.Datagram {
			err = hostdir.NotStreamSocket()
		}
	}
	return b, err
}

// connectWith connects a datagram socket, or a new stream socket if there is none.
func (l *loop) connectWith(r *runner, sender int) (b hostdir.Backend, err error) {
	r.sender = sender
	this := r.lookups.Add(1)
	l.engine.watch.wakeUp()
	if sender < 0 {
		b, err = r.dialer.Connect(false)
	} else {
		b, err = r.dialer.ConnectDatagram(sender, false)
	}
	if !r.lookups.CompareAndSwap(this, this+1) {
		r.finish(hostdir.Entry{}, b, err)
	}
	r.sender = -1
	return b, err
}

// finish is for a runner that was left behind in a look-up, and does not return. What came of the
// look-up are entry and err, or b and err.
func (r *runner) finish(entry hostdir.Entry, b hostdir.Backend, err error) {
	q := <-r.left
	s := q.loop.engine.shares
	if r.sender >= 0 && err != nil {
		s.Sent(r.tenant, r.sender, false)
	}
	switch {
	case r.tenant == nil && err == nil: // it has found the entry
		s.AnswerFound(&q.Query, r.dialer, entry)
	case err == hostdir.MayWait:
		s.Answer(&q.Query, r.dialer)
	case err == hostdir.Datagram:
		q.Backend, q.Err = s.Connect(r.dialer, r.tenant)
	default: // it has connected, or failed
		q.Backend, q.Err = b, err
	}
	s.Threads.ComeBack(&q.Task)
	q.deliver()
	runtime.Goexit()
}

// mayConnect tells whether the loop may connect to a backend itself.
func (l *loop) mayConnect(t *shares.Tenant, entry hostdir.Entry) bool {
	switch {
	case !t.Trusted():
		return false
	case entry.Foreign && l.standby.Load() == nil:
		l.hire(l.engine.shares.Threads.Behind() <= behindMost)
		return false
	}
	return true
}

// lookUp gives the look-up to a thread that may wait.
func (c *conn) lookUp(t *shares.Tenant, entry, name, hello []byte) {
	q := c.ask(name, hello, t, string(entry))
	c.loop.engine.shares.Ask(&q.Query, q.deliver)
}

// askEntry has a thread find the entry for the name. All such look-ups are one tenant's, since
// nobody knows better yet.
func (c *conn) askEntry(name, hello []byte) {
	s := c.loop.engine.shares
	t := s.Tenants.Unknown(nil)
	shares.Hold(&c.tenant, t)
	q := c.ask(name, hello, t, string(name))
	q.entryOnly = true
	s.AskEntry(&q.Query, q.deliver)
}

// ask has a connection wait for another thread, which looks the name up.
func (c *conn) ask(name, hello []byte, t *shares.Tenant, entry string) *query {
	p := c.wait(lookingUp, name, hello)
	p.query = &query{loop: c.loop, conn: c}
	p.query.Query = shares.Query{Task: shares.Task{Tenant: t, Entry: entry}, Name: slices.Clone(name), Found: entry}
	return p.query
}

// deliver gives a query that was answered to its loop.
func (q *query) deliver() {
	if !q.loop.give(func(b *inbox) { b.queries = append(b.queries, q) }) {
		q.loop.engine.shares.Discard(&q.Query)
	}
}

// found goes on with the connection that a query was for.
func (l *loop) found(q *query) {
	c, s := q.conn, l.engine.shares
	if c == nil {
		s.Discard(&q.Query)
		return
	}
	p := c.pending
	p.query = nil
	if q.Owner != nil {
		shares.Hold(&c.tenant, q.Owner)
	}
	line := p.line
	if entry := []byte(q.Found); q.entryOnly && q.Err == nil {
		c.dialEntry(q.Owner, hostdir.Entry{Name: entry}, hostdir.MayWait, p.name, p.hello)
	} else {
		s.Settle(&q.Query, c)
		c.dialled(entry, p.name, p.hello, q.Backend, q.Err)
	}
	// It may have made room for the next one in its line.
	if line == nil {
		return
	}
	if next := line.first(); next != nil && next != p && next.conn.phase == redialing {
		next.conn.dial(next.name, next.hello)
	}
}

// dialled goes on with what came of an attempt to connect to the backend of an entry.
func (c *conn) dialled(entry, name, hello []byte, b hostdir.Backend, err error) {
	switch {
	case err == nil && b.Datagram && c.session != nil:
		c.loop.engine.shares.Sent(c.tenant, b.FD, false)
		c.refuse(name, report.ErrHidden)
	case err == nil && b.Datagram:
		c.handOver(entry, b, name, hello)
	case err == nil:
		c.begin(b, name, hello)
	case err == hostdir.Stream, err == hostdir.Datagram:
		c.redialLater(hostdir.Exchanged, entry, name, hello)
	case err == hostdir.NoRoom, err == hostdir.BacklogFull, err == hostdir.Exchanged, hostdir.FindAnew(err):
		c.redialLater(err, entry, name, hello)
	default:
		c.refuse(name, err)
	}
}
