// Package shares says what each tenant gets of what all need: threads that may wait for a file
// system, descriptors, and relays. Both engines keep to it, so that no tenant can use up what
// others need.
//
// A tenant is who answers for a host: the owner of the entry that serves it. Whatever is limited
// for a host is limited for its tenant too, whatever names clients ask for.
package shares

import (
	"sync/atomic"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/report"
	"sniproxy/hostdir"
)

// Shares is what an engine works with.
type Shares struct {
	Tenants *Tenants
	Threads *Threads

	counters report.All   // of connections
	own      int64        // descriptors that are no connection's
	single   bool         // one connection is served, and needs no reserve
	limit    atomic.Int64 // of descriptors
	relays   atomic.Int64

	senders  atomic.Int64 // sockets of senders
	idle     atomic.Int64 // when those with nothing under way were closed for want of room, by the clock of limits
	sweeping atomic.Bool  // they are to be closed after a while
}

// New returns the shares of an engine. Own is how many descriptors the program has besides those of
// connections, which are those in the counters. Single tells whether it serves just one connection.
func New(hosts *hostdir.Hosts, own int64, single bool, counters report.All) *Shares {
	s := &Shares{Tenants: newTenants(), Threads: newThreads(hosts), counters: counters, own: own, single: single}
	s.limit.Store(descriptors.Limit())
	return s
}

// CountRelays counts n relays more of a tenant's.
func (s *Shares) CountRelays(t *Tenant, n int64) {
	t.relays.Add(n)
	s.relays.Add(n)
}

// A Query is a look-up that a thread makes, and what comes of it. Its task is that of the entry
// that was found without waiting, if any.
type Query struct {
	Task
	Name []byte

	Owner   *Tenant // of the entry that served the name, for use until it is released; nil if that was not found anew
	Found   string  // its name, or the entry of the task
	Backend hostdir.Backend
	Err     error
}

// Ask has a thread look the name up and connect to the backend, and then calls done. That is also
// called when the query is given up.
func (s *Shares) Ask(q *Query, done func()) {
	s.ask(q, done, func(d *hostdir.Dialer) { s.Answer(q, d) })
}

// AskEntry is like Ask, but has the thread only find the entry and its owner, without a look at
// where that leads: somebody may keep the hosts directory locked.
func (s *Shares) AskEntry(q *Query, done func()) {
	q.Backend.FD = -1
	s.ask(q, done, func(*hostdir.Dialer) {
		var entry hostdir.Entry
		if entry, _, q.Err = s.Threads.hosts.Find(q.Name, true); q.Err == nil {
			q.Owner, q.Found = s.Tenants.Of(entry), string(entry.Name)
		}
	})
}

func (s *Shares) ask(q *Query, done func(), answer func(*hostdir.Dialer)) {
	q.Do = func(d *hostdir.Dialer) {
		answer(d)
		done()
	}
	q.GiveUp = func() {
		q.Err = report.ErrLookups
		done()
	}
	s.Threads.Start(&q.Task)
}

// Answer looks the name up and connects to the backend, and waits for whatever there is to wait
// for.
func (s *Shares) Answer(q *Query, d *hostdir.Dialer) {
	var entry hostdir.Entry
	if entry, q.Err = d.Find(q.Name, true); q.Err == nil {
		s.AnswerFound(q, d, entry)
	}
}

// AnswerFound does so for the entry that the dialer has found.
func (s *Shares) AnswerFound(q *Query, d *hostdir.Dialer, entry hostdir.Entry) {
	q.Owner, q.Found = s.Tenants.Of(entry), string(entry.Name)
	if q.Owner.Clogged() {
		q.Err = report.ErrClogged
		return
	}
	q.Backend, q.Err = s.Connect(d, q.Owner)
}

// Connect connects to the backend of the entry that was found, which is a tenant's. It waits for
// whatever there is to wait for. If the backend is a datagram socket, it does so with a socket that
// is used once: see [Shares.Sent].
func (s *Shares) Connect(d *hostdir.Dialer, t *Tenant) (hostdir.Backend, error) {
	b, err := d.Connect(true)
	if err != hostdir.Datagram {
		return b, err
	}
	if b, err = s.connectOnce(d, t); err != hostdir.Stream {
		return b, err
	}
	// It was exchanged just now, or is neither.
	if b, err = d.Connect(true); err == hostdir.Datagram {
		err = hostdir.NotStreamSocket()
	}
	return b, err
}

// Settle remembers what kind of socket the entry has. A relay takes room, which nobody has made if
// a datagram socket was expected: then that is done now.
func (s *Shares) Settle(q *Query, by RoomMaker) {
	datagram := q.Backend.Datagram
	if q.Err != nil || q.Task.Tenant.HasDatagram([]byte(q.Entry)) == datagram {
		return
	}
	q.whose().SetDatagram([]byte(q.Found), datagram) // the owner may be another one by now
	if !datagram && !s.RoomForRelay(by, q.whose(), false) {
		q.whose().CloseAway(s.Threads, q.Backend.FD)
		q.Err = hostdir.NoRoom
	}
}

// Discard is for a query that nobody waits for any more.
func (s *Shares) Discard(q *Query) {
	switch {
	case q.Err != nil, q.Backend.FD < 0:
	case q.Backend.Datagram:
		s.Sent(q.whose(), q.Backend.FD, false)
	default:
		q.whose().CloseAway(s.Threads, q.Backend.FD)
	}
	if q.Owner != nil {
		q.Owner.Release()
	}
}

// whose returns the tenant whose backend it is.
func (q *Query) whose() *Tenant {
	if q.Owner != nil {
		return q.Owner
	}
	return q.Task.Tenant
}
