// Package logline prints lines on standard output and standard error, which may be anything: a pipe
// that is full or that nobody reads, a closed terminal, the listening socket. Printing never waits
// and never fails (sniproxy-rs ends, or stands still): goroutines do the waiting, and a line that
// they have no room for is left out. Lines that clients can bring about are rationed.
package logline

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Program begins each line on standard error. Change it only before the first.
var Program = "sniproxy"

var (
	stdout = newOutput(1)
	stderr = newOutput(2)
)

// Out prints a line on standard output.
func Out(format string, args ...any) { stdout.print(fmt.Sprintf(format, args...) + "\n") }

// Text prints a text on standard error as it is.
func Text(text string) { stderr.print(text) }

// Err prints a line on standard error. It reports whether there was room for it.
func Err(format string, args ...any) bool {
	return stderr.print(Program + ": " + fmt.Sprintf(format, args...) + "\n")
}

// Rationed prints what line returns on standard error, or counts it among those left out. It is for
// lines that clients can bring about: ten a second, in bursts of 50, and half of the room at most.
func Rationed(line func() string) {
	if stderr.spare() < cap(stderr.lines)/2 || !often.Allow() || !Err("%s", line()) {
		omitted.add()
	}
}

// RationedFor is like Rationed, with a ration for each tenant, so that none takes those of others
// nor that of other lines: one line in ten seconds, in bursts of 5, and a quarter of the room at
// most. Every minute a line counts those left out.
func RationedFor(tenant string, line func() string) {
	r := rations.of(tenant)
	if stderr.spare() < 3*cap(stderr.lines)/4 || !r.often.Allow() || !Err("%s", line()) {
		r.omitted.add()
	}
}

// A rationsOf has the rations of tenants, by their names.
type rationsOf struct {
	mu    sync.Mutex
	all   map[string]*ration
	sweep int // the number at which those that are as new are looked for
}

type ration struct {
	often   *Limiter
	omitted count
}

const (
	rationPeriod = 10 * time.Second
	rationBurst  = 5
	rationDelay  = time.Minute
	rationsLeast = 64
)

var rations = rationsOf{all: map[string]*ration{}, sweep: rationsLeast}

func (s *rationsOf) of(tenant string) *ration {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.all[tenant]
	if r == nil {
		if len(s.all) >= s.sweep {
			maps.DeleteFunc(s.all, func(_ string, r *ration) bool { return r.often.full() && r.omitted.n.Load() == 0 })
			s.sweep = max(rationsLeast, 2*len(s.all))
		}
		r = &ration{NewLimiter(rationPeriod, rationBurst), count{text: "more such lines about " + tenant + " were left out", delay: rationDelay}}
		s.all[tenant] = r
	}
	return r
}

// print prints how many lines were left out.
func (s *rationsOf) print() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.all {
		r.omitted.print()
	}
}

// Asked prints a line that was asked for: it is left out only if the log does not take it.
func Asked(line string) {
	if stderr.spare() < cap(stderr.lines)/4 || !Err("%s", line) {
		dropped.add()
	}
}

var (
	often   = NewLimiter(time.Second/10, 50)
	omitted = count{text: "more such lines were left out", delay: countDelay}
	dropped = count{text: "lines about connections were dropped, as the log did not take them", delay: countDelay}
)

// A count is how many lines were left out. It is printed some time after the first.
type count struct {
	text  string
	delay time.Duration
	n     atomic.Int64
}

const countDelay = 2 * time.Second

func (c *count) add() {
	if c.n.Add(1) == 1 {
		time.AfterFunc(c.delay, c.print)
	}
}

func (c *count) print() {
	n := c.n.Swap(0)
	if n == 0 || Err("%d %s", n, c.text) {
		return
	}
	if c.n.Add(n) == n {
		time.AfterFunc(c.delay, c.print)
	}
}

// Flush is for the end of the program: what was printed before gets a moment to be written.
func Flush() {
	omitted.print()
	dropped.print()
	rations.print()
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

// An output is a descriptor that lines are written to.
type output struct {
	lines chan string
	done  chan struct{} // closed when the last line was written
}

// lastLine ends an output. The channel is not closed: others may still print.
const lastLine = ""

// newOutput returns an output for fd. It uses system calls of our own: O_NONBLOCK belongs to
// everybody who shares the descriptor, so it is neither set nor relied upon.
func newOutput(fd int) *output {
	o := &output{make(chan string, 256), make(chan struct{})}
	go func() {
		defer close(o.done)
		for line := range o.lines {
			if line == lastLine {
				return
			}
			Write(fd, line)
		}
	}()
	return o
}

// Write writes a text to fd, and waits until it is written or cannot be.
func Write(fd int, text string) {
	b := []byte(text)
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

// print prints a text, if there is room for it.
func (o *output) print(text string) bool {
	select {
	case o.lines <- text:
		return true
	default:
		return false
	}
}

// spare returns for how many lines there is room.
func (o *output) spare() int { return cap(o.lines) - len(o.lines) }
