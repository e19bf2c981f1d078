package main

import (
	"container/list"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/socket"
)

const (
	// requestTime is for a request, from accept or the answer before it until its own answer is
	// sent.
	requestTime = 10 * time.Second

	// mostRequests is how many requests a connection has.
	mostRequests = 100

	// firstBuffer is enough for the head of most requests.
	firstBuffer = 1 << 10
)

// A server answers the requests of all clients.
type server struct {
	listeners []*os.File
	running   sync.WaitGroup // goroutines that accept, and one for each client
	drained   chan struct{}  // closed when the last client has gone, after drain
	draining  sync.Once
	failed    chan error // gets the reason if the server cannot go on

	mu       sync.Mutex
	open     list.List // of *conn: who has waited longest for its present request is first
	stopping bool
}

// A conn is the connection of a client.
type conn struct {
	server *server
	socket *os.File
	peer   socket.Address
	gone   chan struct{} // closed when it has ended

	// Under the server's lock.
	queued *list.Element
	idle   bool // nothing has come since the last answer
}

// startServer starts a server that accepts clients from the listeners, and serves those that are
// there already.
func startServer(listeners []*inherit.Listener, clients []int) (*server, error) {
	s := &server{drained: make(chan struct{}), failed: make(chan error, len(listeners))}
	for _, l := range listeners {
		f, err := inherit.Pollable(&l.FD)
		if err != nil {
			return nil, err
		}
		s.listeners = append(s.listeners, f)
		s.running.Go(func() { s.accept(l, f) })
	}
	for _, fd := range clients {
		peer := socket.Peer(fd)
		f, err := inherit.Pollable(&fd)
		if err != nil {
			return nil, err
		}
		s.add(f, peer)
	}
	return s, nil
}

// accept accepts clients until the listener is closed. No other failure ends it.
func (s *server) accept(l *inherit.Listener, f *os.File) {
	for {
		fd, peer, err := inherit.Accept(f)
		switch err {
		case nil:
			s.add(os.NewFile(uintptr(fd), "client"), peer)
			continue
		case unix.ECONNABORTED: // only that client is gone
			continue
		case os.ErrClosed:
			return
		case unix.EMFILE, unix.ENFILE:
			if s.dropOldest() {
				continue
			}
		}
		if !l.StillListens() {
			s.failed <- l.ShutDown()
			return
		}
		report.AcceptFailed(err)
		time.Sleep(limits.AcceptPause) // clients wait in the backlog
	}
}

// dropOldest drops the client that has waited longest for its request, so silent clients cannot
// lock out others. It reports whether there was one.
func (s *server) dropOldest() bool {
	s.mu.Lock()
	first := s.open.Front()
	if first == nil {
		s.mu.Unlock()
		return false
	}
	c := first.Value.(*conn)
	c.leave()
	s.mu.Unlock()
	report.Dropped(c.peer)
	c.socket.Close()
	<-c.gone // its descriptor is free
	return true
}

// leave takes the connection from the list. The caller has the lock.
func (c *conn) leave() {
	if c.queued != nil {
		c.server.open.Remove(c.queued)
		c.queued = nil
	}
}

// add begins to serve a client.
func (s *server) add(client *os.File, peer socket.Address) {
	c := &conn{server: s, socket: client, peer: peer, gone: make(chan struct{})}
	s.mu.Lock()
	c.queued = s.open.PushBack(c)
	s.mu.Unlock()
	s.running.Go(func() {
		defer close(c.gone)
		c.serve()
		s.mu.Lock()
		c.leave()
		s.mu.Unlock()
		c.socket.Close()
	})
}

// serve answers the requests of a connection, one after the other.
func (c *conn) serve() {
	b := make([]byte, 0, firstBuffer)
	for n := 1; ; n++ {
		if !c.begin(n > 1 && len(b) == 0) {
			return
		}
		var length int
		var err error
		b, length, err = c.read(b)
		if err != nil {
			if why, ok := errors.AsType[refusal](err); ok {
				c.refuse(why, "")
			}
			return
		}
		r, err := parse(b[:length])
		if why, ok := errors.AsType[refusal](err); ok {
			c.refuse(why, r.method)
			return
		}
		r.last = r.last || n == mostRequests || c.server.stops()
		if !c.answer("308 Permanent Redirect", "Location: "+r.location+"\r\n", "", r.method, r.last) {
			return
		}
		if r.last {
			c.linger()
			return
		}
		b = append(b[:0], b[length:]...)
	}
}

// begin begins to wait for a request. It fails once the connection has no more.
func (c *conn) begin(idle bool) bool {
	if c.socket.SetDeadline(time.Now().Add(requestTime)) != nil {
		return false
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if c.queued != nil { // otherwise it was dropped, or ended by cut
		c.server.open.MoveToBack(c.queued)
	}
	c.idle = idle
	return c.queued != nil && !(idle && c.server.stopping)
}

// read reads more bytes behind those of b until the head of a request is complete, and returns its
// length. If the error is no refusal, there is nobody to tell.
func (c *conn) read(b []byte) (all []byte, length int, err error) {
	for seen := 0; ; {
		if length = headEnd(b, seen); length > 0 {
			return b, length, nil
		}
		switch seen = len(b); {
		case !begins(b):
			return b, 0, errStart
		case seen >= maxHead:
			return b, 0, errTooLarge
		case seen == cap(b):
			b = append(make([]byte, 0, min(2*seen, maxHead)), b...)
		}
		n, err := c.socket.Read(b[seen:cap(b)])
		b = b[:seen+n]
		switch {
		case n > 0 && seen == 0:
			c.server.mu.Lock()
			c.idle = false
			c.server.mu.Unlock()
		case errors.Is(err, os.ErrDeadlineExceeded) && seen > 0:
			return b, 0, errTimeout
		case err != nil:
			return b, 0, err
		}
	}
}

// refuse answers a request that is not redirected, and ends the connection.
func (c *conn) refuse(why refusal, method string) {
	c.socket.SetWriteDeadline(time.Now().Add(limits.Linger))
	if c.answer(why.status, "Content-Type: text/plain\r\n", why.reason+"\n", method, true) {
		c.linger()
	}
}

// answer sends an answer, and reports whether it could.
func (c *conn) answer(status, fields, content, method string, last bool) bool {
	if last {
		fields += "Connection: close\r\n"
	}
	length := len(content)
	if method == "HEAD" {
		content = ""
	}
	// RFC 9110, Section 6.6.1: an origin server with a clock MUST send Date.
	date := time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT")
	_, err := fmt.Fprintf(c.socket, "HTTP/1.1 %s\r\nDate: %s\r\n%sContent-Length: %d\r\n\r\n%s", status, date, fields, length, content)
	return err == nil
}

// linger ends the connection, and sees to it that the answer arrives: closing a socket with unread
// input sends a reset, which can overtake the answer.
func (c *conn) linger() {
	socket.Shutdown(c.socket, unix.SHUT_WR)
	c.socket.SetReadDeadline(time.Now().Add(limits.Linger))
	b := make([]byte, maxHead)
	for left := limits.LingerSize; left > 0; {
		n, err := c.socket.Read(b)
		if err != nil {
			return
		}
		left -= n
	}
}

// stops tells whether the server was stopped.
func (s *server) stops() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// stop ends accepting, lets go of the listening sockets, and ends connections that have had an
// answer and sent nothing since. The others get the answer to the request that they are sending.
func (s *server) stop() {
	for _, f := range s.listeners {
		f.Close()
	}
	s.mu.Lock()
	s.stopping = true
	for e := s.open.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*conn); c.idle {
			c.socket.SetReadDeadline(time.Now())
		}
	}
	s.mu.Unlock()
	s.drain()
}

// drain has drained closed when nobody is accepted any more and the last client has gone.
func (s *server) drain() {
	s.draining.Do(func() {
		go func() {
			s.running.Wait()
			close(s.drained)
		}()
	})
}

// cut ends all connections, waits a moment for that, and returns how many there were.
func (s *server) cut() (n int) {
	s.mu.Lock()
	for s.open.Len() > 0 {
		c := s.open.Front().Value.(*conn)
		c.leave()
		c.socket.Close()
		n++
	}
	s.mu.Unlock()
	select {
	case <-s.drained:
	case <-time.After(limits.Cut):
	}
	return n
}
