package main

import "time"

// What a connection may take.
const (
	// helloTimeout is from accept to the beginning of the relay, for the hello to be
	// complete and the backend to be connected. It is one deadline, never extended.
	helloTimeout = 10 * time.Second

	// A refused client has lingerTimeout to read its alert and close, and may have
	// sent lingerSize bytes more by then: closing a socket with unread input sends a
	// reset, which can overtake the alert.
	lingerTimeout = 2 * time.Second
	lingerSize    = 1 << 20

	// drainTimeout is for connections that are open when the program is stopped.
	drainTimeout = 10 * time.Second

	// cutTimeout is for ending those that are open after that.
	cutTimeout = 100 * time.Millisecond

	// A connection to a backend whose backlog is full is tried again after
	// redialMin, then after twice as long each time, but at most redialMax.
	redialMin = time.Millisecond
	redialMax = 64 * time.Millisecond

	// Look-ups that may wait for a file system other than that of the hosts directory: so
	// many are made at once in all and of one host, and so long others wait for their turn.
	lookupsMost    = 64
	lookupsOfHost  = 4
	lookupPatience = 500 * time.Millisecond

	// A connection of which one direction has ended is ended when the other has not moved a
	// byte for halfClosedTimeout; that is checked quietChecks times within it.
	halfClosedTimeout = time.Hour
	quietChecks       = 8

	// acceptPause is how long accept rests after a failure that does not pass by
	// itself, unless a connection ends before.
	acceptPause = 100 * time.Millisecond
)

// Keepalive, which sniproxy-rs does not set, finds clients that vanished without a word:
// after keepaliveIdle of silence they are probed every keepaliveInterval and given up after
// keepaliveCount probes. The first is long enough not to wake up sleeping phones all the
// time and shorter than what middleboxes commonly remember a connection for.
const (
	keepaliveIdle     = 4 * time.Minute
	keepaliveInterval = 30 * time.Second
	keepaliveCount    = 4
)

// halfClosed is halfClosedTimeout. Tests shorten it.
var halfClosed = halfClosedTimeout
