package shares

import (
	"time"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/limits"
)

// Relays never take a part of the descriptors, the reserve: so whoever has all others cannot keep
// ClientHellos from being read. When relays have all the rest, somebody makes room for a new one,
// or its client has to wait.

// A RoomMaker is the connection that room is for. It can end others.
type RoomMaker interface {
	// DropOldest drops a client that was refused, or else the one that has waited longest, if it
	// has waited longer than age. It does not drop the client that the room is for. It reports
	// whether there was one.
	DropOldest(age time.Duration) bool
	// ResetSilent resets the relay of rich that has been silent longest, if he may lose one for
	// needy. It reports whether there is room now.
	ResetSilent(rich, needy *Tenant) bool
}

// used returns how many descriptors are in use, or may be at any moment, and how many connections
// are no relays: those that wait, and those refused.
func (s *Shares) used() (descriptors, notRelays int64) {
	relays := s.relays.Load()
	notRelays = s.counters.Open() - relays
	return s.own + s.senders.Load() + s.Threads.descriptors() + 2*relays + notRelays, notRelays
}

// fits tells whether one of the clients that wait can have a relay, which takes two descriptors.
func (s *Shares) fits() bool {
	used, notRelays := s.used()
	within := func(limit int64) bool {
		reserve := s.reserve(limit)
		// The reserve is for those that wait. One of them is to have a relay.
		return used-min(notRelays, reserve+1)+2 <= limit-reserve
	}
	if within(s.limit.Load()) {
		return true
	}
	s.limit.Store(descriptors.Limit()) // somebody may have raised it
	return within(s.limit.Load())
}

// RoomForRelay makes room for a relay to a host of needy, unless there is some. If short, the
// system has just refused a descriptor, whatever the numbers say. It reports whether there is room
// now.
//
// Idle sockets of senders go first. If more clients wait than the reserve holds, those that have
// waited longest make room. Otherwise the tenant with the most relays gives up one, at most one for
// each call: a backend that closes slowly must not cost him more.
func (s *Shares) RoomForRelay(by RoomMaker, needy *Tenant, short bool) bool {
	for reset := false; short || !s.fits(); short = false {
		if s.CloseIdle() {
			continue
		}
		_, notRelays := s.used()
		tooMany := notRelays > s.reserve(s.limit.Load())
		switch {
		case tooMany && by.DropOldest(0):
		case !tooMany && short && by.DropOldest(limits.RoomWait):
		case !reset && by.ResetSilent(s.Tenants.richest(), needy):
			reset = true
		default:
			return false
		}
	}
	return true
}

// CloseIdle closes idle sockets of senders, at most once in limits.Redial: while descriptors are
// short it is called for each client. It reports whether there were any.
func (s *Shares) CloseIdle() bool {
	before, now := s.senders.Load(), limits.Now()
	if last := s.idle.Load(); before == 0 || now-last < int64(limits.Redial) || !s.idle.CompareAndSwap(last, now) {
		return false
	}
	s.sweep(0)
	return s.senders.Load() < before
}

// Full tells whether fewer than spare descriptors are left, for anything.
func (s *Shares) Full(spare int64) bool {
	used, _ := s.used()
	return used+spare > s.limit.Load()
}

// reserve returns how many descriptors of a limit relays never take.
func (s *Shares) reserve(limit int64) int64 {
	if s.single {
		return 0
	}
	return max(limit/limits.ReserveParts, limits.ReserveLeast)
}
