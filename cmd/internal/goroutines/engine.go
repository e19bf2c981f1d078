// Package goroutines is the engine for systems other than Linux, and for the build tag portable. It
// is the plain statement of what sniproxy does: a goroutine for each client, and a second one for
// its relay, on Go's own poller. Read it in order, from [Start] on: accept, hello, dial and refuse
// are in engine.go, the relay is in relay.go, who waits and who makes room in room.go.
//
// It keeps the whole contract: what clients are told and when, how bytes, ends and resets are
// passed on, what tenants share, who makes room, what is counted and logged, and how the program
// stops. An idle relay has two descriptors and no buffer.
//
// A client's hello may be encrypted (package ech). Then its connection has a session until no
// second hello can come any more, through which the client's bytes go. The way to the client tells
// it what the backend has said, and wakes up the way from the client.
//
// It does not promise what only event loops can. An idle relay has the stacks of two goroutines.
// Bulk is copied. When there are more clients than descriptors all of a sudden, it may drop one
// whose goroutine has not had the time yet to look for the hello. Each look-up takes one of the
// threads of package shares, so while hanging file systems have all of these, other hosts are
// refused too.
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
	"sniproxy/sni/ech"
)

// An Engine accepts clients and serves them.
type Engine struct {
	hosts     *hostdir.Hosts
	shares    *shares.Shares
	logAll    *report.LogAll
	front     *report.AcceptProxy
	keys      *report.Keys
	counters  report.Counters
	listeners []*os.File
	running   sync.WaitGroup // goroutines that accept, and one for each client

	Counters report.All
	Failed   chan error    // gets the reason if the engine cannot go on
	Drained  chan struct{} // closed when the last connection has ended after Stop

	// A client is first queued, then has a relay, or is refused and queued again. It is in none of
	// these once it was dropped.
	mu     sync.Mutex
	queue  list.List // of *conn: those that were refused, then the others in order of arrival
	relays map[*conn]struct{}
	lines  map[shares.Key]*line
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
	queued   *list.Element      // in the engine's queue, under its lock; nil if it is not there
	refused  bool               // under the engine's lock
	dropped  bool               // under the engine's lock

	session *ech.Session // if the hello was encrypted; under opening, once there is a relay
	opening sync.Mutex
	late    time.Time // when the client must have sent its second hello, zero if it need not

	// Of the relay.
	backend *os.File
	first   []byte          // the header and the hello, until they are sent
	header  int             // bytes of the header that are not sent yet
	moved   atomic.Int64    // when bytes were sent on last
	ended   [2]atomic.Int64 // when the ways Up and Down ended, with all sent on; 0 before
	proxy   uint8           // version of the header
	sent    report.Traffic
	sending sync.Mutex                // to the backend
	lost    bool                      // a write failed, and the backend was reset or may have been; under sending
	deaf    bool                      // the backend has stopped reading
	gone    atomic.Bool               // the client has ended, or the relay was ended
	bad     atomic.Pointer[sni.Alert] // why the client is refused after all
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
		keys:    report.NewKeys(hosts),
		Failed:  make(chan error, len(listeners)),
		Drained: make(chan struct{}),
		relays:  map[*conn]struct{}{},
		lines:   map[shares.Key]*line{},
	}
	e.Counters = report.All{&e.counters}
	e.shares = shares.New(hosts, own, len(listeners) == 0, e.Counters)
	go e.endSilent()
	for _, l := range listeners {
		f, err := inherit.Pollable(&l.FD)
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
		f, err := inherit.Pollable(&fd)
		if err != nil {
			return nil, err
		}
		e.serve(f, socket.Peer(fd))
	}
	return e, nil
}

// spare is how many descriptors accept leaves to look-ups, as it could be quicker than they are.
const spare = 4

// accept accepts clients until the listener is closed. No other failure ends it, as any ends
// sniproxy-rs.
func (e *Engine) accept(l *inherit.Listener, f *os.File) {
	for {
		fd, peer, err := inherit.Accept(f)
		full := err == unix.EMFILE || err == unix.ENFILE
		if err == nil {
			e.serve(os.NewFile(uintptr(fd), "client"), peer)
			full = e.shares.Full(spare)
		}
		if full {
			runtime.Gosched() // those accepted last have not looked for their hello yet
			if e.shares.CloseIdle() || e.dropOldest(nil, 0) {
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
			e.Failed <- l.ShutDown()
			return
		}
		report.AcceptFailed(err)
		time.Sleep(limits.AcceptPause) // clients wait in the backlog
	}
}

// serve begins to serve a client. Whatever it waits for before its relay ends at one deadline.
func (e *Engine) serve(client *os.File, peer socket.Address) {
	ctx, cancel := context.WithTimeout(context.Background(), limits.Hello)
	c := &conn{engine: e, client: client, peer: peer, accepted: limits.Now(), cancel: cancel, headed: e.front.Yes()}
	e.counters.Accepted.Add(1)
	e.counters.Waiting.Add(1)
	e.mu.Lock()
	c.queued = e.queue.PushBack(c)
	e.mu.Unlock()
	e.running.Go(func() {
		c.run(ctx)
		cancel()
		c.client.Close()
		if c.backend != nil {
			c.closeBackend()
		}
		e.mu.Lock()
		e.drop(c)
		e.mu.Unlock()
		shares.Hold(&c.tenant, nil)
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
			c.refuse(name, err)
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

// hello reads until the server name is known. It returns all that was read, without the PROXY
// header of a balancer, and the name, which is empty if the client names no host.
func (c *conn) hello() (hello, name []byte, err error) {
	var parser sni.Parser
	var scanner ech.Scanner
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
			if done && err == nil {
				hello, name, done, err = c.open(&parser, &scanner, hello, name)
			}
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

// open goes on with a hello whose server name is known. With keys for Encrypted Client Hello it
// takes all of the hello, and if that was encrypted to one of them, the inner hello and its name
// take the places of the outer one. Done tells whether the hello is complete.
func (c *conn) open(parser *sni.Parser, scanner *ech.Scanner, hello, name []byte) (_, _ []byte, done bool, err error) {
	keys := c.engine.keys.Get()
	if keys == nil {
		return hello, name, true, nil
	}
	end, err := scanner.End(hello)
	if err != nil || end == 0 {
		return hello, name, false, err
	}
	inner, session, err := ech.Open(nil, keys, hello[:end])
	if err != nil || session == nil {
		return hello, name, true, err
	}
	c.session = session
	*parser = sni.Parser{}
	name, _, err = parser.Parse(inner)
	if err == nil {
		inner, err = session.FromClient(inner, hello[end:])
	}
	return inner, name, true, err
}

// readHeader reads the PROXY header at the beginning of b, and takes it away once it is complete.
func (c *conn) readHeader(b []byte) ([]byte, error) {
	h, n, err := proxyproto.Parse(b)
	if n > 0 {
		c.headed = false
		if h.Client.IsValid() {
			c.from, c.peer = &h, socket.AddressFrom(h.Client)
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
	return err == hostdir.NoRoom || err == hostdir.BacklogFull || err == hostdir.Exchanged || hostdir.FindAnew(err)
}

// tryDial tries once to do so. The key is of the line to wait in.
func (c *conn) tryDial(ctx context.Context, name, hello []byte) (b hostdir.Backend, key shares.Key, err error) {
	entry, err := c.findEntry(ctx, name)
	if err != nil {
		return b, key, err
	}
	t := c.tenant
	if t.Clogged() {
		return b, key, report.ErrClogged
	}
	datagram := t.HasDatagram([]byte(entry)) // then it takes no room
	for short := false; datagram && !short || c.engine.shares.RoomForRelay(c, t, short); short = true {
		if b, err = c.lookUp(ctx, t, entry, name); err == hostdir.NoRoom {
			continue
		}
		switch {
		case err == nil && b.Datagram && c.session != nil:
			c.engine.shares.Sent(c.tenant, b.FD, false)
			err = report.ErrHidden
		case err == nil && b.Datagram:
			err = c.handOver(b, name, hello)
		}
		return b, t.EntryKey([]byte(entry)), err
	}
	return b, t.Key, hostdir.NoRoom
}

// findEntry finds the entry that serves the name, and notes whose it is. A thread does so if
// somebody may keep the hosts directory locked. All such look-ups are one tenant's, since nobody
// knows better yet.
func (c *conn) findEntry(ctx context.Context, name []byte) (string, error) {
	s := c.engine.shares
	entry, _, err := c.engine.hosts.Find(name, false)
	switch err {
	case nil:
		shares.Hold(&c.tenant, s.Tenants.Of(entry))
		return string(entry.Name), nil
	case hostdir.MayWait:
		shares.Hold(&c.tenant, s.Tenants.Unknown(nil))
		q := &shares.Query{Task: shares.Task{Tenant: c.tenant, Entry: string(name)}, Name: name}
		if err = c.await(ctx, q, s.AskEntry); err == nil { // otherwise the thread may still have q
			return q.Found, nil
		}
	}
	return "", err
}

var errGone = errors.New("the client is gone, or was dropped")

// handOver hands the connection itself over to the backend, with a header, if asked for, and all
// bytes read so far. Then it is no business of the program any more.
func (c *conn) handOver(b hostdir.Backend, name, hello []byte) error {
	e := c.engine
	sent, lingers, err := false, false, error(errGone)
	// The lock comes before the use of the descriptor: whoever drops c has the lock, and closing
	// waits for that use.
	e.mu.Lock()
	if c.queued != nil { // otherwise it was dropped to make room
		socket.Control(c.client, func(fd int) {
			if sent, err = c.handOverFD(fd, b, name, hello); sent {
				lingers = socket.Lingers(fd)
			}
		})
	}
	e.mu.Unlock()
	if lingers {
		// The socket is the backend's as well by now. If he lets it linger, the last close waits.
		c.closeAway(c.client)
	}
	e.shares.Sent(c.tenant, b.FD, sent)
	return err
}

// handOverFD does so with the descriptor of the client. The caller has the engine's lock.
func (c *conn) handOverFD(fd int, b hostdir.Backend, name, hello []byte) (sent bool, err error) {
	e := c.engine
	var header []byte
	_, err = unix.Getpeername(fd)
	if b.Proxy > 0 && err == nil {
		header, err = socket.Header(fd, c.from, b.Proxy, name)
	}
	if err != nil {
		return false, errGone
	}
	access := e.logAll.AccessLine(limits.Now(), c.peer, name, b.Log)
	socket.SetPlain(fd)
	if sent, err = socket.HandOver(b.FD, append(header, hello...), fd); !sent {
		unix.SetNonblock(fd, true)
		return false, err
	}
	e.leave(c)
	e.counters.Handed.Add(1)
	e.counters.Bytes[report.Up].Add(int64(len(hello)))
	access.Print(report.Traffic{report.Up: int64(len(hello))}, time.Duration(limits.Now()-c.accepted), report.HandedOver)
	return true, nil
}

// lookUp has a thread look the host up and connect to its backend. The thread may hang, so the
// client waits until the deadline.
func (c *conn) lookUp(ctx context.Context, t *shares.Tenant, entry string, name []byte) (hostdir.Backend, error) {
	s := c.engine.shares
	q := &shares.Query{Task: shares.Task{Tenant: t, Entry: entry}, Name: name, Found: entry}
	if err := c.await(ctx, q, s.Ask); err == report.ErrLookupTimeout {
		return hostdir.Backend{}, err
	}
	s.Settle(q, c)
	return q.Backend, q.Err
}

// await asks, and waits for the answer until the deadline.
func (c *conn) await(ctx context.Context, q *shares.Query, ask func(q *shares.Query, done func())) error {
	done := make(chan struct{})
	ask(q, func() { close(done) })
	select {
	case <-done:
	case <-ctx.Done():
		go func() {
			<-done
			c.engine.shares.Discard(q)
		}()
		return report.ErrLookupTimeout
	}
	if q.Owner != nil {
		shares.Hold(&c.tenant, q.Owner)
	}
	return q.Err
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
	c.queued, c.refused = e.queue.PushFront(c), true
	e.mu.Unlock()
	c.linger()
}

// Descriptors returns how many descriptors the engine has itself: [inherit.Pollable] takes one for
// a moment.
func Descriptors(int) int64 { return 1 }

// Stop ends accepting, and lets go of the listening sockets. It returns when that is done.
func (e *Engine) Stop() {
	for _, f := range e.listeners {
		f.Close()
	}
	go func() {
		e.running.Wait()
		close(e.Drained)
	}()
}

// Cut ends all relays.
func (e *Engine) Cut() {
	e.mu.Lock()
	for c := range e.relays {
		c.end(report.CutAtStop)
	}
	e.mu.Unlock()
}
