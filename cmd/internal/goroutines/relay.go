package goroutines

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
	"sniproxy/sni"
	"sniproxy/sni/ech"
)

// relay sends the backend the header, if there is to be one, and the hello. Then it forwards bytes
// both ways until both have ended, or one has failed.
func (c *conn) relay(b hostdir.Backend, name, hello []byte) {
	var access *report.AccessLine
	var gone error
	closed := socket.Control(c.client, func(fd int) {
		access = c.engine.logAll.AccessLine(limits.Now(), c.peer, name, b.Log)
		if b.Proxy > 0 {
			c.first, gone = socket.Header(fd, c.from, b.Proxy, name)
		}
		c.from = nil // as the relay may last
	})
	if closed != nil || gone != nil {
		c.end(report.ResetByClient)
	}
	c.header, c.proxy = len(c.first), b.Proxy
	c.first = append(c.first, hello...)
	var up sync.WaitGroup
	up.Go(c.forwardUp)
	c.forwardDown(name)
	up.Wait()
	switch {
	case c.bad.Load() != nil:
		c.refuseSecond(name)
	case c.lost:
		c.end(report.ResetByBackend)
	case c.deaf:
		c.linger()
		c.end(report.ClosedByBackend)
	default:
		c.ending.Do(func() { c.how = report.ClosedByBoth })
	}
	access.Print(c.sent, time.Duration(limits.Now()-c.accepted), c.how)
}

// forwardUp sends the backend the header and the hello, then what the client sends. A backend that
// does not read any more may still have something to say, so that does not end the relay.
func (c *conn) forwardUp() {
	up := func(b []byte) error { return c.send(report.Up, c.backend, b) }
	first := c.first
	c.first = nil // as the relay may last
	err := up(first)
	for err == nil && c.session != nil {
		err = c.openNext(up)
	}
	for err == nil {
		err = c.read(c.client, sni.MaxHello, up)
	}
	var alert sni.Alert
	if errors.As(err, &alert) {
		c.bad.Store(&alert)
		socket.Shutdown(c.backend, unix.SHUT_RDWR) // so nobody waits for it
		return
	}
	c.deaf = err == unix.EPIPE
	if err == io.EOF {
		c.gone.Store(true)
	}
	if err != io.EOF && !c.deaf {
		c.end(report.ResetByClient)
		return
	}
	socket.Shutdown(c.backend, unix.SHUT_WR)
	c.ended[report.Up].Store(limits.Now())
}

// forwardDown sends the client what the backend sends. If that is nothing, the log says so, with
// the name.
func (c *conn) forwardDown(name []byte) {
	c.opening.Lock()
	watch := c.session != nil
	c.opening.Unlock()
	down := func(b []byte) error {
		err := c.send(report.Down, c.client, b)
		if watch && err == nil {
			watch = !c.answered(func(s *ech.Session) bool { return s.FromBackend(b) })
		}
		return err
	}
	var err error
	for err == nil {
		err = c.read(c.backend, sni.MaxHello, down)
	}
	if watch && err == io.EOF {
		c.answered((*ech.Session).BackendEnded)
	}
	if c.bad.Load() != nil {
		return
	}
	if c.sent[report.Down] == 0 && !c.gone.Load() {
		report.Unanswered(c.peer, c.tenant, name, c.proxy)
	}
	if err == io.EOF && socket.EventsOf(c.backend)&unix.POLLHUP != 0 {
		// The backend has closed its socket, so a write that is under way fails now. Linux tells of
		// a reset only once: a read, or a write, or nobody if that write was done in part.
		c.sending.Lock()
		if c.lost {
			err = unix.ECONNRESET
		}
		c.sending.Unlock()
	}
	if err != io.EOF {
		c.end(report.ResetByBackend)
		return
	}
	c.ended[report.Down].Store(limits.Now())
	socket.Shutdown(c.client, unix.SHUT_WR)
}

// openNext reads once from a client that may still send a second hello, or what belongs to the
// first, and sends on what the backend is to get of that. Its read ends when there is news of the
// backend's answer, and when the second hello has taken too long. The error may be an [sni.Alert].
func (c *conn) openNext(up func([]byte) error) error {
	var out []byte
	var bad error
	err := c.read(c.client, sni.MaxHello, func(b []byte) error {
		c.opening.Lock()
		defer c.opening.Unlock()
		out, bad = c.session.FromClient(nil, b)
		return nil
	})
	c.opening.Lock()
	s := c.session
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		out, bad = s.ClientEnded(nil)
	case errors.Is(err, os.ErrDeadlineExceeded):
		out, bad = s.FromClient(nil, nil)
		if bad == nil && s.Retries() && !c.late.IsZero() && !time.Now().Before(c.late) {
			bad = ech.ErrLate
		}
		err = nil
	}
	switch {
	case s.Over():
		c.session, c.late = nil, time.Time{}
	case s.Retries() && c.late.IsZero():
		c.late = time.Now().Add(limits.Hello)
	}
	c.client.SetReadDeadline(c.late)
	c.opening.Unlock()
	if bad != nil {
		return bad
	}
	if len(out) > 0 {
		if failed := up(out); failed != nil {
			return failed
		}
	}
	return err
}

// answered tells the session what the backend has sent. If that is news, the client's way looks at
// it.
func (c *conn) answered(tell func(*ech.Session) bool) (news bool) {
	c.opening.Lock()
	defer c.opening.Unlock()
	if c.session == nil {
		return true
	}
	if news = tell(c.session); news {
		c.client.SetReadDeadline(time.Now())
	}
	return news
}

// refuseSecond is refuse for a client whose backend has asked for a second hello, when that is no
// good or does not come. Where the alert cannot be sent, in the middle of what the backend sends or
// behind its end, the client gets a reset.
func (c *conn) refuseSecond(name []byte) {
	alert := *c.bad.Load()
	c.engine.counters.Refuse(c.peer, name, alert)
	record := alert.Description.Record()
	c.client.SetWriteDeadline(time.Now().Add(limits.Linger))
	if _, err := c.client.Write(record[:]); err != nil {
		c.end(report.Refused)
		return
	}
	c.linger()
	c.ending.Do(func() { c.how = report.Refused })
}

// stallCheck is how often a client is looked at for a reset while it is not read, since its backend
// takes nothing.
const stallCheck = 500 * time.Millisecond

// send sends b on, and counts what is the client's of it: not the header. If that fails it ends the
// relay, except that EPIPE means that the backend does not read any more. So does ECONNRESET, if it
// closed its socket just now.
func (c *conn) send(way int, to *os.File, b []byte) error {
	if way == report.Up {
		c.sending.Lock()
		defer c.sending.Unlock()
	}
	for size := len(b); ; {
		to.SetWriteDeadline(time.Now().Add(stallCheck))
		n, err := to.Write(b)
		if b = b[n:]; n > 0 {
			c.moved.Store(limits.Now())
		}
		if way == report.Up {
			header := min(n, c.header)
			c.header -= header
			n -= header
		}
		c.sent[way] += int64(n)
		c.engine.counters.Bytes[way].Add(int64(n))
		switch {
		case err == nil:
			return nil
		case c.bad.Load() != nil: // the alert does not fit in the middle
			c.end(report.Refused)
		case errors.Is(err, os.ErrDeadlineExceeded) && socket.EventsOf(c.client)&unix.POLLERR == 0:
			continue
		case errors.Is(err, os.ErrDeadlineExceeded) || way == report.Down:
			c.end(report.ResetByClient)
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
			c.lost = len(b) < size || errors.Is(err, unix.ECONNRESET)
			return unix.EPIPE
		default:
			c.lost = true
			c.end(report.ResetByBackend)
		}
		return err
	}
}

// endSilent ends relays of which one way has ended and the other was silent for limits.HalfClosed.
func (e *Engine) endSilent() {
	for range time.Tick(limits.HalfClosed / 8) {
		since := limits.Now() - int64(limits.HalfClosed)
		e.mu.Lock()
		for c := range e.relays {
			up, down := c.ended[report.Up].Load(), c.ended[report.Down].Load()
			if (up == 0) != (down == 0) && max(up, down, c.moved.Load()) < since {
				c.end(report.SilentHalfClosed)
			}
		}
		e.mu.Unlock()
	}
}

// end ends a relay at once, both ways; sniproxy-rs ends only the one that failed. Only the first
// call counts: others follow from it. The client gets a reset, unless the backend's end was passed
// on, so that it does not mistake what it has for all there is.
func (c *conn) end(how string) {
	c.ending.Do(func() {
		c.how = how
		if how != report.ResetByBackend {
			c.gone.Store(true)
		}
		if c.ended[report.Down].Load() == 0 {
			socket.Control(c.client, func(fd int) {
				unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
			})
		}
		c.client.Close()
		socket.Shutdown(c.backend, unix.SHUT_RDWR) // so nobody waits for it; see closeBackend
	})
}

// closeBackend closes the backend's socket, which nobody uses any more. It may hold descriptors
// that the system could not refuse.
func (c *conn) closeBackend() {
	if c.engine.hosts.RefusesDescriptors() || c.ended[report.Down].Load() != 0 {
		c.backend.Close()
	} else {
		c.closeAway(c.backend)
	}
}

// closeAway closes a file in another thread, as that may take any time.
func (c *conn) closeAway(f *os.File) {
	own := -1
	socket.Control(f, func(fd int) { own, _ = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3) })
	f.Close()
	if own >= 0 {
		c.tenant.CloseAway(c.engine.shares.Threads, own)
	}
}

// A buffer is for what one call reads, and for descriptors that a backend passes besides.
type buffer struct {
	bytes   [sni.MaxHello]byte
	control [socket.ControlSize]byte
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// read waits for input, and calls use with it: with most bytes at most. It has a buffer only from
// the moment when there is input until use returns. At the end it fails with [io.EOF].
func (c *conn) read(from *os.File, most int, use func([]byte) error) error {
	raw, err := from.SyscallConn()
	if err != nil {
		return err
	}
	passes := from == c.backend && !c.engine.hosts.RefusesDescriptors()
	var b *buffer
	var n, size int
	closed := raw.Read(func(fd uintptr) bool {
		b = buffers.Get().(*buffer)
		err = unix.EINTR
		for err == unix.EINTR {
			if passes { // no program is started that could inherit what is passed
				n, size, _, _, err = unix.Recvmsg(int(fd), b.bytes[:most], b.control[:], 0)
			} else {
				n, err = unix.Read(int(fd), b.bytes[:most])
			}
		}
		if err == unix.EAGAIN {
			buffers.Put(b)
			b = nil
		}
		return b != nil
	})
	if closed != nil {
		return closed
	}
	defer buffers.Put(b)
	if err != nil {
		return err
	}
	if fds := socket.Passed(b.control[:size]); len(fds) > 0 {
		report.Passed(len(fds), c.tenant)
		c.tenant.CloseAway(c.engine.shares.Threads, fds...)
		c.end(report.PassedByBackend)
		return os.ErrClosed
	}
	if n == 0 {
		return io.EOF
	}
	return use(b.bytes[:n])
}

// linger ends the sending side of the client's connection, then reads and drops, within bounds,
// what the client still has to say: to close with unread input sends a reset, which can overtake
// what was sent before.
func (c *conn) linger() {
	socket.Shutdown(c.client, unix.SHUT_WR)
	err := c.client.SetReadDeadline(time.Now().Add(limits.Linger))
	for size := 0; err == nil && size < limits.LingerSize; {
		err = c.read(c.client, sni.MaxHello, func(b []byte) error {
			size += len(b)
			return nil
		})
	}
}
