package shares

import (
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/limits"
)

// Room knows which descriptors there are. A part of them is for clients that wait, and relays never
// take it: so whoever has all others cannot keep hellos from being read. When relays have all the
// rest, somebody makes room for a new one, or its client has to wait.
type Room struct {
	conns   Connections
	threads *Threads
	tenants *Tenants
	own     int64        // descriptors that are no connection's
	limit   atomic.Int64 // of descriptors
}

// Connections count what an engine has.
type Connections interface {
	RelayDescriptors() int64 // descriptors that relays have
	Waiting() int64          // connections that are no relays
}

// A RoomMaker can end connections: an engine, or an event loop for its own.
type RoomMaker interface {
	// DropOldest drops a client that was refused, or else the one that has waited longest, if it has
	// waited longer than age. It does not drop the client that the room is for. It reports whether
	// there was one.
	DropOldest(age time.Duration) bool
	// ResetSilent resets the relay of rich that has been silent longest, if he may lose one for
	// needy. It reports whether there is room now.
	ResetSilent(rich, needy *Tenant) bool
}

func newRoom(own int64, conns Connections, threads *Threads, tenants *Tenants) *Room {
	r := &Room{conns: conns, threads: threads, tenants: tenants, own: own}
	r.limit.Store(descriptors.Limit())
	return r
}

// Crowded tells whether there is no room for two descriptors more that a relay takes.
func (r *Room) Crowded() bool {
	if r.fits(r.limit.Load()) {
		return false
	}
	r.limit.Store(descriptors.Limit()) // somebody may have raised it
	return !r.fits(r.limit.Load())
}

func (r *Room) fits(limit int64) bool {
	reserve := reserveOf(limit)
	used := r.own + r.threads.descriptors() + r.conns.RelayDescriptors() + max(0, r.conns.Waiting()-reserve)
	return used+2 <= limit-reserve
}

// ForRelay makes room for a relay to a host of needy, unless there is some. If short, the system
// refused a descriptor. It reports whether there is room now. If more clients wait than the reserve
// holds, the one that has waited longest makes room; otherwise the tenant with the most relays;
// otherwise nobody.
func (r *Room) ForRelay(by RoomMaker, needy *Tenant, short bool) bool {
	for short || r.Crowded() {
		age := limits.RoomWait
		if r.conns.Waiting() > reserveOf(r.limit.Load()) {
			age = 0
		}
		if (age > 0 && !short || !by.DropOldest(age)) && (needy == nil || !by.ResetSilent(r.tenants.richest(), needy)) {
			return false
		}
		short = false
	}
	return true
}

// Full tells whether fewer than spare descriptors are left, for anything.
func (r *Room) Full(spare int64) bool {
	return r.own+r.threads.descriptors()+r.conns.RelayDescriptors()+r.conns.Waiting()+spare > r.limit.Load()
}

// reserveOf returns how many descriptors of a limit relays never take.
func reserveOf(limit int64) int64 { return max(limit/limits.ReserveParts, limits.ReserveLeast) }
