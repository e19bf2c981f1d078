//go:build portable || !linux

package main

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/sni"
)

// While a backend takes nothing, its client, which is not read then, is looked at for a reset
// every stallCheck.
const stallCheck = 500 * time.Millisecond

// relay sends the backend the hello, then forwards bytes both ways until both directions
// have ended, or one has failed.
func relay(c *conn, backend *os.File, hello []byte) {
	client := c.client
	var flows sync.WaitGroup
	var sending sync.Mutex // to the backend
	var broken, cut bool   // the backend does not read any more; in the middle of a write
	over := make(chan struct{})
	defer close(over)
	sendUp := func(b []byte) error {
		sending.Lock()
		defer sending.Unlock()
		n, err := send(backend, b, client, func(n int) { c.count(up, n) })
		broken = errors.Is(err, unix.EPIPE)
		cut = broken && n > 0
		if err != nil && !broken {
			c.endsAs(resetByBackend)
		}
		return err
	}
	flows.Go(func() {
		err := sendUp(hello)
		hello = nil
		if err == nil {
			err = forward(sendUp, client)
		}
		switch {
		case err == nil:
			shutdown(backend, unix.SHUT_WR)
			go endQuiet(&c.moved, over, func() {
				c.endsAs(silentHalfClosed)
				reset(client, backend)
			})
		case broken:
			// What the backend has said before is forwarded still; then its side
			// ends too. If it was reset, Linux says so once: to who reads, or in
			// place of the rest of a write that was done in part.
			shutdown(backend, unix.SHUT_RD)
		default:
			c.endsAs(resetByClient)
			reset(client, backend)
		}
	})
	err := forward(func(b []byte) error {
		_, err := send(client, b, nil, func(n int) { c.count(down, n) })
		if err != nil {
			c.endsAs(resetByClient)
		}
		return err
	}, backend)
	if err == nil && poll(backend)&unix.POLLHUP != 0 {
		// If something is being sent to it just now, that fails, and tells how it ended.
		sending.Lock()
		if cut {
			err = unix.ECONNRESET
		}
		sending.Unlock()
	}
	if err != nil {
		c.endsAs(resetByBackend)
		reset(client, backend)
	} else {
		shutdown(client, unix.SHUT_WR)
		go endQuiet(&c.moved, over, func() {
			c.endsAs(silentHalfClosed)
			client.Close()
			backend.Close()
		})
	}
	flows.Wait()
	switch {
	case cut:
		c.endsAs(resetByBackend)
		reset(client, backend)
	case broken:
		c.endsAs(closedByBackend)
		linger(client)
	}
	c.endsAs(closedByBoth)
}

// A telling is what is needed for the line about a connection at its end.
type telling struct {
	account *account
	backend *os.File

	mu  sync.Mutex
	how string
}

// endsAs says how c ends, if that is to be told. What is said first counts: the rest follows from
// it.
func (c *conn) endsAs(how string) {
	if c.telling == nil {
		return
	}
	c.telling.mu.Lock()
	defer c.telling.mu.Unlock()
	if c.telling.how == "" {
		c.telling.how = how
	}
}

// count counts n bytes that the relay has moved.
func (c *conn) count(way, n int) {
	c.moved.Store(true)
	c.counts.count(&c.sent, way, n)
}

// endQuiet calls end for a relay of which one half has ended, when the other has not moved
// anything at quietChecks checks in a row.
func endQuiet(moved *atomic.Bool, over <-chan struct{}, end func()) {
	tick := time.NewTicker(halfClosed / quietChecks)
	defer tick.Stop()
	for checks := 0; checks < quietChecks; checks++ {
		select {
		case <-tick.C:
		case <-over:
			return
		}
		if moved.Swap(false) {
			checks = -1
		}
	}
	end()
}

// forward calls send with all that comes from src, until that ends.
func forward(send func([]byte) error, src *os.File) error {
	in := newSource(src)
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
	if client.SetReadDeadline(time.Now().Add(lingerTimeout)) != nil {
		return
	}
	in := newSource(client)
	for size := 0; size < lingerSize; {
		b, err := in.read(sni.MaxHello)
		if err != nil {
			return
		}
		size += len(b)
		in.release()
	}
}

// reset closes both connections at once, rather than the failed direction as sniproxy-rs does;
// that of the client with a reset, so that it does not mistake what it has for all there is.
func reset(client, backend *os.File) {
	control(client, func(fd int) {
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	})
	client.Close()
	backend.Close()
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

// scratch holds the buffers of sources.
var scratch = sync.Pool{New: func() any { return new([sni.MaxHello]byte) }}

// A source reads from a file with a buffer that it holds only from the moment when there
// is something to read until what was read is dealt with. Idle connections have none.
type source struct {
	raw syscall.RawConn
	try func(fd uintptr) bool

	buf  *[sni.MaxHello]byte
	size int
	n    int
	err  error
}

func newSource(f *os.File) *source {
	s := &source{}
	s.raw, s.err = f.SyscallConn()
	s.try = func(fd uintptr) bool {
		s.buf = scratch.Get().(*[sni.MaxHello]byte)
		for {
			s.n, s.err = unix.Read(int(fd), s.buf[:s.size])
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
		return s.buf[:s.n], nil
	}
	s.release()
	if s.err == nil {
		return nil, io.EOF
	}
	return nil, s.err
}

// release gives the buffer back.
func (s *source) release() {
	scratch.Put(s.buf)
	s.buf = nil
}
