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

	// Connections that wait for room in a backend's backlog are tried again every redialPeriod: one of
	// each entry, and then the next while that succeeds, but redialTurn at the most before others have their turn.
	redialPeriod = 8 * time.Millisecond
	redialTurn   = 32

	// So many tasks that may wait for a file system are under way at once: in all, for one tenant, and for one entry of
	// the hosts directory. One that waits for its turn is given up if none of the others ends for taskPatience.
	tasksMost     = 64
	tasksOfTenant = 16
	tasksOfEntry  = 4
	taskPatience  = 500 * time.Millisecond

	// threadsIdle threads stay when they have no task. When the system has no room for threadsRoom threads more, it is asked
	// again after threadPause: some of them are for Go's runtime.
	threadsIdle = 2
	threadPause = 500 * time.Millisecond
	threadsRoom = 8

	// A tenant of whom more than closingMost descriptors wait to be closed gets no connection more.
	closingMost = 256

	// The part of the descriptors that relays never take is one of reserveParts, but at least reserveLeast. So hellos
	// can be read, whoever has all others. Clients that have waited for longer than roomWait for their relay make room
	// for another one's.
	reserveParts = 8
	reserveLeast = 16
	roomWait     = time.Second

	// logAllPeriod is how often it is found out at the most whether all connections are logged. So many lines about
	// connections that have ended meanwhile wait for the answer.
	logAllPeriod = time.Second
	logAllLines  = 1000

	// logAllPatience is how long a program that serves one connection waits for that.
	logAllPatience = 100 * time.Millisecond

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
