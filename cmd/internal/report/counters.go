package report

import (
	"fmt"
	"strings"
	"sync/atomic"
)

// Counters count what has happened since the start. Each loop of the engine for Linux has its own,
// which others only read; the other engine has one for all connections.
//
// Count a connection in Accepted first and in Ended last: [All] reads them in the opposite order,
// so it never says that more connections wait than are open.
type Counters struct {
	Accepted, Ended atomic.Int64
	Waiting         atomic.Int64      // connections that are neither relays nor refused, now
	Refused         [256]atomic.Int64 // by alert
	Shut            atomic.Int64      // refused without an alert, since there was no PROXY header
	Empty           atomic.Int64      // clients that have ended without having sent a byte
	Dropped         atomic.Int64      // to make room
	Handed          atomic.Int64      // over to backends
	Bytes           [2]atomic.Int64   // sent on, Up and Down
}

// The ways that bytes go.
const (
	Up   = 0 // from the client to the backend
	Down = 1
)

// Traffic is how many bytes of a connection went each way.
type Traffic [2]int64

// All are the counters of all loops.
type All []*Counters

func (a All) sum(of func(*Counters) *atomic.Int64) (n int64) {
	for _, c := range a {
		n += of(c).Load()
	}
	return n
}

// Open returns how many connections there are.
func (a All) Open() int64 {
	ended := a.sum(func(c *Counters) *atomic.Int64 { return &c.Ended })
	return a.accepted() - ended
}

func (a All) accepted() int64 {
	return a.sum(func(c *Counters) *atomic.Int64 { return &c.Accepted })
}

// Handed returns how many connections were handed over.
func (a All) Handed() int64 {
	return a.sum(func(c *Counters) *atomic.Int64 { return &c.Handed })
}

// Empty returns how many clients have ended without having sent a byte.
func (a All) Empty() int64 { return a.sum(func(c *Counters) *atomic.Int64 { return &c.Empty }) }

// String returns what SIGUSR1 asks for. Programs read it, too: names and places stay.
func (a All) String() string {
	ended := a.sum(func(c *Counters) *atomic.Int64 { return &c.Ended })
	waiting := a.sum(func(c *Counters) *atomic.Int64 { return &c.Waiting })
	dropped := a.sum(func(c *Counters) *atomic.Int64 { return &c.Dropped })
	var refused int64
	var alerts []string
	for i := range 256 {
		if n := a.sum(func(c *Counters) *atomic.Int64 { return &c.Refused[i] }); n > 0 {
			refused += n
			alerts = append(alerts, fmt.Sprintf("%d: %d", i, n))
		}
	}
	if n := a.sum(func(c *Counters) *atomic.Int64 { return &c.Shut }); n > 0 {
		refused += n
		alerts = append(alerts, fmt.Sprintf("none: %d", n))
	}
	var byAlert string
	if refused > 0 {
		byAlert = fmt.Sprintf(" (%s)", strings.Join(alerts, ", "))
	}
	up := a.sum(func(c *Counters) *atomic.Int64 { return &c.Bytes[Up] })
	down := a.sum(func(c *Counters) *atomic.Int64 { return &c.Bytes[Down] })
	accepted := a.accepted()
	return fmt.Sprintf("accepted %d, open %d, waiting %d, refused %d%s, dropped %d, bytes up %d, bytes down %d",
		accepted, accepted-ended, waiting, refused, byAlert, dropped, up, down)
}
