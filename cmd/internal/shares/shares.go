// Package shares says what each tenant gets of what all need: threads that may wait for a file
// system, descriptors, and relays. Both engines keep to it, so that no tenant can use up what
// others need.
//
// A tenant is who answers for a host: the owner of the entry that serves it. Whatever is limited
// for a host is limited for its tenant too, whatever names clients ask for.
package shares

import "sniproxy/hostdir"

// Shares is what an engine works with.
type Shares struct {
	Tenants *Tenants
	Threads *Threads
	Room    *Room
}

// New returns the shares of an engine. Own is how many descriptors the program has besides those of
// connections, and single tells whether it serves just one connection.
func New(hosts *hostdir.Hosts, own int64, single bool, conns Connections) *Shares {
	tenants, threads := newTenants(), newThreads(hosts)
	return &Shares{tenants, threads, newRoom(own, single, conns, threads, tenants)}
}

// Reach looks a host up and connects to its backend, and waits for whatever there is to wait for.
// It returns the tenant as well, for use until it is released, nil if no entry was found.
func (s *Shares) Reach(d *hostdir.Dialer, name []byte) (b hostdir.Backend, t *Tenant, err error) {
	entry, err := d.Find(name, true)
	if err != nil {
		return hostdir.Backend{}, nil, err
	}
	b, err = d.Connect(true)
	return b, s.Tenants.Of(entry), err
}
