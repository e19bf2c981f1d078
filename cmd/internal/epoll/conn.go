//go:build !portable

package main

import (
	"fmt"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// A conn is a connection: accept, hello, dial, relay, end. What it goes through is in this
// file in that order, the relay in flow_linux.go.
type conn struct {
	number  int32
	phase   phase
	sockets [2]socket
	flows   [2]flow
	sent    traffic
	began   int64 // when it was accepted

	tenant *tenant // whose host it is for, once that is known; it is used as long

	account *account // if it is to be told of at its end

	broken bool // the backend does not read any more
	cut    bool // it stopped in the middle of a write

	early *early // while the hello is not complete, or the backend not connected

	active int64 // the round of the loop in which something last happened to the relay
	moved  bool  // the relay has moved something
	quiet  uint8 // how often it was found that it had not

	queue      *queue // that it is in
	prev, next *conn
	deadline   int64
	lingered   int   // bytes read and dropped
	begun      int32 // when the relay began, in measurements of the loop
}

// The sides of a connection. The flow with the number of a side comes from there.
const (
	client  = 0
	backend = 1
)

type phase uint8

const (
	unused    phase = iota // it is no connection
	greeting               // the server name is not known yet
	lookingUp              // the host, which may take time
	redialing              // the backend's backlog is full, or there is no descriptor for it
	relaying
	lingering // refused: waits for the client to end
	closed
)

type socket struct {
	fd         int32
	registered uint32 // events that epoll tells of, 0 if not registered
	hup        bool   // its peer has ended: there is an EOF, or an error, to read
	gone       bool   // and takes nothing any more
	urgent     bool   // there is, or was, urgent data: a short read may end before it
}

// early is what a connection needs only while it has no backend, and only if the hello did
// not come in one piece or the backend is not ready.
type early struct {
	parser sni.Parser
	name   []byte
	hello  []byte // all bytes read so far, behind headroom
	lookup *lookup

	conn *conn // nil if that has gone on
	line *line // that it waits in
	why  error // it waits
}

// acceptSome accepts connections after a full batch of events. As long as more is ready than fits into
// one, the listening sockets take turns with all that: they are among the events of one batch in many.
func (l *loop) acceptSome() {
	for _, from := range l.engine.listeners[:l.listening] {
		for n := 0; n < acceptMost && l.accept(from); n++ {
		}
	}
}

// accept accepts one connection, and reports whether there was one. If there are more, the next wait says so.
func (l *loop) accept(from *listener) bool {
	// Whoever shares the socket may have made it blocking, as systemd does whenever it
	// starts something with it. So the flag is set anew each time, and should it be gone
	// again before the next instruction, SO_RCVTIMEO bounds the wait.
	setNonblock(int32(from.fd))
	fd, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(from.fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	switch errno {
	case 0:
		l.readHello(l.add(int32(fd)))
		return true
	case unix.EAGAIN, unix.EINTR, unix.ECONNABORTED:
		// Somebody else was quicker, or the client is gone.
	case unix.EMFILE, unix.ENFILE:
		if l.runner.dialer.Release() {
			break // that was kept for nobody yet; the next wait says again that there is a client
		}
		// It is said before anybody is looked for.
		if from.pending() && !l.makeRoom(nil) {
			l.pause(errno)
		}
	default:
		if from.stillListens() {
			l.pause(errno)
			break
		}
		l.rest = now() + int64(time.Hour)
		l.engine.fail(from.shutDown())
	}
	return false
}

// pause stops accepting for acceptPause, after a failure that has a cause outside of the
// connection. The clients wait in the backlog.
func (l *loop) pause(errno unix.Errno) {
	complainAccept(errno)
	l.rest = now() + int64(acceptPause)
}

// readHello reads what has come of the hello.
func (l *loop) readHello(c *conn) {
	s := &c.sockets[client]
	for {
		limit := sni.MaxHello
		if c.early != nil {
			limit -= len(c.early.hello) - headroom
		}
		room := l.buffer[headroom:]
		room = room[:min(limit, len(room))]
		n, errno := read(s.fd, room)
		switch {
		case errno == unix.EAGAIN:
			l.awaitHello(c)
			return
		case errno != 0:
			l.close(c) // the client is gone
			return
		case n == 0:
			l.refuse(c, nil, errEOF)
			return
		}
		parser := &l.parser
		if c.early == nil {
			*parser = sni.Parser{}
		} else {
			parser = &c.early.parser
		}
		name, err := parser.Parse(room[:n])
		switch {
		case err != nil && !parser.Nameless():
			l.refuse(c, nil, err)
			return
		case name != nil || err != nil:
			hello := l.buffer[:headroom+n]
			if c.early != nil {
				c.early.hello = append(c.early.hello, room[:n]...)
				hello = c.early.hello
			}
			l.dial(c, name, hello)
			return
		}
		if c.early == nil {
			c.early = &early{conn: c, parser: *parser, hello: slices.Clone(l.buffer[:headroom])}
		}
		c.early.hello = append(c.early.hello, room[:n]...)
		if n < len(room) && !s.hup && !s.urgent {
			l.awaitHello(c)
			return
		}
	}
}

func (l *loop) awaitHello(c *conn) {
	if c.queue == nil {
		c.deadline = c.began + int64(helloTimeout)
		l.hellos.push(c)
	}
	l.register(c, client, unix.EPOLLIN)
}

// register has epoll tell of events on a side of c, as soon as there are any and then
// whenever there are new ones (EPOLLET). If it fails, that is the end of c.
func (l *loop) register(c *conn, side int, events uint32) bool {
	s := &c.sockets[side]
	if s.registered&events == events {
		return true
	}
	op := unix.EPOLL_CTL_MOD
	if s.registered == 0 {
		op = unix.EPOLL_CTL_ADD
	}
	s.registered |= events
	event := unix.EpollEvent{Events: s.registered | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET, Fd: c.number, Pad: int32(side)}
	if errno := epollCtl(l.epoll, op, s.fd, &event); errno != 0 {
		// The kernel is out of memory, or of what it grants a user.
		complainOften(func() string { return fmt.Sprintf("cannot watch a connection: %v", errno) })
		l.tell(c, cutForMemory)
		l.abort(c)
		return false
	}
	return true
}

// event deals with an event on a side of c.
func (l *loop) event(c *conn, side int, events uint32) {
	s := &c.sockets[side]
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.hup = true
		s.gone = s.gone || events&unix.EPOLLHUP != 0
	}
	s.urgent = s.urgent || events&unix.EPOLLPRI != 0
	switch c.phase {
	case greeting:
		l.readHello(c)
	case unused, lookingUp, redialing, closed:
		// A client that has ended is found out when there is a backend.
	case lingering:
		l.drop(c)
	case relaying:
		l.relay(c, side, events)
	}
}

// keep keeps what is needed of a connection that cannot be begun now.
func (l *loop) keep(c *conn, phase phase, name, hello []byte) {
	c.phase = phase
	if c.early == nil {
		c.early = &early{conn: c, hello: slices.Clone(hello)}
	}
	if c.early.name == nil {
		c.early.name = slices.Clone(name)
	}
	if c.queue == nil {
		c.deadline = c.began + int64(helloTimeout)
		l.hellos.push(c)
	}
}

// waited counts c, if it has waited, as one that does no longer.
func (l *loop) waited(c *conn) {
	if c.phase < relaying {
		l.counters.waiting.Add(-1)
	}
}

// forget is for what keep has kept.
func (c *conn) forget() {
	if e := c.early; e != nil {
		if e.lookup != nil {
			e.lookup.conn = nil
		}
		e.conn, e.line, c.early = nil, nil, nil
	}
}

// belongTo says whose host c is for. It takes over the use of t.
func (c *conn) belongTo(t *tenant) {
	if c.tenant != nil {
		c.tenant.release()
	}
	c.tenant = t
}

// begin begins the relay: a header, if asked for, and all bytes read so far go to the
// backend in one write.
func (l *loop) begin(c *conn, b hostdir.Backend, name, hello []byte) {
	c.leave()
	c.forget()
	l.waited(c)
	c.phase = relaying
	c.active = l.rounds
	c.sockets[backend].fd = int32(b.FD)
	l.relays.Add(1)
	c.tenant.relays.Add(1)
	c.account = l.engine.logAll.account(l.now(), int(c.sockets[client].fd), name, b.Log)
	c.flows[client].size, c.flows[backend].size = readMin, readMin
	c.begun = l.measured
	first := hello[headroom:]
	if b.Proxy > 0 {
		header, err := proxyHeader(int(c.sockets[client].fd), b.Proxy, name)
		if err != nil {
			l.tell(c, resetByClient)
			l.abort(c)
			return
		}
		c.sent[client] = -int64(len(header))
		first = hello[headroom-len(header):]
		copy(first, header)
	}
	known := c.sockets[client].registered != 0
	sent := l.register(c, backend, unix.EPOLLIN) && l.send(c, client, first)
	if c.phase != relaying || !l.register(c, client, unix.EPOLLIN) {
		return
	}
	if known && sent {
		// What came while the backend was looked for was told of already.
		l.pump(c, client)
	}
}

// refuse tells the client with an alert why it is not served, and sees to it that the
// alert arrives.
func (l *loop) refuse(c *conn, name []byte, err error) {
	alert := refusal(name, err)
	complainRefused(int(c.sockets[client].fd), name, alert)
	l.counters.refused[alert.Description].Add(1)
	record := alert.Description.Record()
	if _, errno := write(c.sockets[client].fd, record[:]); errno != 0 {
		l.close(c)
		return
	}
	l.linger(c)
}

// linger ends the sending side of the client, and reads and drops, within bounds, what it
// has still to say: closing with input unread would send a reset, which can overtake what
// was sent before.
func (l *loop) linger(c *conn) {
	c.leave()
	c.forget()
	l.waited(c)
	c.phase = lingering
	l.closeBackend(c)
	s := &c.sockets[client]
	unix.Shutdown(int(s.fd), unix.SHUT_WR)
	c.deadline = now() + int64(lingerTimeout)
	l.lingers.push(c)
	known := s.registered != 0
	l.register(c, client, unix.EPOLLIN)
	if known && c.phase == lingering {
		l.drop(c)
	}
}

// drop reads and drops what a refused client sends, until it ends.
func (l *loop) drop(c *conn) {
	for c.lingered < lingerSize {
		n, errno := read(c.sockets[client].fd, l.buffer[:])
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 || n == 0 {
			break
		}
		c.lingered += n
	}
	l.close(c)
}

// abort closes both connections at once, that of the client with a reset, so that it does
// not mistake what it has for all there is.
func (l *loop) abort(c *conn) {
	unix.SetsockoptLinger(int(c.sockets[client].fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	l.close(c)
}

// close is the end of c, whatever way it went.
func (l *loop) close(c *conn) {
	l.tell(c, closedByBoth)
	c.leave()
	c.forget()
	l.waited(c)
	c.phase = closed
	closeFd(c.sockets[client].fd)
	l.closeBackend(c)
	c.belongTo(nil)
	l.ended = append(l.ended, c)
	l.open.Add(-1)
	l.counters.ended.Add(1)
}

// tell has the line printed about how c ended, if there is to be one.
func (l *loop) tell(c *conn, how string) {
	if c.account != nil {
		c.account.tell(l.engine.logAll, c.sent, time.Duration(now()-c.began), how)
		c.account = nil
	}
}

// closeBackend closes the connection to the backend, if there is one, and what was on its
// way to or from it.
func (l *loop) closeBackend(c *conn) {
	s := &c.sockets[backend]
	if s.fd == 0 {
		return
	}
	if l.refuses || c.flows[backend].ended { // all was read
		closeFd(s.fd)
	} else {
		if s.registered != 0 { // it may stay open for a while
			epollCtl(l.epoll, unix.EPOLL_CTL_DEL, s.fd, &unix.EpollEvent{})
		}
		c.tenant.closeAway(l.engine.threads, int(s.fd))
	}
	l.relays.Add(-1)
	c.tenant.relays.Add(-1)
	*s = socket{}
	for i := range c.flows {
		if c.flows[i].held > 0 {
			l.letGo(c, i)
			l.dropPipe(&c.flows[i].pipe)
		}
	}
	c.flows = [2]flow{}
}
