//go:build !portable

package main

import (
	"slices"

	"golang.org/x/sys/unix"
)

// A flow is one direction of a relay. It reads only while it holds nothing: so what it holds
// is always less than one read, and an end is read only after all before it was sent on.
type flow struct {
	ended bool // the EOF was passed on
	bulk  bool // the last read was full, so splice(2) is tried
	plain bool // splice(2) does not work with these sockets
	turn  bool // it is among those with a turn to take
	part  bool // a part of what was read last was sent
	wide  bool // the backend's socket has room for more than others
	full  bool // and none now, so nothing is spliced

	size int32 // how much to read at once

	// What was read and could not be sent yet: in buf, or held bytes in the pipe.
	buf   []byte
	held  int
	pipe  pipe
	holds bool // it is among those that are stalled with something in a pipe
}

func (f *flow) stalled() bool { return f.buf != nil || f.held > 0 || f.full }

// A turn is what a flow takes when it has used up what it may move at once.
type turn struct {
	c    *conn
	from int
}

// takeTurns goes on with flows whose turn was over before there was nothing left to move.
func (l *loop) takeTurns() {
	turns := l.busy
	l.busy = l.spare[:0]
	for _, t := range turns {
		f := &t.c.flows[t.from]
		f.turn = false
		if t.c.phase == relaying && !f.ended && !f.stalled() {
			l.pump(t.c, t.from)
		}
	}
	clear(turns)
	l.spare = turns
}

// relay deals with an event on a side of a relay.
func (l *loop) relay(c *conn, side int, events uint32) {
	if side == client && events&unix.EPOLLERR != 0 {
		l.tell(c, resetByClient)
		l.abort(c) // whatever else there is to read or send
		return
	}
	if to := &c.flows[1-side]; to.stalled() && !to.ended && events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		l.resume(c, 1-side)
	}
	if c.phase != relaying || events&^unix.EPOLLOUT == 0 {
		return
	}
	if from := &c.flows[side]; !from.ended && !from.stalled() {
		l.pump(c, side)
	}
}

// pump moves bytes of a flow that holds nothing, until there is nothing to read, or the
// other side takes no more, or the turn is over.
func (l *loop) pump(c *conn, from int) {
	f := &c.flows[from]
	c.active = l.rounds
	for moved := 0; moved < turnSize; {
		move := l.copy
		if f.bulk {
			move = l.splice
		}
		n, more := move(c, from)
		if !more {
			return
		}
		moved += n
	}
	if !f.turn {
		f.turn = true
		l.busy = append(l.busy, turn{c, from})
	}
}

// copy moves what one read gives. It reports how much that was, and whether there may be more.
//
// While reads are full there is much on its way. From TCP to a Unix socket it is then spliced,
// which takes a third of the time. The other way splicing takes twice as long as copying in
// large pieces, so those grow. With a client that does not take all they shrink again: what
// it does not take has to be kept.
func (l *loop) copy(c *conn, from int) (n int, more bool) {
	f, src := &c.flows[from], &c.sockets[from]
	b := l.buffer[headroom:][:f.size]
	var errno unix.Errno
	if from == client || l.refuses {
		n, errno = read(src.fd, b)
	} else if n, errno = l.receive(c, b); c.phase != relaying {
		return 0, false
	}
	if !l.got(c, from, n, errno) {
		return 0, false
	}
	full := n == len(b)
	if full && from == client {
		l.beginBulk(c)
	} else if full {
		f.size = min(2*f.size, readMax)
	}
	if !l.send(c, from, b[:n]) {
		f.size = max(f.size/2, readMin)
		return n, false
	}
	// After a short read there is no more, but with an end in sight there is still that,
	// or the error, to read. And a read ends before and after urgent data.
	return n, full || src.hup || src.urgent
}

// beginBulk has the client's flow spliced from now on, if it can be, and gives the backend's socket room for more.
func (l *loop) beginBulk(c *conn) {
	f := &c.flows[client]
	f.bulk = !f.plain && !c.sockets[client].urgent
	if f.bulk && !f.wide {
		f.wide = true
		unix.SetsockoptInt(int(c.sockets[backend].fd), unix.SOL_SOCKET, unix.SO_SNDBUF, int(l.engine.sendBuffer)/2)
	}
}

// splice is like copy, but moves what one splice(2) gives, through a pipe. That is no more than the backend's socket has room
// for: what it did not take would stay in the pipe.
func (l *loop) splice(c *conn, from int) (n int, more bool) {
	f, src := &c.flows[from], &c.sockets[from]
	size := l.engine.sendBuffer - unsent(c.sockets[1-from].fd)
	if size < spliceMin {
		f.full = true
		l.register(c, 1-from, unix.EPOLLOUT)
		return 0, false
	}
	// Where there is urgent data splice(2) says that there is nothing, or that this is the end.
	if src.urgent || !l.takePipe(&f.pipe) {
		f.bulk = false
		return 0, true
	}
	n, errno := splice(src.fd, f.pipe.in, int(size))
	if errno != 0 || n == 0 {
		l.givePipe(&f.pipe)
	}
	if errno == unix.EINVAL {
		f.plain, f.bulk = true, false
		return 0, true
	}
	if errno == 0 && n == 0 {
		f.bulk = false // a read will tell whether it is the end
		return 0, true
	}
	if !l.got(c, from, n, errno) {
		return 0, false
	}
	f.held = n
	f.bulk = n >= readMin/2
	return n, l.sendPipe(c, from)
}

// receive reads from the backend of c where the system cannot refuse what backends pass. A read would close that in this
// thread, which may take any time. So it is received, and the connection ends.
func (l *loop) receive(c *conn, b []byte) (int, unix.Errno) {
	n, passed, errno := receive(c.sockets[backend].fd, b, l.control)
	if len(passed) > 0 {
		complainPassed(len(passed), c.tenant)
		c.tenant.closeAway(l.engine.threads, passed...)
		l.tell(c, passedByBackend)
		l.abort(c)
	}
	return n, errno
}

// resetBy is how a connection ended on whose side, by the number of what comes from there,
// something failed.
var resetBy = [2]string{up: resetByClient, down: resetByBackend}

// got deals with the outcome of a read. It reports whether there is something to send on.
func (l *loop) got(c *conn, from, n int, errno unix.Errno) bool {
	switch {
	case errno == unix.EAGAIN:
	case errno != 0:
		l.tell(c, resetBy[from])
		l.abort(c)
	case n == 0:
		l.finish(c, from)
	default:
		return true
	}
	return false
}

// send sends b on. What the other side does not take now is kept. It reports whether all
// was taken.
func (l *loop) send(c *conn, from int, b []byte) bool {
	n, errno := write(c.sockets[1-from].fd, b)
	if errno != 0 {
		if errno != unix.EAGAIN {
			l.unsendable(c, from, errno)
			return false
		}
		n = 0
	}
	f := &c.flows[from]
	l.moved(c, from, n)
	if n == len(b) {
		f.part = false
		return true
	}
	f.buf = append([]byte(nil), b[n:]...)
	f.part = f.part || n > 0
	l.register(c, 1-from, unix.EPOLLOUT)
	return false
}

// sendPipe sends on what a flow holds in its pipe, and gives the pipe back when it is empty.
// It reports whether it is.
func (l *loop) sendPipe(c *conn, from int) bool {
	f := &c.flows[from]
	for f.held > 0 {
		n, errno := splice(f.pipe.out, c.sockets[1-from].fd, f.held)
		switch errno {
		case 0:
			l.moved(c, from, n)
			f.held -= n
			f.part = f.held > 0
		case unix.EAGAIN:
			l.hold(c, from)
			l.register(c, 1-from, unix.EPOLLOUT)
			return false
		default:
			l.unsendable(c, from, errno)
			return false
		}
	}
	l.letGo(c, from)
	l.givePipe(&f.pipe)
	return true
}

// moved counts what a flow has sent on.
func (l *loop) moved(c *conn, from, n int) {
	c.moved = c.moved || n > 0
	l.counters.count(&c.sent, from, n)
}

// hold notes that a flow is stalled with something in its pipe. If half of all pipes are kept like
// that, what is in the one that was kept longest is moved to memory: backends that do not read
// cannot keep all pipes from others.
func (l *loop) hold(c *conn, from int) {
	l.letGo(c, from)
	c.flows[from].holds = true
	l.holders = append(l.holders, turn{c, from})
	if len(l.holders) <= maxPipes/2 {
		return
	}
	first := l.holders[0]
	f := &first.c.flows[first.from]
	b := make([]byte, f.held)
	if n, errno := read(f.pipe.out, b); errno != 0 || n != len(b) {
		l.abort(first.c) // which does not happen
		return
	}
	l.letGo(first.c, first.from)
	l.givePipe(&f.pipe)
	f.buf, f.held = b, 0
}

// letGo is for a flow that holds nothing in its pipe any more.
func (l *loop) letGo(c *conn, from int) {
	if f := &c.flows[from]; f.holds {
		f.holds = false
		i := slices.Index(l.holders, turn{c, from})
		l.holders = slices.Delete(l.holders, i, i+1)
	}
}

// resume goes on with a flow that is stalled, now that there may be room.
func (l *loop) resume(c *conn, from int) {
	f := &c.flows[from]
	if f.full {
		f.full = false
		l.pump(c, from)
		return
	}
	if f.held > 0 {
		if l.sendPipe(c, from) {
			l.pump(c, from)
		}
		return
	}
	b := f.buf
	f.buf = nil
	if l.send(c, from, b) {
		l.pump(c, from)
	}
}

// unsendable deals with a failure to send. A backend that does not read any more may still have something to say: that is
// forwarded until its end. If it was reset, Linux says so once: to who reads, or in place of the rest of a write
// that was done in part.
func (l *loop) unsendable(c *conn, from int, errno unix.Errno) {
	if from != client || errno != unix.EPIPE {
		l.tell(c, resetBy[1-from])
		l.abort(c)
		return
	}
	up, down := &c.flows[client], &c.flows[backend]
	up.ended = true
	c.broken, c.cut = true, up.part
	if down.ended {
		l.end(c)
		return
	}
	unix.Shutdown(int(c.sockets[backend].fd), unix.SHUT_WR)
	l.watchQuiet()
	c.sockets[backend].hup = true // so it is read until there is nothing more
	if !down.stalled() {
		l.pump(c, backend)
	}
}

// finish passes the end of a flow on, or ends the connection if there is nothing more to come.
func (l *loop) finish(c *conn, from int) {
	c.flows[from].ended = true
	switch {
	case c.flows[1-from].ended:
		l.end(c)
	case from == backend && c.sockets[backend].gone && l.settled(c):
		// The backend has closed its socket, so nothing can flow to it any more. The
		// client has all that came from it, and sent nothing that would make closing
		// a reset. So its connection is closed as well.
		l.close(c)
	default:
		unix.Shutdown(int(c.sockets[1-from].fd), unix.SHUT_WR)
		l.watchQuiet()
	}
}

// settled tells whether the client has acknowledged all that was sent to it, and has sent
// nothing that was not forwarded.
func (l *loop) settled(c *conn) bool {
	fd := c.sockets[client].fd
	if c.flows[client].stalled() || unsent(fd) != 0 {
		return false
	}
	_, errno := recv(fd, l.buffer[:1], unix.MSG_PEEK)
	return errno == unix.EAGAIN
}

// watchQuiet sees to it that endQuiet is called.
func (l *loop) watchQuiet() {
	if l.quiet == 0 {
		l.quiet = now() + int64(halfClosed/quietChecks)
	}
}

// endQuiet ends relays of which one half has ended, and the other has not moved a byte at
// quietChecks checks in a row.
func (l *loop) endQuiet() {
	l.quiet = 0
	for _, c := range l.conns {
		if c.phase != relaying || c.flows[client].ended == c.flows[backend].ended {
			continue
		}
		if c.moved {
			c.moved, c.quiet = false, 0
		} else if c.quiet++; c.quiet == quietChecks {
			l.endHalf(c)
			continue
		}
		l.watchQuiet()
	}
}

// endHalf ends a relay of which one half has ended: with a reset, if it is not that of the
// backend, so that the client does not mistake what it has for all there is.
func (l *loop) endHalf(c *conn) {
	l.tell(c, silentHalfClosed)
	if c.flows[backend].ended {
		l.close(c)
	} else {
		l.abort(c)
	}
}

// end is the end of a relay both of whose flows have ended.
func (l *loop) end(c *conn) {
	switch {
	case c.cut:
		l.tell(c, resetByBackend)
		l.abort(c)
	case c.broken:
		l.tell(c, closedByBackend)
		l.linger(c)
	default:
		l.close(c)
	}
}

// A pipe is what splice(2) moves bytes through, without copying them.
type pipe struct{ out, in int32 }

// takePipe gets an empty pipe. It fails if the loop has too many in use, or if no descriptor
// is left for one.
func (l *loop) takePipe(p *pipe) bool {
	if l.pipesUsed >= maxPipes {
		return false
	}
	if n := len(l.pipes); n > 0 {
		*p = l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
	} else if l.engine.room.crowded() {
		return false
	} else {
		var fds [2]int
		if unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
			return false
		}
		// An ordinary user may be refused this; then it is as large as it is.
		unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
		*p = pipe{int32(fds[0]), int32(fds[1])}
		l.pipesOpen.Add(1)
	}
	l.pipesUsed++
	return true
}

// givePipe gives an empty pipe back.
func (l *loop) givePipe(p *pipe) {
	l.pipes = append(l.pipes, *p)
	l.pipesUsed--
	l.pipesIdle = 0
	*p = pipe{}
}

// dropPipe closes a pipe with something in it.
func (l *loop) dropPipe(p *pipe) {
	l.closePipe(*p)
	l.pipesUsed--
}

// expirePipes closes the pipes that nobody used for a while.
func (l *loop) expirePipes(now int64) {
	switch {
	case l.pipesIdle == 0:
		l.pipesIdle = now
	case now-l.pipesIdle >= int64(pipeTimeout):
		for _, p := range l.pipes {
			l.closePipe(p)
		}
		l.pipes = l.pipes[:0]
	}
}

func (l *loop) closePipe(p pipe) {
	closeFd(p.in)
	closeFd(p.out)
	l.pipesOpen.Add(-1)
}
