//go:build portable || !linux

package main

import (
	"container/list"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// The portable engine accepts connections and serves them, with a goroutine for each direction of each
// connection, on Go's own poller. It is the plain statement of what the program does.
type engine struct {
	hosts   *hostdir.Hosts
	tenants *tenants
	threads *threads // for all look-ups
	logAll  *logAll
	room    *room

	files   []*os.File    // the listening sockets, for the poller
	failed  chan error    // gets the reason if the engine cannot go on
	drained chan struct{} // closed when the last connection has ended after stop
	conns   sync.WaitGroup
	counts  counters
	ended   chan struct{} // gets something when a connection has ended

	mu     sync.Mutex
	queue  list.List // of *conn: those that are not relays yet, in order of arrival; refused ones are first
	relays map[*conn]struct{}
	lines  map[tenantKey]*line
}

// startEngine starts an engine that accepts from the listeners, and serves the clients that are
// there already. The program has own descriptors itself.
func startEngine(hosts *hostdir.Hosts, listeners []*listener, clients []int, own int64) (*engine, error) {
	e := &engine{
		hosts:   hosts,
		tenants: newTenants(),
		threads: newThreads(hosts),
		logAll:  newLogAll(hosts),
		failed:  make(chan error, len(listeners)),
		drained: make(chan struct{}),
		ended:   make(chan struct{}, 1),
		relays:  map[*conn]struct{}{},
		lines:   map[tenantKey]*line{},
	}
	e.room = newRoom(own, e, e.threads, e.tenants)
	for _, l := range listeners {
		f, err := pollable(&l.fd)
		if err != nil {
			return nil, err
		}
		e.files = append(e.files, f)
		e.conns.Go(func() { e.accept(l, f) })
	}
	if len(clients) > 0 {
		e.logAll.await()
	}
	for _, fd := range clients {
		f, err := pollable(&fd)
		if err != nil {
			return nil, err
		}
		if _, err := unix.Getpeername(fd); err == nil { // otherwise it is gone
			e.begin(f)
		}
	}
	return e, nil
}

// engineDescriptors returns how many descriptors the engine has itself: pollable takes one for a moment.
func engineDescriptors(int) int64 { return 1 }

// pollable returns a file for the socket fd, known to the poller, whose descriptor takes the
// place of fd. The poller takes a file only if it is non-blocking, which whoever shares
// the socket may undo at any time; hence the attempts.
func pollable(fd *int) (*os.File, error) {
	for {
		next, err := unix.FcntlInt(uintptr(*fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		if err := unix.SetNonblock(next, true); err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(next), "socket")
		if f.SetDeadline(time.Time{}) == nil {
			unix.Close(*fd)
			*fd = next
			return f, nil
		}
		f.Close()
	}
}

// stop ends accepting, and lets go of the listening sockets. It returns when that is done.
func (e *engine) stop() {
	for _, f := range e.files {
		f.Close()
	}
	go func() {
		e.conns.Wait()
		close(e.drained)
	}()
}

// counters returns the only ones.
func (e *engine) counters() []*counters { return []*counters{&e.counts} }

// relayed returns how many descriptors relays have.
func (e *engine) relayed() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return 2 * int64(len(e.relays))
}

// others returns how many connections are no relays.
func (e *engine) others() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return int64(e.queue.Len())
}

// cut ends all relays, and waits a moment for that.
func (e *engine) cut() {
	e.mu.Lock()
	for c := range e.relays {
		c.endsAs(cutAtStop)
		c.close()
	}
	e.mu.Unlock()
	select {
	case <-e.drained:
	case <-time.After(cutTimeout):
	}
}

// A conn is a client's connection.
type conn struct {
	engine          *engine
	client, backend *os.File
	began           int64           // when it was accepted, by the clock of now
	early           context.Context // until its relay begins: done at the deadline, and when it is dropped to make room
	drop            context.CancelFunc
	place           *list.Element // in the queue
	refused, told   bool
	tenant          *tenant // whose host it is for, once that is known

	active  atomic.Int64 // when the relay last moved something
	drained atomic.Bool  // all was read that the backend had to say
	sent    traffic
	account *account // if it is to be told of at its end

	mu  sync.Mutex
	how string // it ends
}

// belongTo says whose host c is for. It takes over the use of t.
func (c *conn) belongTo(t *tenant) {
	if c.tenant != nil {
		c.tenant.release()
	}
	c.tenant = t
}

// accept accepts connections until the file of the listener is closed. No failure ends it, as any
// would end sniproxy-rs.
func (e *engine) accept(l *listener, f *os.File) {
	for {
		fd, err := acceptOne(l, f)
		switch err {
		case nil:
			e.begin(os.NewFile(uintptr(fd), "client"))
			if e.room.full() {
				runtime.Gosched()
				e.dropOldest(nil, 0)
			}
		case os.ErrClosed:
			return
		case unix.ECONNABORTED:
			// Only that connection is gone.
		case unix.EMFILE, unix.ENFILE:
			// Those accepted last have not looked for their hello yet.
			runtime.Gosched()
			if !e.dropOldest(nil, 0) {
				e.pause(err)
			}
		default:
			if !l.stillListens() {
				e.failed <- l.shutDown()
				return
			}
			e.pause(err)
		}
	}
}

func acceptOne(l *listener, f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, os.ErrClosed
	}
	closed := raw.Read(func(uintptr) bool {
		fd, err = l.accept()
		for err == unix.EINTR {
			fd, err = l.accept()
		}
		if (err == unix.EMFILE || err == unix.ENFILE) && !l.pending() {
			err = unix.EAGAIN // accept(2) says that before it looks for a client
		}
		return err != unix.EAGAIN
	})
	if closed != nil {
		return -1, os.ErrClosed
	}
	return fd, err
}

// roomLeft descriptors are left to look-ups, than which accept could be quicker.
const roomLeft = 4

// full tells whether hardly a descriptor is left, for anything.
func (r *room) full() bool {
	return r.base+r.threads.descriptors()+r.people.relayed()+r.people.others()+roomLeft > r.limit.Load()
}

// pause waits after a failure of accept that has a cause outside of the connection, for
// one to end or for acceptPause. The clients wait in the backlog.
func (e *engine) pause(err error) {
	complainAccept(err)
	select {
	case <-e.ended:
	case <-time.After(acceptPause):
	}
}

// begin begins to serve a client.
func (e *engine) begin(client *os.File) {
	c := &conn{engine: e, client: client, began: now()}
	c.early, c.drop = context.WithTimeout(context.Background(), helloTimeout)
	e.counts.accepted.Add(1)
	e.counts.waiting.Add(1)
	e.mu.Lock()
	c.place = e.queue.PushBack(c)
	e.mu.Unlock()
	e.conns.Go(func() {
		e.serve(c)
		c.drop()
		c.client.Close()
		e.leave(c)
		c.belongTo(nil)
		e.counts.ended.Add(1)
		select {
		case e.ended <- struct{}{}:
		default:
		}
	})
}

// leave takes c out of the queue. It reports whether c was still there; if not, it was dropped to make room.
func (e *engine) leave(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.remove(c)
}

func (e *engine) remove(c *conn) bool {
	if c.place == nil {
		return false
	}
	e.queue.Remove(c.place)
	c.place = nil
	if !c.refused {
		e.counts.waiting.Add(-1)
	}
	return true
}

// dropOldest is for those who make room.
func (e *engine) dropOldest(c *conn, age time.Duration) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := e.queue.Front()
	for first != nil && (first.Value == c || first.Value.(*conn).refused && !first.Value.(*conn).told) {
		first = first.Next()
	}
	if first == nil {
		return false
	}
	oldest := first.Value.(*conn)
	if !oldest.refused {
		if age > 0 && now()-oldest.began <= int64(age) {
			return false
		}
		control(oldest.client, complainDropped)
		e.counts.dropped.Add(1)
	}
	e.remove(oldest)
	oldest.drop()
	oldest.client.Close()
	return true
}

// resetSilent is for those who make room.
func (e *engine) resetSilent(rich, needy *tenant) bool {
	if !rich.mayLose(needy) {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	var silent *conn
	for c := range e.relays {
		if c.tenant == rich && (silent == nil || c.active.Load() < silent.active.Load()) {
			silent = c
		}
	}
	if silent == nil {
		return false
	}
	control(silent.client, func(fd int) { complainReset(fd, rich) })
	e.counts.dropped.Add(1)
	silent.endsAs(resetForRoom)
	silent.reset()
	e.removeRelay(silent)
	return true
}

// addRelay counts c as a relay, rather than among those that wait. It fails if c was dropped to make room.
func (e *engine) addRelay(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.remove(c) {
		return false
	}
	c.active.Store(now())
	e.relays[c] = struct{}{}
	c.tenant.relays.Add(1)
	return true
}

func (e *engine) removeRelay(c *conn) {
	if _, is := e.relays[c]; is {
		delete(e.relays, c)
		c.tenant.relays.Add(-1)
	}
}

// serve is the way of a connection: hello, dial, relay.
func (e *engine) serve(c *conn) {
	if late, _ := c.early.Deadline(); c.client.SetReadDeadline(late) != nil {
		return // the poller has no room for it
	}
	hello, name, err := c.hello()
	if err != nil {
		if _, ok := err.(sni.Alert); ok { // otherwise the client is gone
			e.refuse(c, nil, err)
		}
		return
	}
	b, err := e.dial(c, name)
	if err != nil {
		e.refuse(c, name, err)
		return
	}
	c.backend = os.NewFile(uintptr(b.FD), "backend")
	if c.backend.SetDeadline(time.Time{}) == nil && c.client.SetReadDeadline(time.Time{}) == nil && e.addRelay(c) {
		e.relay(c, b, name, hello)
	}
	c.closeBackend()
	e.mu.Lock()
	e.removeRelay(c)
	e.mu.Unlock()
}

// hello reads until the server name is known. It returns all bytes read so far, and the name.
func (c *conn) hello() (hello, name []byte, err error) {
	var parser sni.Parser
	in := newSource(c.client, false)
	for name == nil {
		b, err := in.read(sni.MaxHello - len(hello))
		switch {
		case errors.Is(err, io.EOF):
			return nil, nil, errEOF
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil, errTimeout
		case err != nil:
			return nil, nil, err
		}
		hello = append(hello, b...)
		name, err = parser.Parse(b)
		in.release()
		if parser.Nameless() {
			return hello, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return hello, name, nil
}

// A line has the clients that wait for room: in the backlog of an entry's backend, or for a descriptor for a tenant's
// relay. Whoever has the turn tries again; sniproxy-rs gives up.
type line struct {
	turn  chan struct{}
	users int
}

// dial connects to the backend of a host. It fails with what is in the way at the deadline.
func (e *engine) dial(c *conn, name []byte) (b hostdir.Backend, err error) {
	b, place, err := e.dialOnce(c, name)
	for transient(err) && c.early.Err() == nil {
		e.mu.Lock()
		q := e.lines[place]
		if q == nil {
			q = &line{turn: make(chan struct{}, 1)}
			e.lines[place] = q
		}
		q.users++
		e.mu.Unlock()

		at, why := place, err
		select {
		case q.turn <- struct{}{}:
			for place == at && transient(err) && c.pause(redialPeriod) {
				b, place, err = e.dialOnce(c, name)
			}
			<-q.turn
			if err == errLookupTimeout { // the last of many tries
				err = why
			}
		case <-c.early.Done():
		}

		e.mu.Lock()
		if q.users--; q.users == 0 {
			delete(e.lines, at)
		}
		e.mu.Unlock()
	}
	return b, err
}

// transient tells whether it is worth trying again after an error of a look-up.
func transient(err error) bool { return noRoom(err) || backlogFull(err) || exchanged(err) }

// pause waits. It fails if there is no time left.
func (c *conn) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-c.early.Done():
		return false
	}
}

// dialOnce tries to connect to the backend of a host. If the client has to wait, it does so with those of the same place.
func (e *engine) dialOnce(c *conn, name []byte) (b hostdir.Backend, place tenantKey, err error) {
	entry, _, err := e.hosts.Find(name)
	if err != nil {
		return b, place, err
	}
	t := e.tenants.of(entry)
	c.belongTo(t)
	switch {
	case t.clogged():
		return b, place, errClogged
	case !e.room.forRelay(e, c, t, false):
		return b, t.key(), errNoRoom
	}
	place = tenantKey{t.uid, string(entry.Name)}
	b, err = e.reach(c, t, place.entry, name)
	for noRoom(err) && e.room.forRelay(e, c, t, true) {
		b, err = e.reach(c, t, place.entry, name)
	}
	return b, place, err
}

// reach has a thread look a host up, and connect to its backend.
func (e *engine) reach(c *conn, t *tenant, entry string, name []byte) (hostdir.Backend, error) {
	type result struct {
		b     hostdir.Backend
		found *tenant
		err   error
	}
	done := make(chan result, 1)
	e.threads.start(&task{
		tenant: t,
		entry:  entry,
		do: func(d *hostdir.Dialer) {
			b, found, err := reach(d, e.tenants, name)
			done <- result{b, found, err}
		},
		giveUp: func() { done <- result{err: errLookups} },
	})
	select {
	case r := <-done:
		if r.found != nil {
			c.belongTo(r.found)
		}
		return r.b, r.err
	case <-c.early.Done():
		go func() { // nobody waits for it
			r := <-done
			if r.err == nil {
				e.closeUnread(r.found, r.b.FD)
			}
			if r.found != nil {
				r.found.release()
			}
		}()
		return hostdir.Backend{}, errLookupTimeout
	}
}

// closeUnread closes a socket of a backend of t's that may hold what was not read.
func (e *engine) closeUnread(t *tenant, fd int) {
	if e.hosts.RefusesDescriptors() {
		unix.Close(fd)
	} else {
		t.closeAway(e.threads, fd)
	}
}

// refuse tells the client with an alert why it is not served, and sees to it that the
// alert arrives, which that of sniproxy-rs often does not: it ends the sending side, and reads
// what the client has still to say, within bounds, so that closing does not send a reset, which
// would overtake the alert. Meanwhile the client is the first one to make room.
func (e *engine) refuse(c *conn, name []byte, err error) {
	e.mu.Lock()
	waited := c.place != nil // otherwise it was dropped, and that was said
	if waited {
		c.refused = true
		e.counts.waiting.Add(-1)
	}
	e.mu.Unlock()
	if !waited {
		return
	}
	alert := refusal(name, err)
	control(c.client, func(fd int) { complainRefused(fd, name, alert) })
	e.counts.refused[alert.Description].Add(1)
	record := alert.Description.Record()
	c.client.SetDeadline(time.Now().Add(lingerTimeout))
	if _, err := c.client.Write(record[:]); err != nil {
		return
	}
	e.mu.Lock()
	if c.told = true; c.place != nil {
		e.queue.MoveToFront(c.place)
	}
	e.mu.Unlock()
	linger(c.client)
}
