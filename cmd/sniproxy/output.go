package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// An output is a descriptor for lines, which may be anything: a pipe that is full or
// that nobody reads, a closed terminal, the listening socket. Writing to it never
// waits and never fails (sniproxy-rs ends, or stands still): a goroutine of its own does the
// waiting, and lines that it has no room for are dropped.
type output struct {
	lines chan string
	done  chan struct{}
}

var (
	stdout = newOutput(1)
	stderr = newOutput(2)
)

func newOutput(fd int) *output {
	o := &output{make(chan string, 256), make(chan struct{})}
	// The descriptor is written to with system calls of our own: its O_NONBLOCK
	// belongs to everybody who shares it, so it is neither set nor relied upon.
	go func() {
		defer close(o.done)
		for line := range o.lines {
			if line == lastLine {
				return
			}
			writeAll(fd, line)
		}
	}()
	return o
}

// lastLine ends an output. The channel is not closed: others may still print.
const lastLine = ""

func writeAll(fd int, line string) {
	b := []byte(line)
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		switch err {
		case nil:
			b = b[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1)
		default:
			return
		}
	}
}

// print prints a line, if there is room for it.
func (o *output) print(line string) bool {
	select {
	case o.lines <- line:
		return true
	default:
		return false
	}
}

// spare returns for how many lines there is room.
func (o *output) spare() int { return cap(o.lines) - len(o.lines) }

// complain prints a line on standard error.
func complain(format string, args ...any) bool {
	return stderr.print("sniproxy: " + fmt.Sprintf(format, args...) + "\n")
}

// complainOften prints what line returns, for lines that clients can bring about, or counts
// it among those left out.
func complainOften(line func() string) {
	if stderr.spare() < cap(stderr.lines)/2 || !often.take() || !complain("%s", line()) {
		moreOften.add()
	}
}

// complainEach is for lines that were asked for, each of them: they are left out only if the log
// does not take them.
func complainEach(line string) {
	if stderr.spare() < cap(stderr.lines)/4 || !complain("%s", line) {
		moreEach.add()
	}
}

var (
	often     = ration{period: time.Second / 10, burst: 50}
	moreOften = leftOut{text: "more such lines were left out"}
	moreEach  = leftOut{text: "lines about connections were dropped, as the log did not take them"}
)

// A leftOut counts lines that were left out, and tells their number leftOutDelay after the first.
type leftOut struct {
	text string
	n    atomic.Int64
}

const leftOutDelay = 2 * time.Second

func (l *leftOut) add() {
	if l.n.Add(1) == 1 {
		time.AfterFunc(leftOutDelay, l.tell)
	}
}

func (l *leftOut) tell() {
	n := l.n.Swap(0)
	if n == 0 || complain("%d %s", n, l.text) {
		return
	}
	if l.n.Add(n) == n {
		time.AfterFunc(leftOutDelay, l.tell)
	}
}

// flushOutput is for the end of the program: what was printed before gets a moment to
// be written.
func flushOutput() {
	moreOften.tell()
	moreEach.tell()
	late := time.After(100 * time.Millisecond)
	for _, o := range []*output{stdout, stderr} {
		select {
		case o.lines <- lastLine:
		case <-late:
			return
		}
		select {
		case <-o.done:
		case <-late:
			return
		}
	}
}

// acceptTrouble rations what is said about accept.
var acceptTrouble = ration{period: 10 * time.Second, burst: 1}

func complainAccept(err error) {
	if acceptTrouble.take() {
		complain("cannot accept connections for the moment: %v", err)
	}
}

// A ration lets one thing through per period, and some more after it was used less: a burst.
type ration struct {
	period time.Duration
	burst  int

	mu   sync.Mutex
	used time.Time // up to here all periods have had their thing
}

func (r *ration) take() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.used.Before(now) {
		r.used = now
	}
	next := r.used.Add(r.period)
	if next.After(now.Add(time.Duration(r.burst) * r.period)) {
		return false
	}
	r.used = next
	return true
}
