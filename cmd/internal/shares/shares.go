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
	Room    *Room

	sweeping atomic.Bool // sockets of senders are to be closed after a while
}

// New returns the shares of an engine. Own is how many descriptors the program has besides those of
// connections, which are those in the counters. Single tells whether it serves just one connection.
func New(hosts *hostdir.Hosts, own int64, single bool, counters report.All) *Shares {
	s := &Shares{Tenants: newTenants(), Threads: newThreads(hosts)}
	s.Room = &Room{counters: counters, threads: s.Threads, tenants: s.Tenants, own: own, single: single}
	s.Room.limit.Store(descriptors.Limit())
	s.Room.closeIdle = func() { s.sweep(0) }
	return s
}

// CountRelays counts n relays more of a tenant's.
func (s *Shares) CountRelays(t *Tenant, n int64) {
	t.relays.Add(n)
	s.Room.relays.Add(n)
}
