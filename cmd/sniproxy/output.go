package main

import (
	"fmt"
	"sync"
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

func (o *output) print(line string) {
	select {
	case o.lines <- line:
	default:
	}
}

// complain prints a line on standard error.
func complain(format string, args ...any) {
	stderr.print("sniproxy: " + fmt.Sprintf(format, args...) + "\n")
}

// flushOutput is for the end of the program: what was printed before gets a moment to
// be written.
func flushOutput() {
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
var acceptTrouble = ration{period: 10 * time.Second}

func complainAccept(err error) {
	if acceptTrouble.take() {
		complain("cannot accept connections for the moment: %v", err)
	}
}

// A ration lets something through once per period.
type ration struct {
	period time.Duration

	mu   sync.Mutex
	next time.Time
}

func (r *ration) take() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Before(r.next) {
		return false
	}
	r.next = now.Add(r.period)
	return true
}
