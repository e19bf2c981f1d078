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

	// A backend's socket takes bulkMore bytes more than it would by default when there is much to move: that is what a
	// stalled upload holds. Nothing is spliced while it has room for less than spliceMin.
	bulkMore  = 128 << 10
	spliceMin = 64 << 10

	// acceptMost is how many connections are accepted after a full batch of events.
	acceptMost = 8

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

	// shortWait is how many milliseconds a loop waits for events before it lets the scheduler
	// know that it waits.
	shortWait = 10

	// A loop that is at the same look-up at watchStuck checks, one every watchPeriod, gets
	// another thread: it is stuck, and has not just to wait for a processor. Nobody checks after
	// watchIdle periods without a look-up.
	watchPeriod = 25 * time.Millisecond
	watchStuck  = 4
	watchIdle   = 40

	// When more than behindMost threads of loops are stuck, loops leave tenants' directories to other threads.
	behindMost = 8

	// Loops leave the look-ups of a tenant to other threads for distrustTime after one has hung.
	distrustTime = time.Minute

	// loopDescriptors are what a loop has itself: an epoll descriptor, an eventfd, and the directory of the last look-up.
	loopDescriptors = 3
)

// handOverFrom is how busy a loop is that hands relays over. Tests lower it.
var handOverFrom = 0.5
