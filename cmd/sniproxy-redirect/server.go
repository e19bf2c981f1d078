package main

import (
	"container/list"
	"io"
	"log"
	"net"
	"net/http"
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
	// requestTime is for a request, from accept on.
	requestTime = 10 * time.Second

	// maxHead is how long the head of a request may be in bytes. Package net/http adds 4 KiB to
	// what it is told.
	maxHead = 8 << 10
)

// A server answers all clients. Each connection has one request: who is redirected goes on
// elsewhere.
type server struct {
	http      http.Server
	listeners []*listener
	serving   sync.WaitGroup // goroutines that accept
	drained   chan struct{}  // closed when the last client has gone, and none can come
	failed    chan error     // gets the reason if the server cannot go on

	mu     sync.Mutex
	open   list.List // of conn: who has waited longest is first
	places map[net.Conn]*list.Element
	last   bool // no client can come any more
}

// startServer starts a server that accepts clients from the listeners, and serves those that are
// there already.
func startServer(listeners []*inherit.Listener, clients []int) (*server, error) {
	s := &server{
		drained: make(chan struct{}),
		failed:  make(chan error, len(listeners)),
		places:  make(map[net.Conn]*list.Element),
	}
	s.http = http.Server{
		Handler:                      http.HandlerFunc(redirect),
		DisableGeneralOptionsHandler: true,
		ReadTimeout:                  requestTime,
		WriteTimeout:                 requestTime,
		MaxHeaderBytes:               maxHead - 4<<10,
		ConnState:                    s.follow,
		ErrorLog:                     log.New(io.Discard, "", 0), // it tells what clients do wrong
	}
	s.http.SetKeepAlivesEnabled(false)
	for _, inherited := range listeners {
		f, err := inherit.Pollable(&inherited.FD)
		if err != nil {
			return nil, err
		}
		s.listeners = append(s.listeners, &listener{s, inherited, f})
	}
	for _, l := range s.listeners {
		s.serving.Go(func() { s.http.Serve(l) }) // it ends with the listener
	}
	for _, fd := range clients {
		peer := socket.Peer(fd)
		f, err := inherit.Pollable(&fd)
		if err != nil {
			return nil, err
		}
		s.serving.Go(func() { s.http.Serve(&one{conn{f, peer}}) })
	}
	go func() {
		s.serving.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.last = true; s.open.Len() == 0 {
			close(s.drained)
		}
	}()
	return s, nil
}

// A conn is a client's connection. (Package net would want a descriptor more for a moment.)
type conn struct {
	*os.File
	peer socket.Address
}

func (conn) LocalAddr() net.Addr  { return nil }
func (conn) RemoteAddr() net.Addr { return &net.TCPAddr{} } // net/http prints it, and nobody reads that

// CloseWrite has net/http wait until the answer has arrived.
func (c conn) CloseWrite() error {
	socket.Shutdown(c.File, unix.SHUT_WR)
	return nil
}

// A listener is an inherited listening socket.
type listener struct {
	server *server
	*inherit.Listener
	file *os.File
}

func (l *listener) Close() error   { return l.file.Close() }
func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.Listener.Addr) }

// Accept accepts a client. It fails only when the listener was closed.
func (l *listener) Accept() (net.Conn, error) {
	for {
		fd, peer, err := inherit.Accept(l.file)
		switch err {
		case nil:
			return conn{os.NewFile(uintptr(fd), "client"), peer}, nil
		case os.ErrClosed:
			return nil, net.ErrClosed
		case unix.ECONNABORTED: // only that client is gone
			continue
		case unix.EMFILE, unix.ENFILE:
			if l.server.dropOldest() {
				continue
			}
		}
		if !l.StillListens() {
			l.server.failed <- l.ShutDown()
			return nil, net.ErrClosed
		}
		report.AcceptFailed(err)
		time.Sleep(limits.AcceptPause) // clients wait in the backlog
	}
}

// One is a listener with a single connection, which was there before.
type one struct{ conn net.Conn }

func (l *one) Addr() net.Addr { return nil }
func (l *one) Close() error   { return nil }

func (l *one) Accept() (net.Conn, error) {
	c := l.conn
	if l.conn = nil; c == nil {
		return nil, net.ErrClosed
	}
	return c, nil
}

// follow is told by net/http what a connection does.
func (s *server) follow(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.places[c] = s.open.PushBack(c)
	case http.StateClosed:
		s.forget(c)
	}
}

// forget is for a connection that has ended.
func (s *server) forget(c net.Conn) {
	place := s.places[c]
	if place == nil {
		return // it was dropped
	}
	s.open.Remove(place)
	delete(s.places, c)
	if s.last && s.open.Len() == 0 {
		close(s.drained)
	}
}

// dropOldest drops the client that has waited longest for its request, so silent clients cannot
// lock out others. It reports whether there was one.
func (s *server) dropOldest() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.open.Front()
	if first == nil {
		return false
	}
	c := first.Value.(conn)
	report.Dropped(c.peer)
	c.Close()
	s.forget(c)
	return true
}

// stop ends accepting, and lets go of the listening sockets. Clients that are there are answered.
func (s *server) stop() {
	for _, l := range s.listeners {
		l.Close()
	}
}

// cut ends all connections, and returns how many there were.
func (s *server) cut() int {
	s.mu.Lock()
	n := s.open.Len()
	s.mu.Unlock()
	s.http.Close()
	return n
}
