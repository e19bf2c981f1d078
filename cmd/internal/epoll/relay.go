//go:build linux

package epoll

import (
	"fmt"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
)

// A flow is one direction of a relay. It never reads while it holds unsent bytes: it holds at most
// one read, and sees EOF only after everything before it was sent.
type flow struct {
	conn *conn
	from side

	done         bool // the EOF was passed on
	splicing     bool // the last read was full, so splice(2) is tried
	cannotSplice bool // splice(2) does not work with these sockets
	turn         bool // it is among those that take a turn
	partSent     bool // a part of what was read last was sent
	enlarged     bool // the backend's socket has room for more than others
	dstFull      bool // and none now, so nothing is spliced

	size int32  // how much to read at once
	buf  []byte // what was read and could not be sent yet
}

func (f *flow) src() *endpoint { return &f.conn.sockets[f.from] }
func (f *flow) dst() *endpoint { return &f.conn.sockets[1-f.from] }
func (f *flow) dstSide() side  { return 1 - f.from }
func (f *flow) other() *flow   { return &f.conn.flows[1-f.from] }

// stalled tells whether the flow waits for the other side to take more. Then EPOLLOUT of that is
// registered, and [flow.resume] goes on.
func (f *flow) stalled() bool { return f.buf != nil || f.dstFull }

// takeTurns goes on with flows whose turn was over before there was nothing left to move.
func (l *loop) takeTurns() {
	turns := l.turns
	l.turns = l.spare[:0]
	for _, f := range turns {
		if f.turn {
			f.turn = false
			if !f.done && !f.stalled() {
				f.pump()
			}
		}
	}
	clear(turns)
	l.spare = turns
}

// relay deals with an event on a side of a relay.
func (c *conn) relay(on side, events uint32) {
	if on == client && events&unix.EPOLLERR != 0 {
		c.abort(report.ResetByClient) // whatever else there is to read or send
		return
	}
	in, out := &c.flows[on], &c.flows[1-on] // from this side, and to it
	if out.stalled() && !out.done && events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		out.resume()
	}
	if c.phase != relaying || events&^unix.EPOLLOUT == 0 {
		return
	}
	if !in.done && !in.stalled() {
		in.pump()
	}
}

// pump moves bytes until there is nothing to read, or the other side takes no more, or the turn is
// over.
func (f *flow) pump() {
	l := f.conn.loop
	f.conn.active = l.rounds
	for moved := 0; moved < turnSize; {
		var n int
		var more bool
		switch {
		case f.splicing:
			n, more = f.splice()
		case f.from == client && f.conn.session != nil:
			n, more = f.open()
		default:
			n, more = f.copy()
		}
		if !more {
			return
		}
		moved += n
	}
	if !f.turn {
		f.turn = true
		l.turns = append(l.turns, f)
	}
}

// copy moves what one read gives. It reports how much that was, and whether there may be more.
//
// While reads are full there is much on its way. From TCP to a Unix socket it is then spliced,
// which takes a third of the time. The other way splicing takes twice as long as copying in large
// pieces, so those grow. If a client does not take all they shrink again: what it does not take has
// to be kept.
func (f *flow) copy() (n int, more bool) {
	c, src := f.conn, f.src()
	b := c.loop.buffer[headroom:][:f.size]
	var errno unix.Errno
	if f.from == client || c.loop.noRights {
		n, errno = read(src.fd, b)
	} else if n, errno = c.receive(b); c.phase != relaying {
		return 0, false
	}
	if !f.got(n, errno) {
		return 0, false
	}
	full := n == len(b)
	if full && f.from == client {
		f.beginBulk()
	} else if full {
		f.size = min(2*f.size, readMax)
	}
	sent := f.send(b[:n])
	if c.session != nil && c.session.FromBackend(b[:n]) && !f.answered() {
		return n, false
	}
	if !sent {
		f.size = max(f.size/2, readMin)
		return n, false
	}
	// After a short read there is no more, but with an end in sight there is still that, or the
	// error, to read. And a read ends before and after urgent data.
	return n, full || src.eof || src.urgent
}

// open is like copy, while the client may still send a second hello, or what belongs to the first.
func (f *flow) open() (n int, more bool) {
	c, src := f.conn, f.src()
	b := c.loop.buffer[headroom:][:f.size]
	n, errno := read(src.fd, b)
	out := c.loop.opened[:0]
	var err error
	switch {
	case errno != 0:
		return 0, f.got(n, errno)
	case n > 0:
		out, err = c.session.FromClient(out, b[:n])
	default:
		out, err = c.session.ClientEnded(out)
	}
	c.loop.opened = out
	if !c.sendOpened(out, err) || f.stalled() {
		return n, false
	}
	if n == 0 {
		f.finish()
		return 0, false
	}
	return n, n == len(b) || src.eof || src.urgent
}

// sendOpened sends the backend what it is to get of what the client has sent, or refuses the
// client. It reports whether the client's flow goes on. If that is stalled already, the bytes are
// kept behind those that are.
func (c *conn) sendOpened(b []byte, err error) bool {
	up := &c.flows[client]
	switch s := c.session; {
	case err != nil:
		c.refuseSecond(err)
		return false
	case s.Over():
		c.endSession()
	case s.Retries() && c.queue == nil:
		c.loop.retries.push(c, limits.Now()+int64(limits.Hello))
	}
	switch {
	case len(b) == 0:
	case up.stalled():
		up.buf = append(up.buf, b...)
	default:
		up.send(b)
	}
	return c.phase == relaying && !up.done
}

// answered is for a backend whose answer has begun, or that has ended: what was held back of the
// client's bytes goes on. It reports whether the backend's flow goes on, too.
func (f *flow) answered() bool {
	c := f.conn
	c.sendOpened(c.session.FromClient(nil, nil))
	return c.phase == relaying && !f.done && !f.stalled()
}

// endSession is for a connection all of whose bytes pass from now on.
func (c *conn) endSession() {
	if c.session != nil {
		c.session = nil
		c.leaveQueue()
	}
}

// beginBulk has the client's flow spliced from now on, if it can be, and gives the backend's socket
// room for more.
func (f *flow) beginBulk() {
	f.splicing = !f.cannotSplice && !f.src().urgent
	if f.splicing && !f.enlarged {
		f.enlarged = true
		// Linux doubles what it is told.
		unix.SetsockoptInt(int(f.dst().fd), unix.SOL_SOCKET, unix.SO_SNDBUF, int(f.conn.loop.engine.bulkBuffer)/2)
	}
}

// splice is like copy, but moves what one splice(2) gives, through the pipe of the loop. That is no
// more than the backend's socket has room for, so little is left in the pipe, if anything.
func (f *flow) splice() (n int, more bool) {
	c, l, src := f.conn, f.conn.loop, f.src()
	size := l.engine.bulkBuffer - unsent(f.dst().fd)
	if size < spliceMin {
		f.dstFull = true
		c.register(f.dstSide(), unix.EPOLLOUT)
		return 0, false
	}
	// Where there is urgent data splice(2) says that there is nothing, or that this is the end.
	if src.urgent || l.pipe.in == 0 {
		f.splicing = false
		return 0, true
	}
	n, errno := splice(src.fd, l.pipe.in, int(size))
	switch {
	case errno == unix.EINVAL:
		f.cannotSplice, f.splicing = true, false
		return 0, true
	case errno == 0 && n == 0:
		f.splicing = false // a read will tell whether it is the end
		return 0, true
	case !f.got(n, errno):
		return 0, false
	}
	f.splicing = n >= readMin/2
	for left := n; left > 0; {
		m, errno := splice(l.pipe.out, f.dst().fd, left)
		if errno == 0 && m > 0 {
			f.sent(m)
			left -= m
			f.partSent = left > 0
			continue
		}
		rest := l.pipe.drain(left)
		if errno != unix.EAGAIN || rest == nil {
			f.unsendable(errno)
			return n, false
		}
		f.buf = rest
		c.register(f.dstSide(), unix.EPOLLOUT)
		return n, false
	}
	return n, true
}

// receive reads from the backend where the system cannot refuse what backends pass. A read would
// close that in this thread, which may take any time. So it is received, and the connection ends.
func (c *conn) receive(b []byte) (int, unix.Errno) {
	l := c.loop
	n, passed, errno := receive(c.sockets[backend].fd, b, l.control)
	if len(passed) > 0 {
		report.Passed(len(passed), c.tenant)
		c.tenant.CloseAway(l.engine.shares.Threads, passed...)
		c.abort(report.PassedByBackend)
	}
	return n, errno
}

// resetBy names the peer that reset, by the side on which a call failed.
var resetBy = [2]string{client: report.ResetByClient, backend: report.ResetByBackend}

// got deals with the outcome of a read. It reports whether there is something to send on.
func (f *flow) got(n int, errno unix.Errno) bool {
	switch {
	case errno == unix.EAGAIN:
	case errno != 0:
		if f.from == backend {
			f.conn.checkAnswered()
		}
		f.conn.abort(resetBy[f.from])
	case n == 0:
		s := f.conn.session
		if f.from == backend && s != nil && s.BackendEnded() && !f.answered() {
			break
		}
		f.finish()
	default:
		return true
	}
	return false
}

// send sends b on, and keeps what the other side does not take now. It reports whether all was
// taken.
func (f *flow) send(b []byte) bool {
	n, errno := write(f.dst().fd, b)
	if errno != 0 {
		if errno != unix.EAGAIN {
			f.unsendable(errno)
			return false
		}
		n = 0
	}
	f.sent(n)
	if n == len(b) {
		f.partSent = false
		return true
	}
	f.buf = append([]byte(nil), b[n:]...)
	f.partSent = f.partSent || n > 0
	f.conn.register(f.dstSide(), unix.EPOLLOUT)
	return false
}

// sent counts n bytes that were sent on. The PROXY header is not the client's.
func (f *flow) sent(n int) {
	c := f.conn
	if n > 0 {
		c.quiet = 0
	}
	if c.header > 0 && f.from == client {
		header := min(n, int(c.header))
		c.header -= int32(header)
		n -= header
	}
	c.sent[f.from] += int64(n)
	c.loop.counters.Bytes[f.from].Add(int64(n))
}

// resume goes on with a flow that is stalled, now that there may be room.
func (f *flow) resume() {
	b := f.buf
	f.buf, f.dstFull = nil, false
	if b == nil || f.send(b) {
		f.pump()
	}
}

// unsendable deals with a failure to send. A backend that does not read any more may still have
// something to say: that is forwarded until its end. Linux reports a reset once: to this write, if
// the backend closed its socket just now, or to one that was done in part. Then [conn.end] resets
// the client.
func (f *flow) unsendable(errno unix.Errno) {
	c := f.conn
	if f.from != client || errno != unix.EPIPE && errno != unix.ECONNRESET {
		c.abort(resetBy[f.dstSide()])
		return
	}
	f.done = true
	c.endSession()
	c.deaf, c.cutWrite = true, f.partSent || errno == unix.ECONNRESET
	down := f.other()
	if down.done {
		c.end()
		return
	}
	unix.Shutdown(int(f.dst().fd), unix.SHUT_WR)
	c.loop.checkHalfClosed()
	f.dst().eof = true // or will be: copy goes on after short reads
	if !down.stalled() {
		down.pump()
	}
}

// finish passes the end of a flow on, or ends the connection if there is nothing more to come.
func (f *flow) finish() {
	c := f.conn
	if f.from == backend {
		c.checkAnswered()
	}
	f.done = true
	switch {
	case f.other().done:
		c.end()
	case f.from == backend && f.src().gone && c.settled():
		// The backend has closed its socket, so nothing can flow to it any more. The client has all
		// that came from it, and sent nothing that would make closing a reset. So its connection is
		// closed as well.
		c.close()
	default:
		unix.Shutdown(int(f.dst().fd), unix.SHUT_WR)
		c.loop.checkHalfClosed()
	}
}

// checkAnswered is for a backend that ends: it logs if the backend has sent nothing, and the client
// did not end before.
func (c *conn) checkAnswered() {
	up, down := &c.flows[client], &c.flows[backend]
	if c.sent[backend] > 0 || down.done || down.stalled() || up.done && !c.deaf {
		return
	}
	report.Unanswered(c.peer, c.tenant, c.loop.recent.of(c), c.proxy)
}

// settled tells whether the client has acknowledged all that was sent to it, and has sent nothing
// that was not forwarded.
func (c *conn) settled() bool {
	fd := c.sockets[client].fd
	if c.flows[client].stalled() || unsent(fd) != 0 {
		return false
	}
	_, errno := recv(fd, c.loop.buffer[:1], unix.MSG_PEEK)
	return errno == unix.EAGAIN
}

// end is the end of a relay both of whose flows have ended.
func (c *conn) end() {
	switch {
	case c.cutWrite:
		c.abort(report.ResetByBackend)
	case c.deaf:
		c.printAccess(report.ClosedByBackend)
		c.linger()
	default:
		c.close()
	}
}

// checkHalfClosed sees to it that endHalfClosed is called.
func (l *loop) checkHalfClosed() {
	if l.halfClosed == 0 {
		l.halfClosed = limits.Now() + int64(limits.HalfClosed/quietChecks)
	}
}

// endHalfClosed ends relays of which one half has ended, and the other has not moved a byte since
// quietChecks checks.
func (l *loop) endHalfClosed() {
	l.halfClosed = 0
	for _, c := range l.conns.all {
		if c.phase != relaying || c.flows[client].done == c.flows[backend].done {
			continue
		}
		if c.quiet < quietChecks {
			c.quiet++
			l.checkHalfClosed()
			continue
		}
		c.cut(report.SilentHalfClosed)
	}
}

// A pipe is what splice(2) moves bytes through, without copying them. It is empty between two
// moves. The zero pipe is none.
type pipe struct{ out, in int32 }

func newPipe() (pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return pipe{}, fmt.Errorf("pipe2: %w", err)
	}
	// The kernel may refuse an ordinary user this; then the pipe is as large as it is.
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	p := pipe{int32(fds[0]), int32(fds[1])}
	if size, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETPIPE_SZ, 0); err != nil || size < spliceMin {
		p.close() // it is of no use
	}
	return p, nil
}

// drain returns the n bytes that are in the pipe. It returns nil if it cannot read them, which does
// not happen; then there is another pipe, or none.
func (p *pipe) drain(n int) []byte {
	b := make([]byte, n)
	if m, errno := read(p.out, b); errno != 0 || m != n {
		p.close()
		*p, _ = newPipe()
		return nil
	}
	return b
}

func (p *pipe) close() {
	closeFd(p.in)
	closeFd(p.out)
	*p = pipe{}
}
