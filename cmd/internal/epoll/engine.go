//go:build !portable

package main

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// An engine is a number of loops, one for each processor that the program may use. They
// share nothing but the listening sockets: a connection is in one loop, without a lock, a
// goroutine or a timer of its own.
//
// Only the first loop listens always. Each has the next one listen as well while it is busy:
// when one loop can do the work, two would do it with a sixth more processor time, since both
// fall asleep and are woken up more often. Relays that stay are another matter: a busy loop
// hands some of them over to the next; see share_linux.go.
type engine struct {
	hosts     *hostdir.Hosts
	listeners []*listener
	loops     []*loop
	tenants   *tenants
	threads   *threads     // for look-ups that the loops do not make themselves
	watch     *watch       // for those that they do make
	behind    atomic.Int64 // threads that are stuck in these, and were left behind
	logAll    *logAll
	room      *room

	sendBuffer int32 // how much a backend's socket takes of a bulk upload that is not read

	failed  chan error    // gets the reason if the engine cannot go on
	drained chan struct{} // closed when the last connection has ended after stop

	accepting, running sync.WaitGroup // loops that may accept, loops
}

// startEngine starts an engine that accepts from the listeners, and serves the clients that are
// there already. The program has own descriptors itself.
func startEngine(hosts *hostdir.Hosts, listeners []*listener, clients []int, own int64) (*engine, error) {
	var err error
	processors := loopsFor(len(listeners))
	e := &engine{
		hosts:     hosts,
		listeners: listeners,
		tenants:   newTenants(),
		threads:   newThreads(hosts),
		logAll:    newLogAll(hosts),
		failed:    make(chan error, 1),
		drained:   make(chan struct{}),
	}
	e.room = newRoom(own, e, e.threads, e.tenants)
	if e.sendBuffer, err = sendBuffer(); err != nil {
		return nil, err
	}
	e.sendBuffer += bulkMore
	// Loops do not give their processors back; the rest of the program has one of its own.
	runtime.GOMAXPROCS(processors + 1)
	for range processors {
		lp, err := newLoop(e, len(e.loops))
		if err != nil {
			return nil, err
		}
		e.loops = append(e.loops, lp)
	}
	e.watch = newWatch(e)
	for i, lp := range e.loops {
		lp.next = e.loops[(i+1)%processors]
	}
	e.loops[0].invited.Store(true)
	if len(clients) > 0 {
		e.logAll.await()
	}
	for _, fd := range clients {
		lp := e.loops[0]
		lp.shared = int32(fd)
		lp.awaitHello(lp.add(lp.shared))
	}
	started := make(chan error, len(e.loops))
	for _, lp := range e.loops {
		e.accepting.Add(1)
		e.running.Add(1)
		go lp.run(started)
	}
	for range e.loops {
		if err := <-started; err != nil {
			return nil, err
		}
	}
	return e, nil
}

// loopsFor returns how many loops there are.
func loopsFor(listeners int) int {
	if listeners == 0 {
		return 1
	}
	return runtime.GOMAXPROCS(0)
}

// engineDescriptors returns how many descriptors the engine has itself.
func engineDescriptors(listeners int) int64 { return int64(loopDescriptors * loopsFor(listeners)) }

// stop ends accepting, and lets go of the listening sockets. It returns when that is done.
func (e *engine) stop() {
	for _, lp := range e.loops {
		lp.stopping.Store(true)
		lp.wakeUp()
	}
	e.accepting.Wait()
	for _, l := range e.listeners {
		unix.Close(l.fd)
	}
	go func() {
		e.running.Wait()
		close(e.drained)
	}()
}

// relayed returns how many descriptors relays have.
func (e *engine) relayed() (n int64) {
	for _, l := range e.loops {
		n += 2*l.relays.Load() + 2*l.pipesOpen.Load()
	}
	return n
}

// others returns how many connections are no relays.
func (e *engine) others() (n int64) {
	for _, l := range e.loops {
		n += l.open.Load() - l.relays.Load()
	}
	return n
}

// counters returns those of all loops.
func (e *engine) counters() (all []*counters) {
	for _, lp := range e.loops {
		all = append(all, &lp.counters)
	}
	return all
}

// cut ends all connections, as far as that is possible at once.
func (e *engine) cut() {
	for _, l := range e.loops {
		l.cutting.Store(true)
		l.wakeUp()
	}
	select {
	case <-e.drained:
	case <-time.After(cutTimeout):
	}
}

func (l *loop) cut() {
	for _, c := range l.conns {
		if c.phase != closed && c.sockets[client].fd != 0 {
			l.tell(c, cutAtStop)
			l.close(c)
		}
	}
}

// A loop waits for events on its connections, and on the listening sockets, and deals with
// one after the other. Nothing that it does waits for anything else.
type loop struct {
	engine   *engine
	index    int // among those of the engine
	epoll    int
	wake     int32 // an eventfd
	stopping atomic.Bool
	cutting  atomic.Bool
	open     atomic.Int64 // connections, for others to read
	counters counters

	relays    atomic.Int64
	pipesOpen atomic.Int64

	runner    *runner
	relief    atomic.Pointer[relief] // nil if there is none
	wanted    atomic.Bool            // one is being made
	accepting bool                   // or it may; until the stop

	next      *loop       // the one that this one has help with its work
	invited   atomic.Bool // to listen, by the one before
	listening int         // how many of the listening sockets are among what is waited for
	rest      int64       // not to listen before, after a failure

	rounds int64 // that it made

	// For measuring how busy the loop is: how often that was done, and the time and the
	// processor time when it was last.
	measured  int32
	wall, cpu int64

	given given

	time int64 // of this round, 0 if nobody has asked for it yet

	shared int32 // the connection that was inherited, which others may have too; 0 if there is none

	conns []*conn // by the number that epoll knows them by
	free  []*conn // those that can be used again
	ended []*conn // those that ended while this batch of events is dealt with

	// Connections that are not relays. The one that waits longest is first.
	hellos  queue // those without a backend yet, until helloTimeout
	lingers queue // those refused, until lingerTimeout

	waiting waiting // clients that try again to get a backend

	// When to look for relays of which one half has ended and the other does nothing, 0 if
	// there was none of which one half has ended.
	quiet int64

	busy, spare []turn // flows to go on with, although no event will tell so

	pipes     []pipe // empty ones
	pipesUsed int    // how many others there are
	holders   []turn // the flows that are stalled with something in one, the longest first
	pipesIdle int64  // since when none was used, 0 if one was used just now

	refuses bool   // the system refuses what backends pass
	control []byte // for what they pass otherwise

	parser sni.Parser
	events [128]unix.EpollEvent
	ready  int // events that there are
	dealt  int // of those, dealt with
	// What was read is dealt with before anything else is, so one buffer serves
	// all. In front of it is room for a PROXY protocol header.
	buffer [headroom + readMax]byte
}

// What epoll reports events with: the number of a connection and a side of it, wakeEvent, or for
// listening sockets listenerEvent, listenerEvent-1 and so on.
const (
	wakeEvent     = -1
	listenerEvent = -2
)

func newLoop(e *engine, index int) (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	l := &loop{engine: e, index: index, epoll: epoll, wake: int32(wake), refuses: e.hosts.RefusesDescriptors()}
	if !l.refuses {
		l.control = make([]byte, controlSize)
	}
	if errno := epollCtl(epoll, unix.EPOLL_CTL_ADD, l.wake, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: wakeEvent}); errno != 0 {
		return nil, fmt.Errorf("epoll_ctl: %w", errno)
	}
	return l, nil
}

// listen adds the listening sockets to what is waited for, or takes them away. Of all loops that
// wait for one, of this program and others, one is woken up for a client (EPOLLEXCLUSIVE).
func (l *loop) listen(yes bool) {
	for yes && l.listening < len(l.engine.listeners) && l.listenTo(l.listening, unix.EPOLL_CTL_ADD) {
		l.listening++
	}
	for !yes && l.listening > 0 && l.listenTo(l.listening-1, unix.EPOLL_CTL_DEL) {
		l.listening--
	}
}

func (l *loop) listenTo(i, op int) bool {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(listenerEvent - i)}
	if errno := epollCtl(l.epoll, op, int32(l.engine.listeners[i].fd), &event); errno != 0 {
		// The kernel is out of memory, or of what it grants a user.
		l.pause(errno)
		return false
	}
	return true
}

// wakeUp has the loop come round. What is added to its eventfd is small in either byte order,
// since nobody reads it: that would take a call more.
func (l *loop) wakeUp() { write(l.wake, []byte{0, 0, 0, 1, 0, 0, 0, 0}) }

func (l *loop) run(started chan<- error) {
	r, err := newRunner(l.engine)
	if err == nil {
		l.setRunner(r)
	}
	started <- err
	if err != nil {
		return
	}
	l.accepting = true
	l.runWith(r)
}

// runWith goes on with the loop, for as long as there is something to do.
func (l *loop) runWith(r *runner) {
	l.setRunner(r)
	defer r.end()
	for {
		for l.dealt < l.ready {
			l.dealt++
			l.dispatch(&l.events[l.dealt-1])
		}
		if l.ready == len(l.events) {
			l.acceptSome()
		}
		if l.accepting && l.stopping.Load() {
			l.accepting = false
			l.listen(false)
			l.engine.accepting.Done()
		}
		l.takeTurns()
		l.expire()
		if l.cutting.Load() {
			l.cut()
		}
		l.reuse()
		if !l.accepting && l.done() {
			l.engine.running.Done()
			return
		}
		if l.accepting {
			l.listen(l.invited.Load() && l.rest == 0)
			l.measure()
		}
		l.ready, l.dealt = l.await(), 0
		l.time = 0
		l.rounds++
	}
}

// await waits for events, and returns their number.
func (l *loop) await() int {
	timeout := l.timeout()
	short := timeout
	if short < 0 || short > shortWait {
		short = shortWait
	}
	// A wait that the scheduler knows of is dear when there are many: its monitor takes the
	// processor away from this thread, and runs all the time to find such. So only those
	// who have nothing to do for some time tell it.
	n, errno := epollWait(l.epoll, l.events[:], short)
	if errno == 0 && n == 0 && short != timeout {
		l.runner.dialer.Leave()
		n, errno = epollWaitLong(l.epoll, l.events[:], timeout)
	}
	if errno != 0 {
		return 0 // EINTR
	}
	if l.shared != 0 {
		// As for a listening socket, see accept; what bounds the wait is boundWaits.
		setNonblock(l.shared)
	}
	return n
}

func (l *loop) dispatch(event *unix.EpollEvent) {
	switch {
	case event.Fd >= 0:
		l.event(l.conns[event.Fd], int(event.Pad), event.Events)
	case event.Fd == wakeEvent:
		l.take()
	default:
		// Also at the stop: of all copies on the socket this one alone was woken up for
		// the client.
		l.accept(l.engine.listeners[listenerEvent-event.Fd])
	}
}

// timeout returns how many milliseconds to wait for events.
func (l *loop) timeout() int {
	if len(l.busy) > 0 {
		return 0
	}
	next := int64(-1)
	sooner := func(t int64) {
		if next < 0 || t < next {
			next = t
		}
	}
	for _, q := range []*queue{&l.hellos, &l.lingers} {
		if q.first != nil {
			sooner(q.first.deadline)
		}
	}
	if l.waiting.redo != 0 {
		sooner(l.waiting.redo)
	}
	if l.rest != 0 {
		sooner(l.rest)
	}
	if l.quiet != 0 {
		sooner(l.quiet)
	}
	if len(l.pipes) > 0 {
		sooner(l.pipesIdle + int64(pipeTimeout))
	}
	if next < 0 {
		return -1
	}
	return int(max(0, next-now()+int64(time.Millisecond)-1) / int64(time.Millisecond))
}

// expire deals with what is due.
func (l *loop) expire() {
	if l.hellos.first == nil && l.lingers.first == nil && l.waiting.redo == 0 && l.quiet == 0 && len(l.pipes) == 0 && l.rest == 0 {
		return // the common case needs no clock
	}
	t := now()
	for c := l.hellos.first; c != nil && c.deadline <= t; c = l.hellos.first {
		switch c.phase {
		case redialing:
			l.refuse(c, c.early.name, c.early.why)
		case lookingUp:
			why := c.early.why // of a try before this one
			if why == nil {
				why = errLookupTimeout
			}
			l.refuse(c, c.early.name, why)
		default:
			l.refuse(c, nil, errTimeout)
		}
	}
	for c := l.lingers.first; c != nil && c.deadline <= t; c = l.lingers.first {
		l.close(c)
	}
	if l.waiting.redo != 0 && l.waiting.redo <= t {
		l.redial()
	}
	if l.quiet != 0 && l.quiet <= t {
		l.endQuiet()
	}
	if len(l.pipes) > 0 {
		l.expirePipes(t)
	}
	if l.rest <= t {
		l.rest = 0
	}
}

// add returns a new connection.
func (l *loop) add(fd int32) *conn {
	var c *conn
	if n := len(l.free); n > 0 {
		c = l.free[n-1]
		l.free = l.free[:n-1]
	} else {
		c = &conn{number: int32(len(l.conns))}
		l.conns = append(l.conns, c)
	}
	c.phase = greeting
	c.sockets[client].fd = fd
	c.began = l.now()
	l.open.Add(1)
	l.counters.accepted.Add(1)
	l.counters.waiting.Add(1)
	return c
}

// reuse makes the connections that have ended available for new ones. Not before all
// events of a batch are dealt with: there may be one for them among the rest.
func (l *loop) reuse() {
	for i, c := range l.ended {
		*c = conn{number: c.number}
		l.free = append(l.free, c)
		l.ended[i] = nil
	}
	l.ended = l.ended[:0]
}

// makeRoom drops a connection, since no descriptor is left: one that was refused already,
// otherwise the one, other than c, that waits longest for its relay to begin. It reports
// whether there was one.
func (l *loop) makeRoom(c *conn) bool {
	if refused := l.lingers.first; refused != nil {
		l.close(refused)
		return true
	}
	drop := l.hellos.first
	if drop != nil && drop == c {
		drop = c.next
	}
	if drop == nil {
		return false
	}
	complainDropped(int(drop.sockets[client].fd))
	l.counters.dropped.Add(1)
	l.close(drop)
	return true
}

// A queue is a list of connections in the order of their deadlines, which is the order that
// they come in, since all have the same time.
type queue struct{ first, last *conn }

func (q *queue) push(c *conn) {
	c.queue, c.prev, c.next = q, q.last, nil
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

// now is like the function of that name, but for all that happens in a round it is one time.
func (l *loop) now() int64 {
	if l.time == 0 {
		l.time = now()
	}
	return l.time
}

// fail tells the engine that it cannot go on.
func (e *engine) fail(reason error) {
	select {
	case e.failed <- reason:
	default:
	}
}
