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

// A loop waits for events on its connections, and on the listening sockets, and deals with one after
// the other. Nothing that it does waits for anything else.
//
// A connection is in the table of its loop from accept to its end. Besides, it may be in these places:
//
//   - hellos or lingers: until it leaves the phases that these are for; see [conn.enter].
//   - redials, as pending: a client that has gone on is not in the line that pending says.
//   - turns, as a flow: only one that says so takes a turn.
//   - a lookup of another thread, until pending is forgotten: see [conn.forget].
//   - runner.conn: used only while that runner is in a look-up for it.
//   - the inbox of the next loop, and then in no table.
type loop struct {
	engine   *Engine
	poller   poller
	inbox    inbox
	load     load
	counters report.Counters
	stopping atomic.Bool
	cutting  atomic.Bool

	// For others to read.
	open   atomic.Int64 // connections
	relays atomic.Int64

	runner  atomic.Pointer[runner]
	standby atomic.Pointer[standby] // nil if there is none
	hiring  atomic.Bool             // one is being made

	timers [5]timer

	accepting bool        // or it may; until the stop
	next      *loop       // the one that this one has help with its work
	invited   atomic.Bool // to accept, by the one before
	listening int         // how many of the listening sockets the poller has
	resume    int64       // when to accept again after a failure, 0 if there was none

	rounds int64
	clock  int64 // the time of this round, 0 if nobody has asked for it yet

	shared int32 // the connection that was inherited, which others may have too; 0 if there is none

	conns   table
	hellos  queue // those without a backend yet, until limits.Hello
	lingers queue // those refused, until limits.Linger
	redials redials

	halfClosed int64 // when to look for half-closed relays that do nothing, 0 if there was none

	turns, spare []*flow // flows to go on with, although no event will tell so

	pipe    pipe
	refuses bool   // the system refuses what backends pass
	control []byte // for what they pass otherwise

	parser sni.Parser
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
	l := &loop{engine: e, poller: p, refuses: e.hosts.RefusesDescriptors()}
	if l.pipe, err = newPipe(); err != nil {
		return nil, err
	}
	if !l.refuses {
		l.control = make([]byte, socket.ControlSize)
	}
	l.timers = [...]timer{
		{l.hellos.due, l.expireHellos},
		{l.lingers.due, l.expireLingers},
		{func() int64 { return l.redials.due }, l.redial},
		{func() int64 { return l.halfClosed }, l.endHalfClosed},
		{func() int64 { return l.resume }, func() { l.resume = 0 }},
	}
	return l, nil
}

// start runs the loop in the calling goroutine, and says whether it can.
func (l *loop) start(started chan<- error) {
	r, err := newRunner(l.engine.hosts)
	if err == nil {
		l.runner.Store(r)
	}
	started <- err
	if err != nil {
		return
	}
	l.accepting = true
	l.run(r)
}

// run goes on with the loop, for as long as there is something to do. The calling goroutine is that of r.
func (l *loop) run(r *runner) {
	l.runner.Store(r)
	defer r.dialer.Close()
	for {
		for event := l.poller.next(); event != nil; event = l.poller.next() {
			l.dispatch(event)
		}
		if l.poller.full() {
			l.acceptSome()
		}
		if l.accepting && l.stopping.Load() {
			l.accepting = false
			l.listen(false)
			l.engine.accepting.Done()
		}
		l.takeTurns()
		l.fireTimers()
		if l.cutting.Load() {
			l.cut()
		}
		if !l.accepting && l.over() {
			l.engine.running.Done()
			return
		}
		if l.accepting {
			l.listen(l.invited.Load() && l.resume == 0)
			l.measure()
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
		if c := l.conns.find(token{event.Fd, event.Pad}); c != nil {
			c.event(side(event.Pad&1), event.Events)
		}
	case event.Fd == wakeEvent:
		l.emptyInbox()
	default:
		// Also at the stop: of all copies on the socket this one alone was woken up for the client.
		l.accept(l.engine.listeners[listenerEvent-event.Fd])
	}
}

// timeout returns for how many milliseconds to wait for events, a negative number if there is no limit.
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

// fireTimers does what is due.
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

// now returns the time: one for all that happens in a round.
func (l *loop) now() int64 {
	if l.clock == 0 {
		l.clock = limits.Now()
	}
	return l.clock
}

// cut ends all connections.
func (l *loop) cut() {
	for _, c := range l.conns.all {
		if c.phase != free {
			c.printAccess(report.CutAtStop)
			c.close()
		}
	}
}

// A table has the connections of a loop by their numbers.
type table struct {
	all  []*conn
	free []*conn
}

// find returns the connection that an event is about, nil if that has ended: its number may be used
// again, but not with the same generation.
func (t *table) find(k token) *conn {
	if c := t.all[k.number]; c.generation == k.detail>>1 {
		return c
	}
	return nil
}

// add returns a new connection.
func (t *table) add() *conn {
	if n := len(t.free); n > 0 {
		c := t.free[n-1]
		t.free = t.free[:n-1]
		return c
	}
	c := &conn{number: int32(len(t.all))}
	t.all = append(t.all, c)
	return c
}

// release makes a connection that has ended available for a new one.
func (t *table) release(c *conn) {
	*c = conn{number: c.number, generation: nextGeneration(c.generation)}
	t.free = append(t.free, c)
}

// take removes a connection that goes elsewhere.
func (t *table) take(c *conn) {
	t.all[c.number] = &conn{number: c.number, generation: nextGeneration(c.generation)}
	t.free = append(t.free, t.all[c.number])
}

// put takes in a connection that comes from elsewhere.
func (t *table) put(c *conn) {
	place := t.add()
	c.number, c.generation = place.number, place.generation
	t.all[c.number] = c
}

// nextGeneration leaves a bit for the side.
func nextGeneration(g int32) int32 { return (g + 1) & (1<<30 - 1) }

// A queue is a list of connections in the order of their deadlines. They come in this order, since all
// have the same time.
type queue struct{ first, last *conn }

// due returns the first deadline, 0 if there is none.
func (q *queue) due() int64 {
	if q.first == nil {
		return 0
	}
	return q.first.deadline
}

func (q *queue) push(c *conn, deadline int64) {
	c.queue, c.prev, c.next, c.deadline = q, q.last, nil, deadline
	if q.last == nil {
		q.first = c
	} else {
		q.last.next = c
	}
	q.last = c
}

// leave takes c out of the queue that it is in, if any.
func (c *conn) leave() {
	q := c.queue
	if q == nil {
		return
	}
	if c.prev == nil {
		q.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		q.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.queue, c.prev, c.next = nil, nil, nil
}
