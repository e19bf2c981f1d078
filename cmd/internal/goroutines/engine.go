package goroutines

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

	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

// The portable engine accepts connections and serves them, with a goroutine for each direction of each
// connection, on Go's own poller. It is the plain statement of what the program does.
type Engine struct {
	hosts  *hostdir.Hosts
	shares *shares.Shares
	logAll *report.LogAll

	files   []*os.File    // the listening sockets, for the poller
	failed  chan error    // gets the reason if the engine cannot go on
	drained chan struct{} // closed when the last connection has ended after stop
	conns   sync.WaitGroup
	counts  report.Counters
	ended   chan struct{} // gets something when a connection has ended

	mu     sync.Mutex
	queue  list.List // of *conn: those that are not relays yet, in order of arrival; refused ones are first
	relays map[*conn]struct{}
	lines  map[shares.Key]*line
}

// Start starts an engine that accepts from the listeners, and serves the clients that are
// there already. The program has own descriptors itself.
func Start(hosts *hostdir.Hosts, listeners []*inherit.Listener, clients []int, own int64) (*Engine, error) {
	e := &Engine{
		hosts:   hosts,
		logAll:  report.NewLogAll(hosts),
		failed:  make(chan error, len(listeners)),
		drained: make(chan struct{}),
		ended:   make(chan struct{}, 1),
		relays:  map[*conn]struct{}{},
		lines:   map[shares.Key]*line{},
	}
	e.shares = shares.New(hosts, own, len(listeners) == 0, e)
	for _, l := range listeners {
		f, err := pollable(&l.FD)
		if err != nil {
			return nil, err
		}
		e.files = append(e.files, f)
		e.conns.Go(func() { e.accept(l, f) })
	}
	if len(clients) > 0 {
		e.logAll.Await()
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

// Descriptors returns how many descriptors the engine has itself: pollable takes one for a moment.
func Descriptors(int) int64 { return 1 }

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

// Stop ends accepting, and lets go of the listening sockets. It returns when that is done.
func (e *Engine) Stop() {
	for _, f := range e.files {
		f.Close()
	}
	go func() {
		e.conns.Wait()
		close(e.drained)
	}()
}

// Counters returns the only ones.
func (e *Engine) Counters() report.All { return report.All{&e.counts} }

// Drained is closed when the last connection has ended after Stop.
func (e *Engine) Drained() <-chan struct{} { return e.drained }

// Failed gets the reason if the engine cannot go on.
func (e *Engine) Failed() <-chan error { return e.failed }

// RelayDescriptors returns how many descriptors relays have.
func (e *Engine) RelayDescriptors() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return 2 * int64(len(e.relays))
}

// NotRelays returns how many connections are no relays.
func (e *Engine) NotRelays() int64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return int64(e.queue.Len())
}

// Cut ends all relays, and waits a moment for that.
func (e *Engine) Cut() {
	e.mu.Lock()
	for c := range e.relays {
		c.endsAs(report.CutAtStop)
		c.close()
	}
	e.mu.Unlock()
	select {
	case <-e.drained:
	case <-time.After(limits.Cut):
	}
}

// A conn is a client's connection.
type conn struct {
	engine          *Engine
	client, backend *os.File
	began           int64           // when it was accepted, by the clock of now
	early           context.Context // until its relay begins: done at the deadline, and when it is dropped to make room
	drop            context.CancelFunc
	place           *list.Element // in the queue
	refused, told   bool
	tenant          *shares.Tenant // whose host it is for, once that is known

	active  atomic.Int64 // when the relay last moved something
	drained atomic.Bool  // all was read that the backend had to say
	header  int          // bytes of the PROXY header that are not sent yet
	sent    report.Traffic
	access  *report.AccessLine // if it is to be told of at its end

	mu  sync.Mutex
	how string // it ends
}

// belongTo says whose host c is for. It takes over the use of t.
func (c *conn) belongTo(t *shares.Tenant) {
	if c.tenant != nil {
		c.tenant.Release()
	}
	c.tenant = t
}

// accept accepts connections until the file of the listener is closed. No failure ends it, as any
// would end sniproxy-rs.
func (e *Engine) accept(l *inherit.Listener, f *os.File) {
	for {
		fd, err := acceptOne(l, f)
		switch err {
		case nil:
			e.begin(os.NewFile(uintptr(fd), "client"))
			if e.shares.Room.Full(roomLeft) {
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
			if !l.StillListens() {
				e.failed <- l.ShutDown()
				return
			}
			e.pause(err)
		}
	}
}

func acceptOne(l *inherit.Listener, f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, os.ErrClosed
	}
	closed := raw.Read(func(uintptr) bool {
		fd, err = accept(l.FD)
		for err == unix.EINTR {
			fd, err = accept(l.FD)
		}
		if (err == unix.EMFILE || err == unix.ENFILE) && !l.Pending() {
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

// pause waits after a failure of accept that has a cause outside of the connection, for
// one to end or for limits.AcceptPause. The clients wait in the backlog.
func (e *Engine) pause(err error) {
	report.AcceptFailed(err)
	select {
	case <-e.ended:
	case <-time.After(limits.AcceptPause):
	}
}

// begin begins to serve a client.
func (e *Engine) begin(client *os.File) {
	c := &conn{engine: e, client: client, began: limits.Now()}
	c.early, c.drop = context.WithTimeout(context.Background(), limits.Hello)
	e.counts.Accepted.Add(1)
	e.counts.Waiting.Add(1)
	e.mu.Lock()
	c.place = e.queue.PushBack(c)
	e.mu.Unlock()
	e.conns.Go(func() {
		e.serve(c)
		c.drop()
		c.client.Close()
		e.leave(c)
		c.belongTo(nil)
		e.counts.Ended.Add(1)
		select {
		case e.ended <- struct{}{}:
		default:
		}
	})
}

// leave takes c out of the queue. It reports whether c was still there; if not, it was dropped to make room.
func (e *Engine) leave(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.remove(c)
}

func (e *Engine) remove(c *conn) bool {
	if c.place == nil {
		return false
	}
	e.queue.Remove(c.place)
	c.place = nil
	if !c.refused {
		e.counts.Waiting.Add(-1)
	}
	return true
}

// A roomFor makes room for a connection.
type roomFor struct {
	*Engine
	c *conn
}

// DropOldest is for those who make room.
func (r roomFor) DropOldest(age time.Duration) bool { return r.dropOldest(r.c, age) }

func (e *Engine) dropOldest(c *conn, age time.Duration) bool {
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
		if age > 0 && limits.Now()-oldest.began <= int64(age) {
			return false
		}
		control(oldest.client, report.Dropped)
		e.counts.Dropped.Add(1)
	}
	e.remove(oldest)
	oldest.drop()
	oldest.client.Close()
	return true
}

// ResetSilent is for those who make room.
func (e *Engine) ResetSilent(rich, needy *shares.Tenant) bool {
	if !rich.MayLose(needy) {
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
	control(silent.client, func(fd int) { report.Reset(fd, rich) })
	e.counts.Dropped.Add(1)
	silent.endsAs(report.ResetForRoom)
	silent.reset()
	e.removeRelay(silent)
	return true
}

// addRelay counts c as a relay, rather than among those that wait. It fails if c was dropped to make room.
func (e *Engine) addRelay(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.remove(c) {
		return false
	}
	c.active.Store(limits.Now())
	e.relays[c] = struct{}{}
	c.tenant.Relays.Add(1)
	return true
}

func (e *Engine) removeRelay(c *conn) {
	if _, is := e.relays[c]; is {
		delete(e.relays, c)
		c.tenant.Relays.Add(-1)
	}
}

// serve is the way of a connection: hello, dial, relay.
func (e *Engine) serve(c *conn) {
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
	for done := false; !done; {
		b, err := in.read(sni.MaxHello - len(hello))
		switch {
		case errors.Is(err, io.EOF):
			return nil, nil, report.ErrEOF
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil, report.ErrTimeout
		case err != nil:
			return nil, nil, err
		}
		hello = append(hello, b...)
		name, done, err = parser.Parse(b)
		in.release()
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
func (e *Engine) dial(c *conn, name []byte) (b hostdir.Backend, err error) {
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
			for place == at && transient(err) && c.pause(limits.Redial) {
				b, place, err = e.dialOnce(c, name)
			}
			<-q.turn
			if err == report.ErrLookupTimeout { // the last of many tries
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
func transient(err error) bool {
	return err == hostdir.NoRoom || err == hostdir.BacklogFull || err == hostdir.Exchanged
}

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
func (e *Engine) dialOnce(c *conn, name []byte) (b hostdir.Backend, place shares.Key, err error) {
	entry, _, err := e.hosts.Find(name)
	if err != nil {
		return b, place, err
	}
	t := e.shares.Tenants.Of(entry)
	c.belongTo(t)
	switch {
	case t.Clogged():
		return b, place, report.ErrClogged
	case !e.shares.Room.ForRelay(roomFor{e, c}, t, false):
		return b, t.Key(), hostdir.NoRoom
	}
	place = t.EntryKey(entry.Name)
	b, err = e.reach(c, t, string(entry.Name), name)
	for err == hostdir.NoRoom && e.shares.Room.ForRelay(roomFor{e, c}, t, true) {
		b, err = e.reach(c, t, string(entry.Name), name)
	}
	return b, place, err
}

// reach has a thread look a host up, and connect to its backend.
func (e *Engine) reach(c *conn, t *shares.Tenant, entry string, name []byte) (hostdir.Backend, error) {
	type result struct {
		b     hostdir.Backend
		found *shares.Tenant
		err   error
	}
	done := make(chan result, 1)
	e.shares.Threads.Start(&shares.Task{
		Tenant: t,
		Entry:  entry,
		Do: func(d *hostdir.Dialer) {
			b, found, err := e.shares.Reach(d, name)
			done <- result{b, found, err}
		},
		GiveUp: func() { done <- result{err: report.ErrLookups} },
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
				r.found.Release()
			}
		}()
		return hostdir.Backend{}, report.ErrLookupTimeout
	}
}

// closeUnread closes a socket of a backend of t's that may hold what was not read.
func (e *Engine) closeUnread(t *shares.Tenant, fd int) {
	if e.hosts.RefusesDescriptors() {
		unix.Close(fd)
	} else {
		t.CloseAway(e.shares.Threads, fd)
	}
}

// refuse tells the client with an alert why it is not served, and sees to it that the
// alert arrives, which that of sniproxy-rs often does not: it ends the sending side, and reads
// what the client has still to say, within bounds, so that closing does not send a reset, which
// would overtake the alert. Meanwhile the client is the first one to make room.
func (e *Engine) refuse(c *conn, name []byte, err error) {
	e.mu.Lock()
	waited := c.place != nil // otherwise it was dropped, and that was said
	if waited {
		c.refused = true
		e.counts.Waiting.Add(-1)
	}
	e.mu.Unlock()
	if !waited {
		return
	}
	alert := report.Alert(name, err)
	control(c.client, func(fd int) { report.Refused(fd, name, alert) })
	e.counts.Refused[alert.Description].Add(1)
	record := alert.Description.Record()
	c.client.SetDeadline(time.Now().Add(limits.Linger))
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
