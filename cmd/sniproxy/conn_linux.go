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

	account *account // if it is to be told of at its end

	broken bool // the backend does not read any more
	cut    bool // it stopped in the middle of a write

	early *early // while the hello is not complete, or the backend not connected

	moved bool  // the relay has moved something
	quiet uint8 // how often it was found that it had not

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
	greeting  phase = iota // the server name is not known yet
	lookingUp              // the host, which may take time
	redialing              // the backend's backlog is full
	relaying
	lingering // refused: waits for the client to end
	closed
)

type socket struct {
	fd         int32
	registered uint32 // events that epoll tells of, 0 if not registered
	hup        bool   // its peer has ended: there is an EOF, or an error, to read
	gone       bool   // and takes nothing any more
}

// early is what a connection needs only while it has no backend, and only if the hello did
// not come in one piece or the backend is not ready.
type early struct {
	parser sni.Parser
	name   []byte
	hello  []byte // all bytes read so far, behind headroom
	lookup *lookup
}

// accept accepts one connection. If there are more, the next wait says so.
func (l *loop) accept(from *listener) {
	// Whoever shares the socket may have made it blocking, as systemd does whenever it
	// starts something with it. So the flag is set anew each time, and should it be gone
	// again before the next instruction, SO_RCVTIMEO bounds the wait.
	setNonblock(int32(from.fd))
	fd, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(from.fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	switch errno {
	case 0:
		l.readHello(l.add(int32(fd)))
	case unix.EAGAIN, unix.EINTR, unix.ECONNABORTED:
		// Somebody else was quicker, or the client is gone.
	case unix.EMFILE, unix.ENFILE:
		if l.runner.dialer.Release() {
			return // that was kept for nobody yet; the next wait says again that there is a client
		}
		// It is said before anybody is looked for.
		if from.pending() && !l.makeRoom(nil) {
			l.pause(errno)
		}
	default:
		if from.stillListens() {
			l.pause(errno)
			return
		}
		l.rest = now() + int64(time.Hour)
		l.engine.fail(from.shutDown())
	}
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
			c.early = &early{parser: *parser, hello: slices.Clone(l.buffer[:headroom])}
		}
		c.early.hello = append(c.early.hello, room[:n]...)
		if n < len(room) && !s.hup {
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
	event := unix.EpollEvent{Events: s.registered | unix.EPOLLRDHUP | unix.EPOLLET, Fd: c.number, Pad: int32(side)}
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
	switch c.phase {
	case greeting:
		l.readHello(c)
	case lookingUp, redialing, closed:
		// A client that has ended is found out when there is a backend.
	case lingering:
		l.drop(c)
	case relaying:
		l.relay(c, side, events)
	}
}

// dial connects to the backend, and begins the relay. hello is all that was read so far,
// behind headroom.
func (l *loop) dial(c *conn, name, hello []byte) {
	fd, marks, err := l.dialNow(c, name, hello)
	for noRoom(err) && l.makeRoom(c) {
		fd, marks, err = l.dialNow(c, name, hello)
	}
	if mayWait(err) {
		l.lookUp(c, name, hello)
		return
	}
	l.dialled(c, name, hello, fd, marks, err)
}

// dialled goes on with what came of an attempt to connect to the backend.
func (l *loop) dialled(c *conn, name, hello []byte, fd int, marks hostdir.Marks, err error) {
	switch {
	case err == nil:
		l.begin(c, int32(fd), marks, name, hello)
	case backlogFull(err):
		l.keep(c, redialing, name, hello)
		if l.redial == 0 {
			l.redialWait = redialMin
			l.redial = now() + int64(redialMin)
		}
	default:
		l.refuse(c, name, err)
	}
}

// keep keeps what is needed of a connection that cannot be begun now.
func (l *loop) keep(c *conn, phase phase, name, hello []byte) {
	c.phase = phase
	if c.early == nil {
		c.early = &early{hello: slices.Clone(hello)}
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
	if c.early != nil && c.early.lookup != nil {
		c.early.lookup.conn = nil
	}
	c.early = nil
}

// redialAll tries again to connect to backends whose backlog was full. If that of a host is
// full still, its other clients need not try.
func (l *loop) redialAll() {
	var waiting []*conn
	for c := l.hellos.first; c != nil; c = c.next {
		if c.phase == redialing {
			waiting = append(waiting, c)
		}
	}
	l.redialWait = min(max(2*l.redialWait, redialMin), redialMax)
	l.redial = now() + int64(l.redialWait)
	tried := map[string]bool{}
	for _, c := range waiting {
		if c.phase != redialing || tried[string(c.early.name)] {
			continue // it was dropped to make room, or there is no room for it
		}
		l.dial(c, c.early.name, c.early.hello)
		if c.phase == redialing || c.phase == lookingUp {
			tried[string(c.early.name)] = true
		} else {
			l.redial, l.redialWait = now()+int64(redialMin), redialMin
		}
	}
	if len(tried) == 0 {
		l.redial = 0
	}
}

// begin begins the relay: a header, if asked for, and all bytes read so far go to the
// backend in one write.
func (l *loop) begin(c *conn, fd int32, marks hostdir.Marks, name, hello []byte) {
	c.leave()
	c.forget()
	l.waited(c)
	c.phase = relaying
	c.sockets[backend].fd = fd
	if marks.Log || l.logsAll() {
		c.account = newAccount(int(c.sockets[client].fd), name)
	}
	c.flows[client].size, c.flows[backend].size = readMin, readMin
	c.begun = l.measured
	first := hello[headroom:]
	if marks.Proxy > 0 {
		header, err := proxyHeader(int(c.sockets[client].fd), marks.Proxy, name)
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
	l.ended = append(l.ended, c)
	l.open.Add(-1)
	l.counters.ended.Add(1)
}

// tell has the line printed about how c ended, if there is to be one.
func (l *loop) tell(c *conn, how string) {
	if c.account != nil {
		c.account.tell(c.sent, time.Duration(now()-c.began), how)
		c.account = nil
	}
}

// logsAll tells whether the connections of all hosts are to be told of.
func (l *loop) logsAll() bool {
	if t := l.now(); l.askAgain <= t {
		l.allLogged, l.askAgain = l.runner.dialer.LogAll(), t+int64(logAllPeriod)
	}
	return l.allLogged
}

// closeBackend closes the connection to the backend, if there is one, and what was on its
// way to or from it.
func (l *loop) closeBackend(c *conn) {
	s := &c.sockets[backend]
	if s.fd == 0 {
		return
	}
	closeFd(s.fd)
	*s = socket{}
	for i := range c.flows {
		if c.flows[i].held > 0 {
			l.letGo(c, i)
			l.dropPipe(&c.flows[i].pipe)
		}
	}
	c.flows = [2]flow{}
}
