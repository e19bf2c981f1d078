package main

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Room is what descriptors there are. A part of them is for the clients that wait, and relays never take it: so whoever
// has all others cannot keep hellos from being read. When relays have all the rest, somebody makes room for a new
// one, or its client has to wait.
type room struct {
	threads *threads
	tenants *tenants
	people  population
	base    int64        // descriptors that are no connection's
	limit   atomic.Int64 // of descriptors
}

// A population knows its connections: an engine.
type population interface {
	relayed() int64 // descriptors that relays have
	others() int64  // connections that are none
}

// A roomMaker can end connections: an engine, or a loop, for those that are its own.
type roomMaker interface {
	// dropOldest drops a client that was refused, otherwise the one, other than c, that has waited longest, if that is
	// longer than age. It reports whether there was one.
	dropOldest(c *conn, age time.Duration) bool
	// resetSilent ends the relay of a tenant that has been silent for longest, if he has at least two more than
	// needy. It reports whether there is room now.
	resetSilent(rich, needy *tenant) bool
}

// newRoom returns the room beside own descriptors.
func newRoom(own int64, people population, threads *threads, tenants *tenants) *room {
	r := &room{people: people, threads: threads, tenants: tenants, base: own}
	r.limit.Store(openFiles())
	return r
}

// crowded tells whether there is no room for two descriptors more that a relay takes.
func (r *room) crowded() bool {
	if r.fits(r.limit.Load()) {
		return false
	}
	r.limit.Store(openFiles()) // somebody may have raised it
	return !r.fits(r.limit.Load())
}

func (r *room) fits(limit int64) bool {
	reserve := reserveOf(limit)
	used := r.base + r.threads.descriptors() + r.people.relayed() + max(0, r.people.others()-reserve)
	return used+2 <= limit-reserve
}

// forRelay sees to it that there is room for a relay of c, whose host is needy's. If short, the system refused a
// descriptor. It reports whether there is room now. If more clients wait than there is kept for them, the one that has
// waited longest makes room; otherwise the tenant with the most relays; otherwise nobody.
func (r *room) forRelay(by roomMaker, c *conn, needy *tenant, short bool) bool {
	for short || r.crowded() {
		age := roomWait
		if r.people.others() > reserveOf(r.limit.Load()) {
			age = 0
		}
		if (age > 0 && !short || !by.dropOldest(c, age)) && (needy == nil || !by.resetSilent(r.tenants.richest(), needy)) {
			return false
		}
		short = false
	}
	return true
}

// openFiles returns the limit of descriptors.
func openFiles() int64 {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || uint64(l.Cur) > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(l.Cur)
}

// reserveOf returns how many descriptors of a limit relays never take.
func reserveOf(limit int64) int64 { return max(limit/reserveParts, reserveLeast) }

// ownDescriptors returns how many descriptors the program will have itself when it serves: besides those that are open
// hostdir opens one for the hosts directory, and the engine some.
func ownDescriptors(listeners int) int64 {
	own := 1 + engineDescriptors(listeners)
	// Go's runtime opens two for a poller of its own when the first timer is set, and ends the program if none are
	// left then: so now, while there are some.
	if inUse, limit := descriptors(1024); inUse+2 > limit {
		own += 2
	} else {
		time.AfterFunc(time.Hour, func() {}).Stop()
	}
	inUse, _ := descriptors(1024)
	return inUse + own
}

// checkOpenFiles fails if the limit of descriptors does not allow for a single connection, where the program has own
// of them, and some are kept for new clients.
func checkOpenFiles(own, kept int64) error {
	if limit, least := openFiles(), own+kept+2; limit < least {
		return fmt.Errorf("the limit of open files (ulimit -n, LimitNOFILE=) is %d, too low: at least %d descriptors are needed", limit, least)
	}
	return nil
}
