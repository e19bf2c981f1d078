//go:build linux

package epoll

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// A poller waits for events on descriptors, with an epoll descriptor of its own. An event carries a
// [token].
type poller struct {
	fd     int
	wake   int32 // an eventfd
	events [128]unix.EpollEvent
	ready  int // events of the last wait
	dealt  int // how many of them were dealt with
}

// A token tells which descriptor an event is about: a side of a connection, a listening socket, or
// the eventfd.
type token struct {
	number int32 // of a connection, or wakeEvent, or for listening sockets listenerEvent, listenerEvent-1 …
	detail int32 // of a connection: its side, and its generation above that
}

const (
	wakeEvent     = -1
	listenerEvent = -2
)

func tokenOf(c *conn, s side) token { return token{c.number, c.generation<<1 | int32(s)} }

func (t token) side() side        { return side(t.detail & 1) }
func (t token) generation() int32 { return t.detail >> 1 }

// nextGeneration leaves a bit for the side.
func nextGeneration(g int32) int32 { return (g + 1) & (1<<30 - 1) }

func newPoller() (p poller, err error) {
	if p.fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return p, fmt.Errorf("epoll_create1: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return p, fmt.Errorf("eventfd: %w", err)
	}
	p.wake = int32(wake)
	if errno := p.control(unix.EPOLL_CTL_ADD, p.wake, unix.EPOLLIN|unix.EPOLLET, token{number: wakeEvent}); errno != 0 {
		return p, fmt.Errorf("epoll_ctl: %w", errno)
	}
	return p, nil
}

func (p *poller) control(op int, fd int32, events uint32, t token) unix.Errno {
	return epollCtl(p.fd, op, fd, &unix.EpollEvent{Events: events, Fd: t.number, Pad: t.detail})
}

// remove has the poller forget a descriptor that may stay open.
func (p *poller) remove(fd int32) unix.Errno {
	return p.control(unix.EPOLL_CTL_DEL, fd, 0, token{})
}

var one = binary.NativeEndian.AppendUint64(nil, 1)

// wakeUp ends the wait, from any thread. Nobody reads the eventfd: that would take another call,
// and no loop is woken up so often that the sum of the ones runs over.
func (p *poller) wakeUp() { write(p.wake, one) }

// An epoll_wait that the scheduler knows of is expensive: sysmon takes our P away and keeps
// running. So wait briefly without telling it, and tell it only for long waits.

// waitBriefly waits for events, for msec milliseconds but not for longer than briefWait; a negative
// number stands for ever. It reports whether the wait is over.
func (p *poller) waitBriefly(msec int) bool {
	brief := msec
	if brief < 0 || brief > briefWait {
		brief = briefWait
	}
	n, errno := epollWait(p.fd, p.events[:], brief)
	p.got(n, errno)
	return n > 0 || errno != 0 || brief == msec
}

// waitLong waits once more for all of the time.
func (p *poller) waitLong(msec int) {
	p.got(epollWaitLong(p.fd, p.events[:], msec))
}

func (p *poller) got(n int, errno unix.Errno) {
	if errno != 0 { // EINTR
		n = 0
	}
	p.ready, p.dealt = n, 0
}

// next returns an event of the last wait, nil if there is none left.
func (p *poller) next() *unix.EpollEvent {
	if p.dealt == p.ready {
		return nil
	}
	p.dealt++
	return &p.events[p.dealt-1]
}

// full tells whether more events may be ready than the last wait gave.
func (p *poller) full() bool { return p.ready == len(p.events) }
