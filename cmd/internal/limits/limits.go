// Package limits says what a connection may take, and what a host of a tenant may take at once. Both
// engines keep to it.
package limits

import "time"

const (
	// Hello is from accept to the beginning of the relay: within it the hello must be complete
	// and the backend connected. It is one deadline, never extended.
	Hello = 10 * time.Second

	// A refused client has Linger to read its alert and close, and may have sent LingerSize
	// bytes more by then: closing a socket with unread input sends a reset, which can overtake
	// the alert.
	Linger     = 2 * time.Second
	LingerSize = 1 << 20

	// Drain is for connections that are open when the program is stopped, Cut for ending those
	// that are open after it.
	Drain = 10 * time.Second
	Cut   = 100 * time.Millisecond

	// Clients that wait for room, in a backend's backlog or for a descriptor, try again every
	// Redial: one for each entry, and then the next while that succeeds.
	Redial = 8 * time.Millisecond

	// AcceptPause is how long accept rests after a failure that does not pass by itself.
	AcceptPause = 100 * time.Millisecond
)

// HalfClosed is how long a relay may be silent in one direction when the other has ended. Tests
// shorten it.
var HalfClosed = time.Hour

var start = time.Now()

// Now is the clock that limits go by: nanoseconds since the start of the program.
func Now() int64 { return int64(time.Since(start)) }
