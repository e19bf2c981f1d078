package goroutines

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

// While a backend takes nothing, its client, which is not read then, is looked at for a reset
// every stallCheck.
const stallCheck = 500 * time.Millisecond

// relay sends the backend the header, if there is to be one, and the hello, then forwards bytes both ways until both
// directions have ended, or one has failed.
func (e *Engine) relay(c *conn, b hostdir.Backend, name, hello []byte) {
	control(c.client, func(fd int) { c.access = e.logAll.AccessLine(limits.Now(), fd, name, b.Log) })
	defer func() { c.access.Print(c.sent, time.Duration(limits.Now()-c.began), c.how) }()
	if b.Proxy > 0 {
		var header []byte
		var err error
		if closed := control(c.client, func(fd int) { header, err = socket.Header(fd, b.Proxy, name) }); closed != nil || err != nil {
			c.endsAs(report.ResetByClient)
			return
		}
		c.header = len(header)
		hello = append(header, hello...)
	}
	var flows sync.WaitGroup
	var sending sync.Mutex // to the backend
	var broken, cut bool   // the backend does not read any more; in the middle of a write
	over := make(chan struct{})
	defer close(over)
	sendUp := func(b []byte) error {
		sending.Lock()
		defer sending.Unlock()
		n, err := send(c.backend, b, c.client, func(n int) { e.count(c, report.Up, n) })
		broken = errors.Is(err, unix.EPIPE)
		cut = broken && n > 0
		if err != nil && !broken {
			c.endsAs(report.ResetByBackend)
		}
		return err
	}
	flows.Go(func() {
		err := sendUp(hello)
		hello = nil
		if err == nil {
			err = forward(sendUp, newSource(c.client, false))
		}
		switch {
		case err == nil:
			shutdown(c.backend, unix.SHUT_WR)
			go c.endQuiet(over, c.reset)
		case broken:
			// It may still have something to say: that is forwarded until its end. If it was reset, Linux says so once:
			// to who reads, or in place of the rest of a write that was done in part.
			shutdown(c.backend, unix.SHUT_WR)
			go c.endQuiet(over, c.reset)
		default:
			c.endsAs(report.ResetByClient)
			c.reset()
		}
	})
	from := newSource(c.backend, !e.hosts.RefusesDescriptors())
	from.passed = func(fds []int) {
		report.Passed(len(fds), c.tenant)
		c.tenant.CloseAway(e.shares.Threads, fds...)
		c.endsAs(report.PassedByBackend)
	}
	err := forward(func(b []byte) error {
		_, err := send(c.client, b, nil, func(n int) { e.count(c, report.Down, n) })
		if err != nil {
			c.endsAs(report.ResetByClient)
		}
		return err
	}, from)
	if err == nil && poll(c.backend)&unix.POLLHUP != 0 {
		// If something is being sent to it just now, that fails, and tells how it ended.
		sending.Lock()
		if cut {
			err = unix.ECONNRESET
		}
		sending.Unlock()
	}
	if err != nil {
		c.endsAs(report.ResetByBackend)
		c.reset()
	} else {
		c.drained.Store(true)
		shutdown(c.client, unix.SHUT_WR)
		go c.endQuiet(over, c.close)
	}
	flows.Wait()
	switch {
	case cut:
		c.endsAs(report.ResetByBackend)
		c.reset()
	case broken:
		c.endsAs(report.ClosedByBackend)
		linger(c.client)
	}
	c.endsAs(report.ClosedByBoth)
}

// endsAs says how c ends. What is said first counts: the rest follows from it.
func (c *conn) endsAs(how string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.how == "" {
		c.how = how
	}
}

// count counts n bytes that a relay has moved. The PROXY header is not the client's.
func (e *Engine) count(c *conn, way, n int) {
	c.active.Store(limits.Now())
	if way == report.Up {
		header := min(n, c.header)
		c.header -= header
		n -= header
	}
	c.sent[way] += int64(n)
	e.counts.Bytes[way].Add(int64(n))
}

// endQuiet calls end for a relay of which one half has ended, when the other has not moved anything for limits.HalfClosed.
func (c *conn) endQuiet(over <-chan struct{}, end func()) {
	for {
		left := time.Duration(c.active.Load()-limits.Now()) + limits.HalfClosed
		if left <= 0 {
			break
		}
		select {
		case <-time.After(left):
		case <-over:
			return
		}
	}
	c.endsAs(report.SilentHalfClosed)
	end()
}

// forward calls send with all that comes from a source, until that ends.
func forward(send func([]byte) error, in *source) error {
	for {
		b, err := in.read(sni.MaxHello)
		switch err {
		case nil:
		case io.EOF:
			return nil
		default:
			return err
		}
		err = send(b)
		in.release()
		if err != nil {
			return err
		}
	}
}

// send writes b to dst, calls count with each part that was written, and returns how much was.
// While dst takes nothing, nobody reads from the client; if it is watched, its reset is noticed all
// the same, and fails the write.
func send(dst *os.File, b []byte, watched *os.File, count func(n int)) (n int, err error) {
	for {
		if err := dst.SetWriteDeadline(time.Now().Add(stallCheck)); err != nil {
			return n, err
		}
		m, err := dst.Write(b[n:])
		n += m
		if m > 0 {
			count(m)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if watched != nil && poll(watched)&unix.POLLERR != 0 {
			return n, unix.ECONNRESET
		}
	}
}

// poll returns what poll(2) tells of f unasked: POLLERR after a reset, POLLHUP after the end
// of both directions.
func poll(f *os.File) (events int16) {
	control(f, func(fd int) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		unix.Poll(p, 0)
		events = p[0].Revents
	})
	return events
}

// linger ends the sending side of client, and reads and drops, within bounds, what it has
// still to say: closing with input unread would send a reset, which can overtake what was
// sent before.
func linger(client *os.File) {
	shutdown(client, unix.SHUT_WR)
	if client.SetReadDeadline(time.Now().Add(limits.Linger)) != nil {
		return
	}
	in := newSource(client, false)
	for size := 0; size < limits.LingerSize; {
		b, err := in.read(sni.MaxHello)
		if err != nil {
			return
		}
		size += len(b)
		in.release()
	}
}

// reset ends both connections at once, rather than the failed direction as sniproxy-rs does; that of the client with a
// reset, so that it does not mistake what it has for all there is.
func (c *conn) reset() {
	control(c.client, func(fd int) {
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	})
	c.close()
}

// close ends both connections at once.
func (c *conn) close() {
	c.client.Close()
	c.closeBackend()
}

// closeBackend closes the connection to the backend: in another thread, if it may hold what the system could not refuse.
func (c *conn) closeBackend() {
	e := c.engine
	if !e.hosts.RefusesDescriptors() && !c.drained.Load() {
		// It is ended at once, and nobody waits for it to be closed.
		control(c.backend, func(fd int) {
			if own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
				unix.Shutdown(fd, unix.SHUT_RDWR)
				c.tenant.CloseAway(e.shares.Threads, own)
			}
		})
	}
	c.backend.Close()
}

// shutdown ends a direction. It fails only where there is nothing left to end.
func shutdown(f *os.File, how int) {
	control(f, func(fd int) { unix.Shutdown(fd, how) })
}

// control calls do with the descriptor of f, unless f is closed.
func control(f *os.File, do func(fd int)) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { do(int(fd)) })
}

// A buffer is for what one call reads, and for what a backend passes besides.
type buffer struct {
	bytes   [sni.MaxHello]byte
	control [socket.ControlSize]byte
}

// buffers are for sources.
var buffers = sync.Pool{New: func() any { return new(buffer) }}

// A source reads from a file with a buffer that it holds only from the moment when there
// is something to read until what was read is dealt with. Idle connections have none.
type source struct {
	raw    syscall.RawConn
	try    func(fd uintptr) bool
	passed func(fds []int) // gets descriptors that were received, which end the source

	buf  *buffer
	size int
	n    int
	err  error
}

// newSource returns a source. If descriptors can be passed with what it reads, it receives them.
func newSource(f *os.File, passes bool) *source {
	s := &source{}
	s.raw, s.err = f.SyscallConn()
	s.try = func(fd uintptr) bool {
		s.buf = buffers.Get().(*buffer)
		for {
			if passes {
				s.receive(int(fd))
			} else {
				s.n, s.err = unix.Read(int(fd), s.buf.bytes[:s.size])
			}
			switch s.err {
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				s.release()
				return false
			}
			return true
		}
	}
	return s
}

var errPassed = errors.New("descriptors were passed")

// No program is started that could inherit what is received.
func (s *source) receive(fd int) {
	var size int
	s.n, size, _, _, s.err = unix.Recvmsg(fd, s.buf.bytes[:s.size], s.buf.control[:], 0)
	if s.err == nil && size > 0 {
		if fds := socket.Passed(s.buf.control[:size]); len(fds) > 0 {
			s.passed(fds)
			s.err = errPassed
		}
	}
}

// read waits for input, and returns at most size bytes of it. They are valid until
// release, which must follow if there is no error. At the end it returns [io.EOF].
func (s *source) read(size int) ([]byte, error) {
	if s.raw == nil {
		return nil, s.err
	}
	s.size = size
	if err := s.raw.Read(s.try); err != nil {
		return nil, err
	}
	if s.err == nil && s.n > 0 {
		return s.buf.bytes[:s.n], nil
	}
	s.release()
	if s.err == nil {
		return nil, io.EOF
	}
	return nil, s.err
}

// release gives the buffer back.
func (s *source) release() {
	buffers.Put(s.buf)
	s.buf = nil
}
