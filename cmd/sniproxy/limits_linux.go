//go:build !portable

package main

import (
	"time"

	"sniproxy/proxyproto"
)

// What a loop of the Linux engine works with.
const (
	// headroom is for a PROXY protocol header in front of what is read.
	headroom = proxyproto.MaxV2

	// A flow reads readMin bytes at once, and up to readMax when there is much to move
	// that is not spliced.
	readMin = 32 << 10
	readMax = 256 << 10

	// turnSize is how many bytes a flow may move before others have their turn.
	turnSize = 512 << 10

	// A loop uses at most maxPipes pipes of pipeSize for splice(2), so that few loops stay
	// within the 64 MiB that Linux grants a user (pipe-user-pages-soft). It keeps them until
	// it used none for pipeTimeout.
	maxPipes    = 32
	pipeSize    = 512 << 10
	pipeTimeout = time.Second

	// How busy a loop is is measured every measurePeriod. One that works for more than
	// busyMost of the time has the next one accept connections too, until it works for
	// less than busyLeast.
	measurePeriod = 10 * time.Millisecond
	busyMost      = 0.8
	busyLeast     = 0.4

	// handedMost is how many relays it hands over at once.
	handedMost = 64

	// logAllPeriod is how long a loop takes it for granted that the connections of all hosts are
	// logged, or that they are not.
	logAllPeriod = 10 * time.Millisecond

	// shortWait is how many milliseconds a loop waits for events before it lets the scheduler
	// know that it waits.
	shortWait = 10

	// lookupsIdle is how many threads for look-ups stay when there are none.
	lookupsIdle = 2

	// A loop that is at the same look-up at watchStuck checks, one every watchPeriod, gets
	// another thread: it is stuck, and has not just to wait for a processor. For distrustTime
	// after that directories of that owner are looked up elsewhere. Nobody checks after
	// watchIdle periods without a look-up.
	watchPeriod  = 25 * time.Millisecond
	watchStuck   = 4
	watchIdle    = 40
	distrustTime = time.Minute
)

// handOverFrom is how busy a loop is that hands relays over. Tests lower it.
var handOverFrom = 0.5
