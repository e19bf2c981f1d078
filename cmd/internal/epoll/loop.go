//go:build linux

package epoll

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/socket"
	"sniproxy/sni"
)

// A loop waits for events on its connections, and on the listening sockets, and deals with one
// after the other. Nothing that it does waits for anything else.
//
// A connection is in the table of its loop from accept to its end, and in the queue of its phase.
// It is also named in other places, which may outlive it there:
//
//   - events: their generation must be that of the number in the table.
//   - lines of redials: an entry counts only while its pending.line is that line.
//   - turns: an entry counts only while its flow.turn is set.
//   - a query: [conn.enter] removes it there.
//   - runner.conn: counts only while that runner is in a look-up.
//
// While it is in the inbox of the next loop it is in no table.
type loop struct {
	engine   *Engine
	poller   poller
	inbox    inbox
	load     load
	counters report.Counters
	stopping atomic.Bool
	cutting  atomic.Bool

	open    atomic.Int64 // connections
	runner  atomic.Pointer[runner]
	standby atomic.Pointer[standby] // nil if there is none
	hiring  atomic.Bool             // one is being made

	timers [6]timer

	// A loop accepts connections if it is not stopped, is invited and does not rest.
	stopped   bool
	invited   atomic.Bool // by the loop before
	rest      int64       // until when, after a failure; 0 if there was none
	listening int         // how many of the listening sockets the poller has

	next    *loop    // the one that takes work from this one
	queries []*query // from the inbox, not dealt with yet

	rounds int64
	clock  int64 // when the round began, for what needs no better; 0 if nobody has asked for it yet

	shared int32 // the one connection, if it was inherited, as others may have it too; otherwise 0

	conns   table
	hellos  queue // those without a backend yet, until limits.Hello
	lingers queue // those refused, until limits.Linger
	retries queue // relays whose client is to send a second hello, until limits.Hello
	recent  names
	redials redials

	halfClosed int64 // when to look for half-closed relays that do nothing, 0 if there was none

	turns, spare []*flow // flows to go on with, although no event will tell so

	pipe     pipe
	noRights bool   // the system refuses descriptors that backends pass (SCM_RIGHTS)
	control  []byte // for these descriptors otherwise

	parser sni.Parser
	opened []byte // what a backend is to get of what was read last, while a second hello can come
	// What was read is dealt with before anything else is, so one buffer serves all. In front of it
	// is room for a PROXY protocol header.
	buffer [headroom + readMax]byte
}

// A timer is what a loop does at a certain time.
type timer struct {
	due  func() int64 // 0 if never
	fire func()
}

func newLoop(e *Engine) (*loop, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	l := &loop{engine: e, poller: p, noRights: e.hosts.RefusesDescriptors()}
	if l.pipe, err = newPipe(); err != nil {
		return nil, err
	}
	if !l.noRights {
		l.control = make([]byte, socket.ControlSize)
	}
	l.timers = [...]timer{
		{l.hellos.due, l.expireHellos},
		{l.lingers.due, l.expireLingers},
		{l.retries.due, l.expireRetries},
		{func() int64 { return l.redials.due }, l.redial},
		{func() int64 { return l.halfClosed }, l.endHalfClosed},
		{func() int64 { return l.rest }, func() { l.rest = 0 }},
	}
	return l, nil
}

// start runs the loop in the calling goroutine, and says whether it can.
func (l *loop) start(started chan<- error) {
	r, err := newRunner(l.engine.hosts)
	started <- err
	if err == nil {
		l.run(r)
	}
}

// run runs the loop in the goroutine of r, for as long as there is something to do.
//
// Another goroutine may have begun the round, and got stuck in a look-up: see [loop.rescue]. So
// what is left of a round must be in the loop, and not in local variables, wherever a look-up may
// be made.
func (l *loop) run(r *runner) {
	l.runner.Store(r)
	l.load.restart(limits.Now())
	defer r.dialer.Close()
	for {
		for event := l.poller.next(); event != nil; event = l.poller.next() {
			l.dispatch(event)
		}
		for len(l.queries) > 0 {
			q := l.queries[0]
			l.queries = l.queries[1:]
			l.found(q)
		}
		if l.poller.full() {
			l.acceptSome()
		}
		if !l.stopped && l.stopping.Load() {
			l.stopped = true
			l.listen(false)
			l.engine.accepting.Done()
		}
		l.takeTurns()
		l.fireTimers()
		if l.cutting.Load() {
			l.cut()
		}
		if l.stopped && l.closeIfEmpty() {
			l.engine.running.Done()
			return
		}
		if !l.stopped {
			invited := l.invited.Load()
			if !invited && l.listening > 0 {
				l.invite(false) // it may sleep from now on, and not notice that it is not busy
			}
			l.listen(invited && l.rest == 0)
			l.shareWork()
		}
		l.await()
		l.clock = 0
		l.rounds++
	}
}

func (l *loop) await() {
	if msec := l.timeout(); !l.poller.waitBriefly(msec) {
		l.runner.Load().dialer.Leave()
		l.poller.waitLong(msec)
	}
	if l.shared != 0 {
		// As for a listening socket, see accept. SO_RCVTIMEO and SO_SNDTIMEO bound the wait.
		setNonblock(l.shared)
	}
}

func (l *loop) dispatch(event *unix.EpollEvent) {
	switch {
	case event.Fd >= 0:
		t := token{event.Fd, event.Pad}
		if c := l.conns.find(t); c != nil {
			c.event(t.side(), event.Events)
		}
	case event.Fd == wakeEvent:
		l.emptyInbox()
	default:
		// Also at the stop: the kernel has woken up only this process for the client.
		l.accept(l.engine.listeners[listenerEvent-event.Fd])
	}
}

// timeout returns for how many milliseconds to wait for events, a negative number if there is no
// limit.
func (l *loop) timeout() int {
	if len(l.turns) > 0 {
		return 0
	}
	first := int64(0)
	for i := range l.timers {
		if due := l.timers[i].due(); due != 0 && (first == 0 || due < first) {
			first = due
		}
	}
	if first == 0 {
		return -1
	}
	return int(max(0, first-limits.Now()+int64(time.Millisecond)-1) / int64(time.Millisecond))
}

func (l *loop) fireTimers() {
	now := int64(0)
	for i := range l.timers {
		t := &l.timers[i]
		due := t.due()
		if due == 0 {
			continue // the common case needs no clock
		}
		if now == 0 {
			now = limits.Now()
		}
		if due <= now {
			t.fire()
		}
	}
}

// now returns when the round began, roughly. Time limits go by [limits.Now].
func (l *loop) now() int64 {
	if l.clock == 0 {
		l.clock = limits.Now()
	}
	return l.clock
}

func (l *loop) cut() {
	for _, c := range l.conns.all {
		if c.phase != free {
			c.cut(report.CutAtStop)
		}
	}
}
