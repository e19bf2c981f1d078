//go:build linux

package epoll

import (
	"time"

	"sniproxy/proxyproto"
)

// What a loop works with.
const (
	// headroom is for a PROXY protocol header in front of what is read.
	headroom = proxyproto.MaxV2

	// A flow reads readMin bytes at once, and up to readMax when there is much to move that is not
	// spliced.
	readMin = 32 << 10
	readMax = 256 << 10

	// A backend's socket takes bulkMore bytes more than by default when there is much to move: that
	// is what a stalled upload holds. Nothing is spliced while it has room for less than spliceMin.
	bulkMore  = 128 << 10
	spliceMin = 64 << 10

	// pipeSize is that of the pipe that a loop splices through.
	pipeSize = 512 << 10

	// turnSize is how many bytes a flow may move before others have their turn.
	turnSize = 512 << 10

	// acceptMost is how many connections are accepted after a full batch of events.
	acceptMost = 8

	// redialMost is how many clients that wait try again before others have their turn.
	redialMost = 32

	// redialSpacing is the time from one try to the next, for all entries of a user together. So
	// thousands of entries cannot take all of a loop's time.
	redialSpacing = 250 * time.Microsecond

	// A loop measures how busy it is every measurePeriod, and looks at the clock for that every
	// measureRounds rounds. One that works for more than busyMost of the time has the next one
	// accept connections too, until it works for less than busyLeast.
	measurePeriod = 10 * time.Millisecond
	measureRounds = 32
	busyMost      = 0.8
	busyLeast     = 0.4

	// movedMost is how many relays a loop moves to the next one at once.
	movedMost = 64

	// briefWait is for how many milliseconds a loop waits for events before it tells the scheduler.
	briefWait = 10

	// A loop that is at the same look-up at watchStuck checks, one every watchPeriod, gets another
	// thread: it is stuck, and has not just to wait for a processor. Nobody checks after watchIdle
	// periods without a look-up.
	watchPeriod = 25 * time.Millisecond
	watchStuck  = 4
	watchIdle   = 40

	// When more than behindMost threads of loops are stuck, loops leave tenants' directories to
	// other threads.
	behindMost = 8

	// recentNames is for how many relays, at most, a loop remembers the name.
	recentNames = 128

	// quietChecks is how often within limits.HalfClosed a half-closed relay must have moved
	// nothing.
	quietChecks = 8

	// loopDescriptors are what a loop has itself: an epoll descriptor, an eventfd, the directory of
	// the last look-up, and a pipe.
	loopDescriptors = 5
)

// MoveFrom is how busy a loop is that moves relays to the next one. Tests lower it.
var MoveFrom = 0.5
