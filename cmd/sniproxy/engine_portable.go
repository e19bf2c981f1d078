//go:build portable || !linux

package main

import (
	"container/list"
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

// The portable engine accepts connections and serves them, with a goroutine for each direction of
// each connection, on Go's own poller. It is the plain statement of what the program
// does.
type engine struct {
	files   []*os.File // the listening sockets, for the poller
	lookups *lookups

	failed  chan error    // gets the reason if the engine cannot go on
	drained chan struct{} // closed when the last connection has ended after stop

	conns  sync.WaitGroup
	counts counters
	ended  chan struct{} // gets something when a connection has ended

	taking sync.Mutex // held to accept, and to make room and use it

	told sync.Map // of *conn: relays that are to be told of at their end

	mu      sync.Mutex
	waiting list.List // of *conn: those that are not relays yet, in order of arrival
}

// startEngine starts an engine that accepts from the listeners, and serves the clients that are
// there already.
func startEngine(listeners []*listener, clients []int) (*engine, error) {
	e := &engine{
		lookups: newLookups(),
		failed:  make(chan error, len(listeners)),
		drained: make(chan struct{}),
		ended:   make(chan struct{}, 1),
	}
	for _, l := range listeners {
		f, err := pollable(&l.fd)
		if err != nil {
			return nil, err
		}
		e.files = append(e.files, f)
		e.conns.Go(func() { e.accept(l, f) })
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

// cut ends all connections that are to be told of, and waits a moment for that.
func (e *engine) cut() {
	e.told.Range(func(key, _ any) bool {
		c := key.(*conn)
		c.endsAs(cutAtStop)
		c.client.Close()
		c.telling.backend.Close()
		return true
	})
	late := time.After(cutTimeout)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for left := true; left; {
		left = false
		e.told.Range(func(any, any) bool {
			left = true
			return false
		})
		select {
		case <-tick.C:
		case <-late:
			return
		}
	}
}

// A conn is a client's connection.
type conn struct {
	client   *os.File
	deadline time.Time     // for the relay to begin: helloTimeout after it was accepted
	place    *list.Element // among those waiting
	dialling bool          // not to be dropped: its hello is there, and it is being dealt with
	counts   *counters
	waits    atomic.Bool // it is counted among those waiting
	moved    atomic.Bool // the relay has moved something
	sent     traffic
	telling  *telling
}

// accept accepts connections until the file of the listener is closed. No failure ends it, as any
// would end sniproxy-rs.
func (e *engine) accept(l *listener, f *os.File) {
	for {
		fd, err := e.acceptOne(l, f)
		switch err {
		case nil:
			e.begin(os.NewFile(uintptr(fd), "client"))
		case os.ErrClosed:
			return
		case unix.ECONNABORTED:
			// Only that connection is gone.
		case unix.EMFILE, unix.ENFILE:
			// Those accepted last have not looked for their hello yet.
			runtime.Gosched()
			if !e.makeRoom(nil) {
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

func (e *engine) acceptOne(l *listener, f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, os.ErrClosed
	}
	closed := raw.Read(func(uintptr) bool {
		e.taking.Lock()
		defer e.taking.Unlock()
		fd, err = l.accept()
		for err == unix.EINTR {
			fd, err = l.accept()
		}
		if (err == unix.EMFILE || err == unix.ENFILE) && !l.pending() {
			err = unix.EAGAIN // it is said before anybody is looked for
		}
		return err != unix.EAGAIN
	})
	if closed != nil {
		return -1, os.ErrClosed
	}
	return fd, err
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
	c := &conn{client: client, deadline: time.Now().Add(helloTimeout), counts: &e.counts}
	e.enter(c)
	e.conns.Go(func() {
		defer e.leave(c)
		e.serve(c)
	})
}

// enter counts c, and puts it last among those waiting.
func (e *engine) enter(c *conn) {
	e.counts.accepted.Add(1)
	e.counts.waiting.Add(1)
	c.waits.Store(true)
	e.mu.Lock()
	defer e.mu.Unlock()
	c.place = e.waiting.PushBack(c)
}

// remove takes c from those waiting. It reports whether c was still there; if not, it
// was dropped to make room.
func (e *engine) remove(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.place == nil {
		return false
	}
	e.waiting.Remove(c.place)
	c.place = nil
	return true
}

// makeRoom drops the connection that waits longest for its relay to begin, other than c,
// which needs a descriptor. It reports whether there was one. A c that was dropped itself has
// no claim to room.
func (e *engine) makeRoom(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c != nil && c.place == nil {
		return false
	}
	for place := e.waiting.Front(); place != nil; place = place.Next() {
		if oldest := place.Value.(*conn); oldest != c && !oldest.dialling {
			e.waiting.Remove(place)
			oldest.place = nil
			if oldest.waited() { // otherwise it was refused, and that was said
				control(oldest.client, complainDropped)
				e.counts.dropped.Add(1)
			}
			oldest.client.Close()
			return true
		}
	}
	return false
}

// waited counts c as one that waits no longer. It reports whether it did.
func (c *conn) waited() bool {
	waited := c.waits.Swap(false)
	if waited {
		c.counts.waiting.Add(-1)
	}
	return waited
}

// setDialling says whether c is being dealt with, rather than waiting for something.
func (e *engine) setDialling(c *conn, yes bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c.dialling = yes
}

// dropped reports whether c was dropped to make room.
func (e *engine) dropped(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return c.place == nil
}

// leave is the end of c, whatever way it went.
func (e *engine) leave(c *conn) {
	e.remove(c)
	c.client.Close()
	c.waited()
	e.counts.ended.Add(1)
	select {
	case e.ended <- struct{}{}:
	default:
	}
}

// serve is the way of a connection: hello, dial, relay.
func (e *engine) serve(c *conn) {
	if c.client.SetReadDeadline(c.deadline) != nil {
		return // the poller has no room for it
	}
	var parser sni.Parser
	hello, name, err := c.hello(&parser)
	if err != nil {
		if _, ok := err.(sni.Alert); ok { // otherwise the client is gone
			c.refuse(nil, err)
		}
		return
	}
	backend, marks, err := e.dial(c, name)
	if err != nil {
		c.refuse(name, err)
		return
	}
	defer backend.Close()
	if !e.remove(c) || c.client.SetReadDeadline(time.Time{}) != nil {
		return
	}
	c.waited()
	if marks.Proxy > 0 {
		var header []byte
		if closed := control(c.client, func(fd int) { header, err = proxyHeader(fd, marks.Proxy, name) }); closed != nil || err != nil {
			return
		}
		c.sent[up] = -int64(len(header))
		hello = append(header, hello...)
	}
	if marks.Log || hostdir.LogAll() {
		c.telling = &telling{backend: backend, account: newAccount(-1, name)}
		control(c.client, func(fd int) { c.telling.account = newAccount(fd, name) })
		e.told.Store(c, nil)
		defer func() {
			c.telling.account.tell(c.sent, time.Since(c.deadline.Add(-helloTimeout)), c.telling.how)
			e.told.Delete(c)
		}()
	}
	relay(c, backend, hello)
}

// hello reads until the server name is known. It returns all bytes read so far, and the
// name, in memory of the parser.
func (c *conn) hello(parser *sni.Parser) (hello, name []byte, err error) {
	in := newSource(c.client)
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

// dial connects to the backend of a host. While its backlog is full it tries again, until
// the deadline of c; sniproxy-rs gives up. Of all clients of the host one does that at a time.
func (e *engine) dial(c *conn, name []byte) (backend *os.File, marks hostdir.Marks, err error) {
	h := e.lookups.host(string(name))
	defer e.lookups.leave(h)
	redialing := false
	for wait := redialMin; ; wait = min(2*wait, redialMax) {
		e.setDialling(c, true)
		backend, marks, err = e.dialOnce(c, h)
		if err == nil {
			return backend, marks, nil
		}
		e.setDialling(c, false)
		if redialing && err == errLookupTimeout {
			err = errBacklog
		}
		full := backlogFull(err)
		switch {
		case !full && !isProblem(err, hostdir.Exchanged):
			return backend, marks, err
		case time.Now().Add(wait).After(c.deadline) || e.dropped(c):
			return nil, hostdir.Marks{}, err
		case full && !redialing:
			if !offer(h.redial, time.After(time.Until(c.deadline))) {
				return nil, hostdir.Marks{}, err
			}
			defer func() { <-h.redial }()
			redialing = true
		default:
			time.Sleep(wait)
		}
	}
}

func (e *engine) dialOnce(c *conn, h *host) (backend *os.File, marks hostdir.Marks, err error) {
	fd, err := hostdir.Socket()
	if noRoom(err) {
		fd, err = e.socketWithRoom(c)
	}
	if err != nil {
		return nil, hostdir.Marks{}, err
	}
	marks, err = e.lookups.connect(fd, h, c.deadline)
	if err != nil {
		return nil, hostdir.Marks{}, err
	}
	f := os.NewFile(uintptr(fd), "backend")
	if err := f.SetDeadline(time.Time{}); err != nil {
		f.Close()
		return nil, hostdir.Marks{}, err
	}
	return f, marks, nil
}

// socketWithRoom is like [hostdir.Socket], but makes room for the descriptor that it needs, and
// keeps accept from taking it.
func (e *engine) socketWithRoom(c *conn) (fd int, err error) {
	e.taking.Lock()
	defer e.taking.Unlock()
	for {
		fd, err = hostdir.Socket()
		if !noRoom(err) || !e.makeRoom(c) {
			return fd, err
		}
	}
}

// refuse tells the client with an alert why it is not served, and sees to it that the
// alert arrives, which that of sniproxy-rs often does not: it ends the sending side, and reads
// what the client has still to say, within bounds, so that closing does not send a reset, which
// would overtake the alert.
func (c *conn) refuse(name []byte, err error) {
	alert := refusal(name, err)
	if c.waited() { // otherwise it was dropped, and that was said
		control(c.client, func(fd int) { complainRefused(fd, name, alert) })
		c.counts.refused[alert.Description].Add(1)
	}
	record := alert.Description.Record()
	c.client.SetDeadline(time.Now().Add(lingerTimeout))
	if _, err := c.client.Write(record[:]); err != nil {
		return
	}
	linger(c.client)
}
