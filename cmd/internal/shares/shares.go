// Package shares says what each tenant gets of what all need: threads that may wait for a file
// system, descriptors, and relays. Both engines keep to it, so that no tenant can use up what
// others need.
//
// A tenant is who answers for a host: the owner of the entry that serves it. Whatever is limited
// for a host is limited for its tenant too, whatever names clients ask for.
package shares

import (
	"sync/atomic"

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
// connections, and single tells whether it serves just one connection.
func New(hosts *hostdir.Hosts, own int64, single bool, conns Connections) *Shares {
	tenants, threads := newTenants(), newThreads(hosts)
	s := &Shares{Tenants: tenants, Threads: threads, Room: newRoom(own, single, conns, threads, tenants)}
	s.Room.closeIdle = func() { s.sweep(0) }
	return s
}

// Reach looks a host up and connects to its backend, and waits for whatever there is to wait for.
// It returns the tenant as well, for use until it is released, nil if no entry was found.
func (s *Shares) Reach(d *hostdir.Dialer, name []byte) (b hostdir.Backend, t *Tenant, err error) {
	entry, err := d.Find(name, true)
	if err != nil {
		return hostdir.Backend{}, nil, err
	}
	t = s.Tenants.Of(entry)
	b, err = s.Connect(d, t)
	return b, t, err
}

// Connect connects to the backend of the entry that was found, which is a tenant's. It waits for
// whatever there is to wait for. If the backend is a datagram socket, see [Shares.ConnectOnce].
func (s *Shares) Connect(d *hostdir.Dialer, t *Tenant) (hostdir.Backend, error) {
	b, err := d.Connect(true)
	if err != hostdir.Datagram {
		return b, err
	}
	if b, err = s.ConnectOnce(d, t); err != hostdir.Stream {
		return b, err
	}
	// It was exchanged just now, or is neither.
	if b, err = d.Connect(true); err == hostdir.Datagram {
		err = hostdir.NotStreamSocket()
	}
	return b, err
}
