//go:build linux

package epoll

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
	"sniproxy/proxyproto"
	"sniproxy/sni"
	"sniproxy/sni/ech"
)

// A conn is a connection. It goes from phase to phase, and [conn.enter] is the only way:
//
//	greeting     on to lookingUp, redialing, relaying, lingering
//	lookingUp    on to redialing, relaying, lingering
//	redialing    on to lookingUp, relaying, lingering
//	relaying     on to lingering
//	lingering
//
// Each may also end, in free. [conn.dial] goes from the first three to the next, [conn.begin] to
// relaying, and [conn.linger] to lingering.
type conn struct {
	loop       *loop
	number     int32 // in the table of the loop
	generation int32 // of the number: how often it was used before
	phase      phase
	sockets    [2]endpoint
	flows      [2]flow
	accepted   int64 // when
	peer       socket.Address

	pending *pending // in phases before relaying: nil if the hello came in one piece and nothing is waited for

	session *ech.Session // if the hello was encrypted, until the handshake is past that; otherwise nil

	tenant *shares.Tenant // whose host it is for, once that is known; held until the end
	access *report.AccessLine
	header int32 // bytes of the PROXY header that are not sent yet
	sent   report.Traffic

	headed   bool  // a PROXY header must come before the hello, and is not complete yet
	address  bool  // the client has sent an IPv6 address in place of a server name
	proxy    uint8 // version of the PROXY header that the backend was sent
	deaf     bool  // the backend does not read any more
	cutWrite bool  // and a write may have been told that it has reset
	quiet    uint8 // looks for half-closed relays since something moved
	active   int64 // the round of the loop in which something last happened to the relay
	sample   int32 // of the loop's load when the relay began

	queue      *queue // that it is in
	prev, next *conn
	deadline   int64
	lingered   int // bytes read and dropped
}

// A side of a connection. The flow with its number comes from there.
type side uint8

const (
	client  side = 0
	backend side = 1
)

type phase uint8

const (
	free      phase = iota // it is no connection
	greeting               // the server name is not known yet
	lookingUp              // another thread looks the host up
	redialing              // it waits for a backlog, a descriptor, or the end of an exchange
	relaying
	lingering // the client was told the end: what it still sends is dropped
)

// isPending tells whether a connection in this phase waits for its relay.
func (p phase) isPending() bool { return p == greeting || p == lookingUp || p == redialing }

type endpoint struct {
	fd         int32  // 0 if there is none: descriptors 0, 1 and 2 are never a connection's
	registered uint32 // events that the poller tells of, 0 if it does not know the descriptor
	eof        bool   // there is an EOF, or an error, to read
	gone       bool   // and it takes nothing any more
	urgent     bool   // there is, or was, urgent data: a short read may end before it
}

// Pending is what a connection needs before its relay, if the ClientHello did not come in one
// piece, or behind a PROXY header, or the backend is not ready.
type pending struct {
	from   *proxyproto.Header // what a balancer has sent of the client's addresses, if anything
	parser sni.Parser
	hidden ech.Scanner // for the end of the hello, if that is waited for
	name   []byte
	hello  []byte // all bytes read so far, behind headroom
	query  *query // that it waits for

	conn *conn // nil when the relay has begun, or never will
	line *line // that it waits in
	err  error // why it waits
}

// enter changes the phase, and with it what hangs on it: queues, counters, descriptors, the tenant.
func (c *conn) enter(p phase) {
	l := c.loop
	if c.phase.isPending() && !p.isPending() {
		c.leaveQueue()
		c.dropPending()
		l.counters.Waiting.Add(-1)
	}
	was := c.phase
	if was == relaying {
		c.endSession()
	}
	c.phase = p
	switch p {
	case greeting:
		l.open.Add(1)
		l.counters.Accepted.Add(1)
		l.counters.Waiting.Add(1)
		l.hellos.push(c, c.accepted+int64(limits.Hello))
	case relaying:
		l.engine.shares.CountRelays(c.tenant, 1)
	case lingering:
		c.closeBackend()
		l.lingers.push(c, limits.Now()+int64(limits.Linger))
	case free:
		if was == lingering {
			c.leaveQueue()
		}
		if fd := c.sockets[client].fd; fd != 0 { // otherwise another thread closes it
			closeFd(fd)
		}
		l.shared = 0
		c.closeBackend()
		shares.Hold(&c.tenant, nil)
		l.open.Add(-1)
		l.counters.Ended.Add(1)
		l.conns.release(c)
	}
}

// acceptSome accepts connections after a full batch of events. As long as more is ready than fits
// into one batch, the listening sockets take turns with all that: they are in one batch of many.
func (l *loop) acceptSome() {
	for _, from := range l.engine.listeners[:l.listening] {
		for n := 0; n < acceptMost && l.accept(from); n++ {
		}
	}
}

// accept accepts one connection, and reports whether there was one. If there are more, the next
// wait says so.
func (l *loop) accept(from *inherit.Listener) bool {
	// Whoever shares the socket may have made it blocking, as systemd does whenever it starts
	// something with it. So the flag is set anew each time, and should it be gone again before the
	// next instruction, SO_RCVTIMEO bounds the wait.
	setNonblock(int32(from.FD))
	fd, peer, errno := acceptFrom(from.FD)
	switch errno {
	case 0:
		l.add(fd, peer).readHello()
		return true
	case unix.EAGAIN, unix.EINTR, unix.ECONNABORTED:
		// Somebody else was quicker, or the client is gone.
	case unix.EMFILE, unix.ENFILE:
		if l.runner.Load().dialer.Release() || l.engine.shares.CloseIdle() {
			break // those were kept for nobody yet; the next wait says again that there is a client
		}
		// accept(2) says so before it checks whether a client is waiting.
		if from.StillListens() && (!from.Pending() || l.dropOldest(nil, 0)) {
			break
		}
		l.pause(from, errno)
	default:
		l.pause(from, errno)
	}
	return false
}

// pause stops accepting for limits.AcceptPause, after a failure that has a cause outside of the
// connection. The clients wait in the backlog. If the socket was shut down, that is the end.
func (l *loop) pause(from *inherit.Listener, errno unix.Errno) {
	l.rest = limits.Now() + int64(limits.AcceptPause)
	if from.StillListens() {
		report.AcceptFailed(errno)
		return
	}
	select {
	case l.engine.Failed <- from.ShutDown():
	default: // there is a reason already
	}
}

// listen adds the listening sockets to the poller, or takes them away. Of all loops that wait for
// one, of this program and others, the kernel wakes up one for a client (EPOLLEXCLUSIVE).
func (l *loop) listen(yes bool) {
	for yes && l.listening < len(l.engine.listeners) {
		if !l.listenTo(l.listening, unix.EPOLL_CTL_ADD, unix.EPOLLIN|unix.EPOLLEXCLUSIVE) {
			return
		}
		l.listening++
	}
	for !yes && l.listening > 0 {
		if !l.listenTo(l.listening-1, unix.EPOLL_CTL_DEL, 0) {
			return
		}
		l.listening--
	}
}

// listenTo does so with one of them. After a failure the loop pauses, and tries again.
func (l *loop) listenTo(i, op int, events uint32) bool {
	from := l.engine.listeners[i]
	errno := l.poller.control(op, int32(from.FD), events, token{number: int32(listenerEvent - i)})
	if errno != 0 { // the kernel is out of memory, or of what it grants a user
		l.pause(from, errno)
	}
	return errno == 0
}

// add makes a connection of the socket of a client.
func (l *loop) add(fd int32, peer socket.Address) *conn {
	c := l.conns.add()
	c.peer = peer
	c.headed = l.engine.front.Yes()
	c.loop = l
	c.sockets[client].fd = fd
	c.accepted = l.now()
	c.enter(greeting)
	return c
}

// readHello reads what has come of the ClientHello.
func (c *conn) readHello() {
	l, s := c.loop, &c.sockets[client]
	for {
		p := c.pending
		parser, limit := &l.parser, sni.MaxHello
		if p != nil {
			parser, limit = &p.parser, sni.MaxHello-len(p.hello)+headroom
		} else {
			*parser = sni.Parser{}
		}
		space := l.buffer[headroom:]
		space = space[:min(limit, len(space))]
		n, errno := read(s.fd, space)
		switch {
		case errno == unix.EAGAIN:
			c.register(client, unix.EPOLLIN)
			return
		case errno != 0: // the client is gone
			if c.silent() {
				l.counters.Empty.Add(1)
			}
			c.close()
			return
		case n == 0 && c.silent():
			c.refuse(nil, report.Ended(nil))
			return
		case n == 0 && c.headed:
			c.closeUnheaded(report.ErrHeaderEnded)
			return
		case n == 0:
			c.refuse(named(parser), report.Ended(parser))
			return
		}
		b, hello := space[:n], l.buffer[:headroom+n]
		switch {
		case c.headed:
			p = c.keepMore(hello)
			if !c.readHeader() {
				return
			}
			b, hello, parser = p.hello[headroom:], p.hello, &p.parser
			if c.headed {
				b = nil
			}
		case p != nil:
			hello = c.keepMore(hello).hello
		}
		name, done, err := parser.Parse(b)
		switch {
		case err != nil:
			c.refuse(nil, err)
			return
		case done && c.open(parser, name, hello):
			return
		}
		if p == nil {
			c.keep(hello).parser = *parser
		}
		if n < len(space) && !s.eof && !s.urgent {
			c.register(client, unix.EPOLLIN)
			return
		}
	}
}

// open goes on with a hello whose server name is known. With keys for Encrypted Client Hello it
// takes all of the hello, and if that was encrypted to one of them, the inner hello takes its
// place. It returns false if the hello is not complete.
func (c *conn) open(parser *sni.Parser, name, hello []byte) bool {
	keys := c.loop.engine.keys.Get()
	if keys == nil {
		c.address = parser.Address()
		c.dial(name, hello)
		return true
	}
	scanner, all := &ech.Scanner{}, hello[headroom:]
	if c.pending != nil {
		scanner = &c.pending.hidden
	}
	end, err := scanner.End(all)
	if err == nil && end == 0 {
		return false
	}
	if err == nil {
		var inner []byte
		inner, c.session, err = ech.Open(nil, keys, all[:end])
		if c.session != nil {
			*parser = sni.Parser{}
			hello = append(make([]byte, headroom), inner...)
			hello, err = c.session.FromClient(hello, all[end:])
			if err == nil {
				name, _, err = parser.Parse(inner)
			}
			if c.pending != nil {
				c.pending.hello = hello
			}
		}
	}
	c.address = parser.Address()
	if err != nil {
		c.refuse(name, err)
	} else {
		c.dial(name, hello)
	}
	return true
}

// named returns the name that a client has sent whose hello is not complete, nil if it has sent
// none.
func named(p *sni.Parser) []byte {
	name, _, _ := p.Parse(nil)
	return name
}

// silent tells whether nothing has come, or nothing behind a PROXY header.
func (c *conn) silent() bool {
	return c.pending == nil || !c.headed && len(c.pending.hello) == headroom
}

// readHeader reads the PROXY header at the beginning of what is kept, and takes it away once it is
// complete. It fails if that is not a header.
func (c *conn) readHeader() bool {
	p := c.pending
	h, n, err := proxyproto.Parse(p.hello[headroom:])
	switch {
	case err != nil:
		c.closeUnheaded(err)
		return false
	case n == 0:
		return true
	case h.Client.IsValid():
		p.from, c.peer = &h, socket.AddressFrom(h.Client)
	}
	c.headed = false
	p.hello = append(p.hello[:headroom], p.hello[headroom+n:]...)
	return true
}

// closeUnheaded ends a connection without the PROXY header that it must have.
func (c *conn) closeUnheaded(why error) {
	c.loop.counters.CloseUnheaded(c.peer, why)
	c.close()
}

// register has the poller tell of events on a side, as soon as there are any and then whenever
// there are new ones (EPOLLET). If it fails, that is the end of c.
func (c *conn) register(on side, events uint32) bool {
	s := &c.sockets[on]
	if s.registered&events == events {
		return true
	}
	op := unix.EPOLL_CTL_MOD
	if s.registered == 0 {
		op = unix.EPOLL_CTL_ADD
	}
	s.registered |= events
	all := s.registered | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
	if errno := c.loop.poller.control(op, s.fd, all, tokenOf(c, on)); errno != 0 {
		// The kernel is out of memory, or of what it grants a user.
		logline.Rationed(func() string { return fmt.Sprintf("cannot watch a connection: %v", errno) })
		c.abort(report.CutForMemory)
		return false
	}
	return true
}

func (c *conn) event(on side, events uint32) {
	s := &c.sockets[on]
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		s.eof = true
		s.gone = s.gone || events&unix.EPOLLHUP != 0
	}
	s.urgent = s.urgent || events&unix.EPOLLPRI != 0
	switch c.phase {
	case greeting:
		c.readHello()
	case lookingUp, redialing:
		// If the client has ended, that is found out when there is a backend.
	case lingering:
		c.drop()
	case relaying:
		c.relay(on, events)
	}
}

// keep keeps what a connection needs until its relay can begin. Hello is all that was read so far.
func (c *conn) keep(hello []byte) *pending {
	if c.pending == nil {
		c.pending = &pending{conn: c, hello: slices.Clone(hello)}
	}
	return c.pending
}

// keepMore is keep for what was read just now, behind headroom.
func (c *conn) keepMore(b []byte) *pending {
	if c.pending == nil {
		return c.keep(b)
	}
	c.pending.hello = append(c.pending.hello, b[headroom:]...)
	return c.pending
}

// wait has a connection wait in a phase, for the backend of a name.
func (c *conn) wait(in phase, name, hello []byte) *pending {
	c.enter(in)
	p := c.keep(hello)
	if p.name == nil {
		p.name = slices.Clone(name)
	}
	return p
}

// dropPending is for a connection that waits no longer.
func (c *conn) dropPending() {
	if p := c.pending; p != nil {
		if p.query != nil {
			p.query.conn = nil
		}
		p.conn, p.line, c.pending = nil, nil, nil
	}
}

// begin begins the relay: a header, if asked for, and all bytes read so far go to the backend in
// one write.
func (c *conn) begin(b hostdir.Backend, name, hello []byte) {
	l := c.loop
	var from *proxyproto.Header
	if c.pending != nil {
		from = c.pending.from
	}
	c.enter(relaying)
	c.active, c.sample = l.rounds, l.load.samples
	c.sockets[backend].fd = int32(b.FD)
	c.proxy = b.Proxy
	l.recent.put(c, name)
	c.access = l.engine.logAll.AccessLine(l.now(), c.peer, name, b.Log)
	for i := range c.flows {
		c.flows[i] = flow{conn: c, from: side(i), size: readMin}
	}
	first := hello[headroom:]
	if b.Proxy > 0 {
		header, err := socket.Header(int(c.sockets[client].fd), from, b.Proxy, name)
		if err != nil {
			c.abort(report.ResetByClient)
			return
		}
		c.header = int32(len(header))
		first = hello[headroom-len(header):]
		copy(first, header)
	}
	known := c.sockets[client].registered != 0
	up := &c.flows[client]
	sent := c.register(backend, unix.EPOLLIN) && up.send(first)
	if c.phase != relaying || !c.register(client, unix.EPOLLIN) {
		return
	}
	if known && sent {
		// What came while the backend was looked for was told of already.
		up.pump()
	}
}

// handOver hands the connection itself over to the backend, with a header, if asked for, and all
// bytes read so far. Then it is no business of the program any more.
func (c *conn) handOver(entry []byte, b hostdir.Backend, name, hello []byte) {
	l, s := c.loop, &c.sockets[client]
	var header []byte
	var gone error
	if b.Proxy > 0 {
		var from *proxyproto.Header
		if c.pending != nil {
			from = c.pending.from
		}
		header, gone = socket.Header(int(s.fd), from, b.Proxy, name)
	} else if c.pending != nil || s.eof { // it may have ended since it was read from
		_, gone = unix.Getpeername(int(s.fd))
	}
	if gone != nil {
		l.engine.shares.Sent(c.tenant, b.FD, false)
		c.close()
		return
	}
	access := l.engine.logAll.AccessLine(l.now(), c.peer, name, b.Log)
	first := hello[headroom-len(header):]
	copy(first, header)
	if s.registered != 0 { // closing it does not take it out of the poller
		l.poller.remove(s.fd)
		s.registered = 0
	}
	if l.shared != 0 {
		socket.SetPlain(int(s.fd))
	} else {
		setPlain(s.fd)
	}
	handed, err := handOver(b.FD, first, s.fd)
	if errors.Is(err, unix.EMSGSIZE) { // a sender with few descriptors has a small buffer
		narrow := socket.Widen(b.FD, len(first))
		handed, err = handOver(b.FD, first, s.fd)
		narrow()
	}
	l.engine.shares.Sent(c.tenant, b.FD, handed)
	if !handed {
		setNonblock(s.fd)
		if l.shared != 0 {
			inherit.BoundWaits(int(s.fd))
		}
		c.dialled(entry, name, hello, hostdir.Backend{}, err)
		return
	}
	sent := int64(len(hello) - headroom)
	l.counters.Handed.Add(1)
	l.counters.Bytes[client].Add(sent)
	access.Print(report.Traffic{report.Up: sent}, time.Duration(limits.Now()-c.accepted), report.HandedOver)
	// By now the socket is the backend's as well. If that lets it linger and has closed it already,
	// this close is the last one, and waits.
	if lingers(s.fd) {
		c.tenant.CloseAway(l.engine.shares.Threads, int(s.fd))
		s.fd = 0
	}
	c.close()
}

// refuse tells the client with an alert why it is not served, and sees to it that the alert
// arrives.
func (c *conn) refuse(name []byte, err error) {
	alert := report.Alert(name, c.address, err)
	c.loop.counters.Refuse(c.peer, name, alert)
	record := alert.Description.Record()
	if _, errno := write(c.sockets[client].fd, record[:]); errno != 0 {
		c.close()
		return
	}
	c.linger()
}

// linger ends the sending side of the client, and reads and drops, within bounds, what it has still
// to say: closing with input unread would send a reset, which can overtake what was sent before.
func (c *conn) linger() {
	c.enter(lingering)
	s := &c.sockets[client]
	unix.Shutdown(int(s.fd), unix.SHUT_WR)
	known := s.registered != 0
	if c.register(client, unix.EPOLLIN) && known {
		c.drop()
	}
}

// drop reads and drops what a refused client sends, until it ends.
func (c *conn) drop() {
	for c.lingered < limits.LingerSize {
		n, errno := read(c.sockets[client].fd, c.loop.buffer[:])
		if errno == unix.EAGAIN {
			return
		}
		if errno != 0 || n == 0 {
			break
		}
		c.lingered += n
	}
	c.close()
}

// refuseSecond is refuse for a client whose backend has asked for a second hello, when that is no
// good or does not come. Where the alert cannot be sent, in the middle of what the backend sends or
// behind its end, the client gets a reset.
func (c *conn) refuseSecond(err error) {
	l := c.loop
	alert := report.Alert(nil, false, err)
	l.counters.Refuse(c.peer, l.recent.of(c), alert)
	record := alert.Description.Record()
	down := &c.flows[backend]
	if !down.done && !down.stalled() {
		if _, errno := write(c.sockets[client].fd, record[:]); errno == 0 {
			c.printAccess(report.Refused)
			c.linger()
			return
		}
	}
	c.abort(report.Refused)
}

// expireRetries refuses those whose second hello has not come in limits.Hello.
func (l *loop) expireRetries() {
	now := limits.Now()
	for c := l.retries.first; c != nil && c.deadline <= now; c = l.retries.first {
		c.refuseSecond(ech.ErrLate)
	}
}

// expireHellos refuses those who have had limits.Hello.
func (l *loop) expireHellos() {
	now := limits.Now()
	for c := l.hellos.first; c != nil && c.deadline <= now; c = l.hellos.first {
		switch {
		case c.phase == greeting && c.headed:
			c.closeUnheaded(report.ErrHeaderLate)
		case c.phase == greeting && c.silent():
			c.refuse(nil, report.Late(nil))
		case c.phase == greeting:
			c.refuse(named(&c.pending.parser), report.Late(&c.pending.parser))
		case c.pending.err != nil: // what was in the way at the last try
			c.refuse(c.pending.name, c.pending.err)
		default:
			c.refuse(c.pending.name, report.ErrLookupTimeout)
		}
	}
}

func (l *loop) expireLingers() {
	now := limits.Now()
	for c := l.lingers.first; c != nil && c.deadline <= now; c = l.lingers.first {
		c.close()
	}
}

// abort closes both connections at once, that of the client with a reset, so that it does not
// mistake what it has for all there is.
func (c *conn) abort(why string) {
	c.printAccess(why)
	unix.SetsockoptLinger(int(c.sockets[client].fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	c.close()
}

// cut ends c whatever it is doing. What its backend has passed on to the end needs no reset.
func (c *conn) cut(why string) {
	if c.phase == relaying && !c.flows[backend].done {
		c.abort(why)
		return
	}
	c.printAccess(why)
	c.close()
}

// close is the end of c, whatever way it went. C may be another connection from the next accept on.
func (c *conn) close() {
	c.printAccess(report.ClosedByBoth)
	c.enter(free)
}

// printAccess prints how c ended, if there is to be such a line. Only the first call counts.
func (c *conn) printAccess(how string) {
	if c.access != nil {
		c.access.Print(c.sent, time.Duration(limits.Now()-c.accepted), how)
		c.access = nil
	}
}

func (c *conn) closeBackend() {
	l, s := c.loop, &c.sockets[backend]
	if s.fd == 0 {
		return
	}
	if l.noRights || c.flows[backend].done { // all was read
		closeFd(s.fd)
	} else {
		if s.registered != 0 {
			l.poller.remove(s.fd) // it may stay open for a while
		}
		c.tenant.CloseAway(l.engine.shares.Threads, int(s.fd))
	}
	l.engine.shares.CountRelays(c.tenant, -1)
	*s = endpoint{}
	c.flows = [2]flow{}
}
