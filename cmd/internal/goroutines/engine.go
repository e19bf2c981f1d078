// Package goroutines is the engine for systems other than Linux, and for the build tag portable. It
// is the plain statement of what sniproxy does: a goroutine for each client, and a second one for
// its relay, on Go's own poller. Read it in order, from [Start] on: accept, hello, dial and refuse
// are in engine.go, the relay is in relay.go, who waits and who makes room in room.go.
//
// It keeps the whole contract: what clients are told and when, how bytes, ends and resets are
// passed on, what tenants share, who makes room, what is counted and logged, and how the program
// stops. An idle relay has two descriptors and no buffer.
//
// It does not promise what only event loops can. An idle relay has the stacks of two goroutines.
// Bulk is copied. Each look-up takes one of the threads of package shares, so while hanging file
// systems have all of these, other hosts are refused too.
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
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
	"sniproxy/proxyproto"
	"sniproxy/sni"
)

// An Engine accepts clients and serves them.
type Engine struct {
	hosts     *hostdir.Hosts
	shares    *shares.Shares
	logAll    *report.LogAll
	front     *report.AcceptProxy
	counters  report.Counters
	listeners []*os.File
	running   sync.WaitGroup // goroutines that accept, and one for each client
	drained   chan struct{}
	failed    chan error

	// A client waits, then has a relay, or is refused. It is in none of these once it was dropped.
	mu      sync.Mutex
	waiting list.List // of *conn: those that were refused, then the others in order of arrival
	relays  map[*conn]struct{}
	lines   map[shares.Key]*line
}

// A conn is a client's connection, and from the relay on the one to its backend.
type conn struct {
	engine   *Engine
	client   *os.File
	accepted int64 // by the clock of limits
	peer     socket.Address
	headed   bool               // a PROXY header must come before the hello, and is not complete yet
	from     *proxyproto.Header // what a balancer has sent of the client's addresses, if anything
	address  bool               // it has sent an IPv6 address in place of a server name
	cancel   context.CancelFunc // ends all that it waits for before its relay
	tenant   *shares.Tenant     // whose host it is for, once that is known
	queued   *list.Element      // in the engine's list, under its lock; nil if it is not there
	refused  bool               // under the engine's lock

	// Of the relay.
	backend *os.File
	first   []byte          // the header and the hello, until they are sent
	header  int             // bytes of the header that are not sent yet
	moved   atomic.Int64    // when bytes were sent on last
	ended   [2]atomic.Int64 // when the ways Up and Down ended, with all sent on; 0 before
	sent    report.Traffic
	sending sync.Mutex // to the backend
	lost    bool       // a write failed, and the backend was reset or may have been; under sending
	deaf    bool       // the backend has stopped reading
	ending  sync.Once
	how     string // the relay has ended
}

// Start starts an engine that accepts clients from the listeners, and serves those that are there
// already. Own is how many descriptors the program has besides those of connections.
func Start(hosts *hostdir.Hosts, listeners []*inherit.Listener, clients []int, own int64) (*Engine, error) {
	e := &Engine{
		hosts:   hosts,
		logAll:  report.NewLogAll(hosts),
		front:   report.NewAcceptProxy(hosts),
		drained: make(chan struct{}),
		failed:  make(chan error, len(listeners)),
		relays:  map[*conn]struct{}{},
		lines:   map[shares.Key]*line{},
	}
	e.shares = shares.New(hosts, own, len(listeners) == 0, e)
	go e.endSilent()
	for _, l := range listeners {
		f, err := pollable(&l.FD)
		if err != nil {
			return nil, err
		}
		e.listeners = append(e.listeners, f)
		e.running.Go(func() { e.accept(l, f) })
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
			e.serve(f)
		}
	}
	return e, nil
}

// pollable returns a file for the socket fd that Go's poller knows. Its descriptor takes the place
// of fd. The poller refuses a file that is blocking, and whoever shares the socket can make it so
// at any time; hence the loop.
func pollable(fd *int) (*os.File, error) {
	for {
		dup, err := unix.FcntlInt(uintptr(*fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		if err := unix.SetNonblock(dup, true); err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(dup), "socket")
		if f.SetDeadline(time.Time{}) == nil {
			unix.Close(*fd)
			*fd = dup
			return f, nil
		}
		f.Close()
	}
}

// spare is how many descriptors accept leaves to look-ups, as it could be quicker than they are.
const spare = 4

// accept accepts clients until the listener is closed. No other failure ends it, as any ends
// sniproxy-rs.
func (e *Engine) accept(l *inherit.Listener, f *os.File) {
	for {
		fd, err := acceptOne(f)
		full := err == unix.EMFILE || err == unix.ENFILE
		if err == nil {
			e.serve(os.NewFile(uintptr(fd), "client"))
			full = e.shares.Room.Full(spare)
		}
		if full {
			runtime.Gosched() // those accepted last have not looked for their hello yet
			if e.shares.Room.CloseIdle() || e.dropOldest(nil, 0) {
				continue
			}
		}
		switch err {
		case nil, unix.ECONNABORTED: // only that client is gone
			continue
		case os.ErrClosed:
			return
		}
		if !l.StillListens() {
			e.failed <- l.ShutDown()
			return
		}
		report.AcceptFailed(err)
		time.Sleep(limits.AcceptPause) // clients wait in the backlog
	}
}

// acceptOne waits for a client and accepts it.
func acceptOne(listener *os.File) (client int, err error) {
	raw, err := listener.SyscallConn()
	if err != nil {
		return -1, os.ErrClosed
	}
	closed := raw.Read(func(fd uintptr) bool {
		err = unix.EINTR
		for err == unix.EINTR {
			// Whoever shares the socket can make it blocking, as systemd does whenever it starts
			// something with it: even between these two calls, but SO_RCVTIMEO bounds that wait.
			if err = unix.SetNonblock(int(fd), true); err == nil {
				client, err = accept(int(fd))
			}
		}
		if err == unix.EMFILE || err == unix.ENFILE {
			return socket.Events(int(fd)) != 0 // accept(2) says so before it looks for a client
		}
		return err != unix.EAGAIN
	})
	if closed != nil {
		return -1, os.ErrClosed
	}
	return client, err
}

// serve begins to serve a client. Whatever it waits for before its relay ends at one deadline.
func (e *Engine) serve(client *os.File) {
	ctx, cancel := context.WithTimeout(context.Background(), limits.Hello)
	c := &conn{engine: e, client: client, accepted: limits.Now(), cancel: cancel, headed: e.front.Yes()}
	control(client, func(fd int) { c.peer = socket.Peer(fd) })
	e.counters.Accepted.Add(1)
	e.counters.Waiting.Add(1)
	e.mu.Lock()
	c.queued = e.waiting.PushBack(c)
	e.mu.Unlock()
	e.running.Go(func() {
		c.run(ctx)
		cancel()
		c.client.Close()
		if c.backend != nil {
			c.closeBackend()
		}
		e.mu.Lock()
		e.leave(c)
		e.endRelay(c)
		e.mu.Unlock()
		c.belongTo(nil)
		e.counters.Ended.Add(1)
	})
}

// run takes a client from its hello to its end.
func (c *conn) run(ctx context.Context) {
	if late, _ := ctx.Deadline(); c.client.SetReadDeadline(late) != nil {
		return // the poller has no room for it
	}
	hello, name, err := c.hello()
	if err != nil {
		if _, is := err.(sni.Alert); is { // otherwise the client is gone
			c.refuse(nil, err)
		}
		return
	}
	b, err := c.dial(ctx, name, hello)
	switch {
	case err == errGone:
		return
	case err != nil:
		c.refuse(name, err)
		return
	case b.Datagram: // it was handed over
		return
	}
	c.backend = os.NewFile(uintptr(b.FD), "backend")
	err = errors.Join(c.backend.SetDeadline(time.Time{}), c.client.SetReadDeadline(time.Time{}))
	if err != nil {
		c.refuse(name, err) // the poller has no room for the backend
	} else if c.beginRelay() {
		c.relay(b, name, hello)
	}
}

// hello reads until the server name is known. It returns all that was read, without the PROXY header
// of a balancer, and the name, which is empty if the client names no host.
func (c *conn) hello() (hello, name []byte, err error) {
	var parser sni.Parser
	var bad error // in place of a PROXY header
	for done := false; !done && err == nil; {
		err = c.read(c.client, sni.MaxHello-len(hello), func(b []byte) error {
			hello = append(hello, b...)
			if c.headed {
				if hello, bad = c.readHeader(hello); bad != nil || c.headed {
					return bad
				}
				b = hello
			}
			name, done, err = parser.Parse(b)
			return err
		})
	}
	c.address = parser.Address()
	sent := &parser
	if len(hello) == 0 {
		sent = nil
	}
	switch _, failed := err.(unix.Errno); {
	case bad != nil:
		err = c.closeUnheaded(bad)
	case c.headed && sent != nil && errors.Is(err, io.EOF):
		err = c.closeUnheaded(report.ErrHeaderEnded)
	case c.headed && errors.Is(err, os.ErrDeadlineExceeded):
		err = c.closeUnheaded(report.ErrHeaderLate)
	case errors.Is(err, io.EOF):
		err = report.Ended(sent)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = report.Late(sent)
	case failed && sent == nil: // a reset
		c.engine.counters.Empty.Add(1)
	}
	return hello, name, err
}

// readHeader reads the PROXY header at the beginning of b, and takes it away once it is complete.
func (c *conn) readHeader(b []byte) ([]byte, error) {
	h, n, err := proxyproto.Parse(b)
	if n > 0 {
		c.headed = false
		if h.Client.IsValid() {
			c.from, c.peer = &h, socket.AddressOf(h.Client)
		}
	}
	return b[n:], err
}

// closeUnheaded is for a client without the PROXY header that it must have.
func (c *conn) closeUnheaded(why error) error {
	c.engine.mu.Lock()
	waited := c.engine.leave(c)
	c.engine.mu.Unlock()
	if waited { // otherwise it was dropped, and that was said
		c.engine.counters.CloseUnheaded(c.peer, why)
	}
	return errGone
}

// dial connects to the backend of the host with a name, or hands the connection over. At the
// deadline it fails with what was in the way.
func (c *conn) dial(ctx context.Context, name, hello []byte) (hostdir.Backend, error) {
	b, key, err := c.tryDial(ctx, name, hello)
	for mayPass(err) && ctx.Err() == nil {
		at, why := key, err
		c.engine.inTurn(ctx, at, func() {
			for key == at && mayPass(err) && ctx.Err() == nil {
				if b, key, err = c.tryDial(ctx, name, hello); mayPass(err) {
					time.Sleep(limits.Redial)
				}
			}
		})
		if err == report.ErrLookupTimeout {
			err = why
		}
	}
	return b, err
}

// A line is of clients that wait for the same room: in the backlog of an entry's backend, or for
// descriptors for a tenant's relay. One of them at a time tries again; sniproxy-rs gives up.
type line struct {
	turn    chan struct{} // full while somebody has it
	clients int
}

// inTurn waits for the turn in a line and calls try, unless ctx ends first.
func (e *Engine) inTurn(ctx context.Context, key shares.Key, try func()) {
	e.mu.Lock()
	l := e.lines[key]
	if l == nil {
		l = &line{turn: make(chan struct{}, 1)}
		e.lines[key] = l
	}
	l.clients++
	e.mu.Unlock()

	select {
	case l.turn <- struct{}{}:
		try()
		<-l.turn
	case <-ctx.Done():
	}

	e.mu.Lock()
	if l.clients--; l.clients == 0 {
		delete(e.lines, key)
	}
	e.mu.Unlock()
}

// mayPass tells whether it is worth trying again.
func mayPass(err error) bool {
	return err == hostdir.NoRoom || err == hostdir.BacklogFull || err == hostdir.Exchanged
}

// tryDial tries once to do so. The key is of the line to wait in.
func (c *conn) tryDial(ctx context.Context, name, hello []byte) (b hostdir.Backend, key shares.Key, err error) {
	entry, _, err := c.engine.hosts.Find(name)
	if err != nil {
		return b, key, err
	}
	t := c.engine.shares.Tenants.Of(entry)
	c.belongTo(t)
	if t.Clogged() {
		return b, key, report.ErrClogged
	}
	was := t.HasDatagram(entry.Name) // then it takes no room
	short := false                   // the system has refused a descriptor
	for was && !short || c.engine.shares.Room.ForRelay(c, t, short) {
		b, err = c.lookUp(ctx, t, string(entry.Name), name)
		if short = err == hostdir.NoRoom; short {
			continue
		}
		if is := b.Datagram; err == nil && is != was {
			t.SetDatagram(entry.Name, is)
			// A relay takes room, which nobody has made if none was expected.
			if was && !c.engine.shares.Room.ForRelay(c, t, false) {
				t.CloseAway(c.engine.shares.Threads, b.FD)
				break
			}
		}
		if err == nil && b.Datagram {
			err = c.handOver(b, name, hello)
		}
		return b, t.EntryKey(entry.Name), err
	}
	return b, t.Key(), hostdir.NoRoom
}

var errGone = errors.New("the client is gone, or was dropped")

// handOver hands the connection itself over to the backend, with a header, if asked for, and all
// bytes read so far. Then it is no business of the program any more.
func (c *conn) handOver(b hostdir.Backend, name, hello []byte) error {
	e := c.engine
	err := errGone
	sent := false
	control(c.client, func(fd int) {
		var header []byte
		_, gone := unix.Getpeername(fd)
		if b.Proxy > 0 && gone == nil {
			header, gone = socket.Header(fd, c.from, b.Proxy, name)
		}
		if gone != nil {
			return
		}
		access := e.logAll.AccessLine(limits.Now(), c.peer, name, b.Log)
		first := append(header, hello...)
		e.mu.Lock()
		defer e.mu.Unlock()
		if c.queued == nil { // it was dropped to make room
			return
		}
		socket.SetPlain(fd)
		if sent, err = socket.HandOver(b.FD, first, fd); !sent {
			unix.SetNonblock(fd, true)
			return
		}
		e.leave(c)
		// The socket is the backend's as well by now. If he lets it linger, the last close waits.
		if socket.Lingers(fd) {
			if own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
				c.tenant.CloseAway(e.shares.Threads, own)
			}
		}
		e.counters.Handed.Add(1)
		e.counters.Bytes[report.Up].Add(int64(len(hello)))
		access.Print(report.Traffic{report.Up: int64(len(hello))}, time.Duration(limits.Now()-c.accepted), report.HandedOver)
	})
	e.shares.Sent(c.tenant, b.FD, sent)
	return err
}

// lookUp has a thread look the host up and connect to its backend. The thread may hang, so the
// client waits until the deadline, and what the thread finds later it closes itself.
func (c *conn) lookUp(ctx context.Context, t *shares.Tenant, entry string, name []byte) (hostdir.Backend, error) {
	var b hostdir.Backend
	var found *shares.Tenant
	var err error
	s := c.engine.shares
	done, givenUp := make(chan struct{}), make(chan struct{})
	s.Threads.Start(&shares.Task{
		Tenant: t,
		Entry:  entry,
		Do: func(d *hostdir.Dialer) {
			if ctx.Err() != nil {
				return
			}
			b, found, err = s.Reach(d, name)
			select {
			case done <- struct{}{}:
				return
			case <-ctx.Done():
			}
			switch {
			case err != nil:
			case b.Datagram:
				s.Sent(found, b.FD, false)
			default:
				unix.Close(b.FD) // the thread has the time that this may take
			}
			if found != nil {
				found.Release()
			}
		},
		GiveUp: func() { close(givenUp) },
	})
	select {
	case <-done:
		if found != nil {
			c.belongTo(found)
		}
		return b, err
	case <-givenUp:
		return hostdir.Backend{}, report.ErrLookups
	case <-ctx.Done():
		return hostdir.Backend{}, report.ErrLookupTimeout
	}
}

// belongTo says whose host c is for. It takes over the use of t.
func (c *conn) belongTo(t *shares.Tenant) {
	if c.tenant != nil {
		c.tenant.Release()
	}
	c.tenant = t
}

// refuse tells the client with an alert why it is not served, and sees to it that the alert
// arrives; that of sniproxy-rs often does not. From then on the client is the first to make room.
func (c *conn) refuse(name []byte, err error) {
	e := c.engine
	e.mu.Lock()
	waited := e.leave(c)
	e.mu.Unlock()
	if !waited {
		return // it was dropped, and that was said
	}
	alert := report.Alert(name, c.address, err)
	e.counters.Refuse(c.peer, name, alert)
	record := alert.Description.Record()
	c.client.SetWriteDeadline(time.Now().Add(limits.Linger))
	if _, err := c.client.Write(record[:]); err != nil {
		return
	}
	e.mu.Lock()
	c.queued, c.refused = e.waiting.PushFront(c), true
	e.mu.Unlock()
	c.linger()
}

// Descriptors returns how many descriptors the engine has itself: pollable has one for a moment.
func Descriptors(int) int64 { return 1 }

// Counters returns the only ones.
func (e *Engine) Counters() report.All { return report.All{&e.counters} }

// Failed gets the reason if the engine cannot go on.
func (e *Engine) Failed() <-chan error { return e.failed }

// Drained is closed when the last connection has ended after Stop.
func (e *Engine) Drained() <-chan struct{} { return e.drained }

// Stop ends accepting, and lets go of the listening sockets. It returns when that is done.
func (e *Engine) Stop() {
	for _, f := range e.listeners {
		f.Close()
	}
	go func() {
		e.running.Wait()
		close(e.drained)
	}()
}

// Cut ends all relays, and waits a moment for that.
func (e *Engine) Cut() {
	e.mu.Lock()
	for c := range e.relays {
		c.end(report.CutAtStop)
	}
	e.mu.Unlock()
	select {
	case <-e.drained:
	case <-time.After(limits.Cut):
	}
}
