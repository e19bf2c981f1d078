package main

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// counters count what has happened since the start. Each loop of the Linux engine has its own,
// which others only read; the portable engine has one for all connections.
//
// Of each connection accepted is counted first and ended last, and they are read in the opposite
// order. So no line ever says that more wait than are open.
type counters struct {
	accepted, ended atomic.Int64
	waiting         atomic.Int64      // connections that are neither relays nor refused, now
	refused         [256]atomic.Int64 // by alert
	dropped         atomic.Int64      // to make room
	bytes           [2]atomic.Int64   // sent on, by the way that they went
}

// The ways that bytes go, each with the number of the side that they come from.
const (
	up   = 0 // from the client to the backend
	down = 1
)

// traffic is how many bytes of a connection went each way. It is less than 0 while there is a
// PROXY protocol header to send, which is not the client's.
type traffic [2]int64

// count counts n bytes more of a connection.
func (k *counters) count(t *traffic, way, n int) {
	before := max(0, t[way])
	t[way] += int64(n)
	k.bytes[way].Add(max(0, t[way]) - before)
}

// total returns the sum of one of the counters.
func (e *engine) total(of func(*counters) *atomic.Int64) (n int64) {
	for _, k := range e.counters() {
		n += of(k).Load()
	}
	return n
}

// open returns how many connections there are. One that is just handed over between two loops
// is one.
func (e *engine) open() int64 {
	ended := e.total(func(k *counters) *atomic.Int64 { return &k.ended })
	return e.accepted() - ended
}

func (e *engine) accepted() int64 {
	return e.total(func(k *counters) *atomic.Int64 { return &k.accepted })
}

// tellCounters prints a line of counters whenever it is asked to. The line is for programs, too:
// what it has keeps its name and its place.
func tellCounters(e *engine, asked <-chan os.Signal) {
	for range asked {
		inUse, limit := descriptors(descriptorBlock)
		complain("%s, descriptors %d of %d", e.counted(), inUse, limit)
	}
}

// waiting returns how many clients wait for their hello or their backend.
func (e *engine) waiting() int64 {
	return e.total(func(k *counters) *atomic.Int64 { return &k.waiting })
}

func (e *engine) counted() string {
	ended := e.total(func(k *counters) *atomic.Int64 { return &k.ended })
	waiting := e.waiting()
	dropped := e.total(func(k *counters) *atomic.Int64 { return &k.dropped })
	var refused int64
	var alerts []string
	for i := range 256 {
		if n := e.total(func(k *counters) *atomic.Int64 { return &k.refused[i] }); n > 0 {
			refused += n
			alerts = append(alerts, fmt.Sprintf("%d: %d", i, n))
		}
	}
	var byAlert string
	if refused > 0 {
		byAlert = fmt.Sprintf(" (%s)", strings.Join(alerts, ", "))
	}
	var bytes [2]int64
	for way := range bytes {
		bytes[way] = e.total(func(k *counters) *atomic.Int64 { return &k.bytes[way] })
	}
	accepted := e.accepted()
	return fmt.Sprintf("accepted %d, open %d, waiting %d, refused %d%s, dropped %d, bytes up %d, bytes down %d",
		accepted, accepted-ended, waiting, refused, byAlert, dropped, bytes[up], bytes[down])
}

// descriptorBlock is how many numbers of descriptors are looked at before it is decided whether
// there may be more.
const descriptorBlock = 1 << 16

// pathsMost is more than there can be above all other descriptors that are for paths alone.
const pathsMost = 256

// descriptors returns how many descriptors are in use, and how many there may be, which is the limit of their numbers.
// (Inherited ones can be above it; they take nobody's place.)
//
// A chroot has no /proc to ask, so the numbers are tried. But a limit can be a thousand million, and the system always
// gives the lowest number that is free: so a block of numbers none of which is in use is the last.
func descriptors(block int64) (inUse, limit int64) {
	limit = openFiles()
	fds := make([]unix.PollFd, min(block, limit))
	for first := int64(0); first < limit; first += int64(len(fds)) {
		some := fds[:min(int64(len(fds)), limit-first)]
		for i := range some {
			some[i].Fd = int32(first) + int32(i)
		}
		if _, err := unix.Poll(some, 0); err != nil {
			break // which does not happen
		}
		open, last := int64(0), 0
		for i, fd := range some {
			if fd.Revents&unix.POLLNVAL == 0 {
				open, last = open+1, i
			}
		}
		// poll(2) does not know those that are for paths alone (O_PATH). There are few numbers left for these.
		for _, fd := range some[:min(last+pathsMost, len(some))] {
			if fd.Revents&unix.POLLNVAL != 0 {
				if _, err := unix.FcntlInt(uintptr(fd.Fd), unix.F_GETFD, 0); err == nil {
					open++
				}
			}
		}
		if open == 0 {
			break
		}
		inUse += open
	}
	return inUse, limit
}

var epoch = time.Now()

// now returns the time, in nanoseconds from the start of the program.
func now() int64 { return int64(time.Since(epoch)) }
