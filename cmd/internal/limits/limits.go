// Package limits says what a connection may take, and what each tenant may take of what all need.
// Both engines keep to it.
package limits

import "time"

// What a connection may take.
const (
	// Hello is from accept to the beginning of the relay: within it the ClientHello must be
	// complete and the backend connected. It is one deadline, never extended.
	Hello = 10 * time.Second

	// A refused client has Linger to read its alert and close, and may have sent LingerSize bytes
	// more by then: closing a socket with unread input sends a reset, which can overtake the alert.
	Linger     = 2 * time.Second
	LingerSize = 1 << 20

	// Drain is for connections that are open when the program is stopped, Cut for ending those
	// that are open after it.
	Drain = 10 * time.Second
	Cut   = 100 * time.Millisecond

	// Clients that wait for room, in a backend's backlog or for a descriptor, try again every
	// Redial: one for each entry, and then the next while that succeeds.
	Redial = 8 * time.Millisecond

	// RedialHandOver is the first pause where a datagram socket has no room, which is short: its
	// queue is, too. It doubles up to Redial while it does not help. Who comes meanwhile does not
	// try, but waits behind the others.
	RedialHandOver = 250 * time.Microsecond

	// AcceptPause is how long accept rests after a failure that does not pass by itself.
	AcceptPause = 100 * time.Millisecond

	halfClosed = time.Hour
)

// HalfClosed is how long a relay may be silent in one direction when the other has ended. Tests
// shorten it.
var HalfClosed = halfClosed

// Keepalive, which sniproxy-rs does not set, finds clients that vanished without a word: after
// KeepaliveIdle of silence they are probed every KeepaliveInterval and given up after
// KeepaliveCount probes. The first is long enough not to wake up sleeping phones all the time and
// shorter than what middleboxes commonly remember a connection for: the load balancers of a large
// cloud forget it after exactly four minutes.
const (
	KeepaliveIdle     = 3 * time.Minute
	KeepaliveInterval = 30 * time.Second
	KeepaliveCount    = 4
)

// What each tenant may take.
const (
	// So many tasks that may wait for a file system run at once: in all, for one tenant, and for
	// one entry of the hosts directory. One that waits for its turn is given up if none of those
	// before it ends for TaskPatience.
	Tasks         = 64
	TasksOfTenant = 16
	TasksOfEntry  = 4
	TaskPatience  = 2 * time.Second

	// A tenant for whom more than Closing descriptors wait to be closed gets no connection more.
	Closing = 256

	// A tenant has at most UnderWay connections under way to backends that they are handed over to,
	// and at most one of UnderWayParts of the descriptors.
	UnderWay      = 256
	UnderWayParts = 4

	// Relays never take one of ReserveParts of the descriptors, and never the last ReserveLeast: so
	// ClientHellos can be read, whoever has all others.
	ReserveParts = 8
	ReserveLeast = 16

	// A client that has waited longer than RoomWait for its relay may be dropped to make room.
	RoomWait = time.Second

	// Distrust is how long no event loop looks up what is a tenant's, after a look-up for him that
	// hung has ended.
	Distrust = time.Minute
)

var start = time.Now()

// Now is the clock that limits go by: nanoseconds since the start of the program.
func Now() int64 { return int64(time.Since(start)) }
