package shares

import (
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
)

// Room knows how many descriptors there are. Relays never take a part of them, the reserve: so
// whoever has all others cannot keep ClientHellos from being read. When relays have all the rest,
// somebody makes room for a new one, or its client has to wait.
type Room struct {
	counters report.All
	relays   atomic.Int64
	threads  *Threads
	tenants  *Tenants
	own      int64        // descriptors that are no connection's
	single   bool         // one connection is served, and needs no reserve
	limit    atomic.Int64 // of descriptors

	senders   atomic.Int64 // sockets of senders
	closeIdle func()       // closes those that have nothing under way
	closed    atomic.Int64 // when that was done last, by the clock of limits
}

// A RoomMaker can end connections: an engine, or an event loop for its own.
type RoomMaker interface {
	// DropOldest drops a client that was refused, or else the one that has waited longest, if it
	// has waited longer than age. It does not drop the client that the room is for. It reports
	// whether there was one.
	DropOldest(age time.Duration) bool
	// ResetSilent resets the relay of rich that has been silent longest, if he may lose one for
	// needy. It reports whether there is room now.
	ResetSilent(rich, needy *Tenant) bool
}

// used returns how many descriptors are in use, or may be at any moment. Relays have two.
func (r *Room) used() int64 {
	return r.own + r.senders.Load() + r.threads.descriptors() + r.counters.Open() + r.relays.Load()
}

// notRelays returns how many connections are no relays: those that wait, and those refused.
func (r *Room) notRelays() int64 { return r.counters.Open() - r.relays.Load() }

// fits tells whether one of the clients that wait can have a relay, which takes two descriptors.
func (r *Room) fits() bool {
	within := func(limit int64) bool {
		reserve := r.reserve(limit)
		// The reserve is for those that wait. One of them is to have a relay.
		return r.used()-min(r.notRelays(), reserve+1)+2 <= limit-reserve
	}
	if within(r.limit.Load()) {
		return true
	}
	r.limit.Store(descriptors.Limit()) // somebody may have raised it
	return within(r.limit.Load())
}

// ForRelay makes room for a relay to a host of needy, unless there is some. If short, the system
// has just refused a descriptor, whatever the numbers say. It reports whether there is room now.
//
// Idle sockets of senders go first. If more clients wait than the reserve holds, those that have
// waited longest make room. Otherwise the tenant with the most relays gives up one, at most one for
// each call: a backend that closes slowly must not cost him more.
func (r *Room) ForRelay(by RoomMaker, needy *Tenant, short bool) bool {
	for reset := false; short || !r.fits(); short = false {
		if r.CloseIdle() {
			continue
		}
		tooMany := r.notRelays() > r.reserve(r.limit.Load())
		switch {
		case tooMany && by.DropOldest(0):
		case !tooMany && short && by.DropOldest(limits.RoomWait):
		case !reset && by.ResetSilent(r.tenants.richest(), needy):
			reset = true
		default:
			return false
		}
	}
	return true
}

// CloseIdle closes idle sockets of senders, at most once in limits.Redial: while descriptors are
// short it is called for each client. It reports whether there were any.
func (r *Room) CloseIdle() bool {
	before, now := r.senders.Load(), limits.Now()
	if last := r.closed.Load(); before == 0 || now-last < int64(limits.Redial) || !r.closed.CompareAndSwap(last, now) {
		return false
	}
	r.closeIdle()
	return r.senders.Load() < before
}

// Full tells whether fewer than spare descriptors are left, for anything.
func (r *Room) Full(spare int64) bool { return r.used()+spare > r.limit.Load() }

// reserve returns how many descriptors of a limit relays never take.
func (r *Room) reserve(limit int64) int64 {
	if r.single {
		return 0
	}
	return max(limit/limits.ReserveParts, limits.ReserveLeast)
}
