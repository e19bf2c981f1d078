package main

import (
	"fmt"
	"sync"
	"sync/atomic"

	"sniproxy/hostdir"
)

// A tenant is who answers for a host: the owner of the entry that serves it. The entries of root and of
// the owner of the hosts directory are tenants each for itself. Whatever is limited for a host is limited for
// its tenant too, whatever names clients ask for.
type tenant struct {
	uid   uint32 // 0 where entry is set
	entry string // empty for a user who has all his entries together

	users  atomic.Int64 // connections and look-ups that hold this
	relays atomic.Int64

	hung      atomic.Int64 // look-ups that a loop was stuck in, and that have not ended
	untrusted atomic.Int64 // until when, by the clock of now, loops leave his look-ups to others

	// What threads do for him, under their lock.
	tasks   tally
	entries map[string]*entryTasks
	waiting []*entryTasks // those with tasks that wait

	closing closing
}

// trusted tells whether a loop may look up what is his.
func (t *tenant) trusted() bool {
	if t.hung.Load() > 0 {
		return false
	}
	until := t.untrusted.Load()
	return until == 0 || until <= now()
}

func (t *tenant) String() string {
	if t.entry != "" {
		return "the entry " + t.entry
	}
	return fmt.Sprintf("uid %d", t.uid)
}

func (t *tenant) key() tenantKey { return tenantKey{t.uid, t.entry} }

// release ends the use that [tenants.of] began.
func (t *tenant) release() { t.users.Add(-1) }

// tenants are all that have connections, or had some a while ago.
type tenants struct {
	mu    sync.Mutex
	all   map[tenantKey]*tenant
	sweep int // the number at which those of no use are looked for

	most    *tenant // the one with the most relays at that time
	counted int64
}

type tenantKey struct {
	uid   uint32
	entry string
}

const tenantsSweep = 1024

func newTenants() *tenants {
	return &tenants{all: map[tenantKey]*tenant{}, sweep: tenantsSweep}
}

// of returns the tenant of an entry, for use until it is released.
func (s *tenants) of(e hostdir.Entry) *tenant {
	if e.Administrators {
		return s.get(0, e.Name)
	}
	return s.get(e.Owner, nil)
}

func (s *tenants) get(uid uint32, entry []byte) *tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.all[tenantKey{uid, string(entry)}]
	if t == nil {
		if len(s.all) >= s.sweep {
			s.forget()
		}
		t = &tenant{uid: uid, entry: string(entry)}
		s.all[tenantKey{t.uid, t.entry}] = t
	}
	t.users.Add(1)
	return t
}

// forget removes tenants that nobody uses.
func (s *tenants) forget() {
	for key, t := range s.all {
		if t.users.Load() == 0 && t.trusted() {
			delete(s.all, key)
		}
	}
	s.sweep = max(tenantsSweep, 2*len(s.all))
}

// richest returns the tenant that has the most relays, nil if there is none. It counts anew once in
// redialPeriod: while descriptors are short it is asked for each client.
func (s *tenants) richest() *tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := now(); s.counted == 0 || t-s.counted >= int64(redialPeriod) {
		s.counted, s.most = t, nil
		for _, t := range s.all {
			if s.most == nil || t.relays.Load() > s.most.relays.Load() {
				s.most = t
			}
		}
	}
	return s.most
}

// mayLose tells whether t must give up a relay for one of needy: if he has at least two more.
func (t *tenant) mayLose(needy *tenant) bool {
	return t != nil && t != needy && t.relays.Load() >= needy.relays.Load()+2
}
