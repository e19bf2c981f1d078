package shares

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
)

// A Tenant is the owner of entries in the hosts directory. Each entry of root, or of the owner of
// the hosts directory, is a tenant by itself.
type Tenant struct {
	Key
	relays atomic.Int64
	users  atomic.Int64 // connections and look-ups that hold this

	hung      atomic.Int64 // threads that were left behind with a look-up
	untrusted atomic.Int64 // until when he is not trusted, by the clock of limits

	// What threads do for him, under their lock.
	tasks   group
	entries map[string]*group // nil before his first task

	closing   closing
	sender    sender
	datagrams datagrams
}

// Trusted tells whether an event loop may look up what is his.
func (t *Tenant) Trusted() bool {
	if t.hung.Load() > 0 {
		return false
	}
	until := t.untrusted.Load()
	return until == 0 || until <= limits.Now()
}

// String names him in the log.
func (t *Tenant) String() string {
	if t.entry != "" {
		return "the entry " + t.entry
	}
	return fmt.Sprintf("uid %d", t.User)
}

// A Key tells tenants, or entries of tenants, apart.
type Key struct {
	User  uint32 // the owner of the entries, 0 where each entry is a tenant by itself
	entry string // empty for a user, who has all his entries together
}

// EntryKey returns the key of an entry of his.
func (t *Tenant) EntryKey(entry []byte) Key { return Key{t.User, string(entry)} }

// Release ends the use that [Tenants.Of] or [Tenants.Unknown] began.
func (t *Tenant) Release() { t.users.Add(-1) }

// Hold puts t, or nil, in the place of a tenant that was held there, and ends the use of that.
func Hold(at **Tenant, t *Tenant) {
	if *at != nil {
		(*at).Release()
	}
	*at = t
}

// MayLose tells whether he must give up a relay for one of needy: if he has at least two more.
func (t *Tenant) MayLose(needy *Tenant) bool {
	return t != nil && t != needy && t.relays.Load() >= needy.relays.Load()+2
}

// Tenants are all that have connections, or had some a while ago.
type Tenants struct {
	mu    sync.Mutex
	all   map[Key]*Tenant
	sweep int // the number at which those that nobody uses are looked for

	most    *Tenant // the one with the most relays when they were counted last
	counted int64
}

// sweepLeast is how many tenants there may be before anybody looks for those that nobody uses.
const sweepLeast = 1024

func newTenants() *Tenants {
	return &Tenants{all: map[Key]*Tenant{}, sweep: sweepLeast}
}

// Of returns the tenant of an entry, for use until it is released.
func (s *Tenants) Of(e hostdir.Entry) *Tenant {
	if e.Administrators {
		return s.get(0, e.Name)
	}
	return s.get(e.Owner, nil)
}

// Unknown returns a tenant for a name whose entry is not known, or for all such names if it is nil,
// for use until it is released.
func (s *Tenants) Unknown(name []byte) *Tenant { return s.get(0, name) }

func (s *Tenants) get(uid uint32, entry []byte) *Tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.all[Key{uid, string(entry)}]
	if t == nil {
		if len(s.all) >= s.sweep {
			s.forget()
		}
		t = &Tenant{Key: Key{uid, string(entry)}}
		s.all[t.Key] = t
	}
	t.users.Add(1)
	return t
}

func (s *Tenants) list() []*Tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.all))
}

// forget removes tenants that nobody uses.
func (s *Tenants) forget() {
	for key, t := range s.all {
		if t.users.Load() == 0 && t.Trusted() && !t.sender.inUse() {
			delete(s.all, key)
		}
	}
	s.sweep = max(sweepLeast, 2*len(s.all))
}

// richest returns the tenant with the most relays, nil if there is none. It counts at most once in
// limits.Redial: while descriptors are short it is called for each client.
func (s *Tenants) richest() *Tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := limits.Now(); s.counted == 0 || now-s.counted >= int64(limits.Redial) {
		s.counted, s.most = now, nil
		for _, t := range s.all {
			if s.most == nil || t.relays.Load() > s.most.relays.Load() {
				s.most = t
			}
		}
	}
	return s.most
}
