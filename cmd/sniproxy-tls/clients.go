package main

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/logline"
)

const (
	// clientsMost is the most connections of clients, and of requests at once, however many
	// descriptors there may be: each takes memory too.
	clientsMost = 4096

	// ownDescriptors is more than what the program has open besides connections: what it inherits,
	// its socket, its poller, and what it needs for a moment to read certificates and order new
	// ones.
	ownDescriptors = 40

	// silentLeast is how long a connection has been silent, at least, before it has to make room.
	silentLeast = time.Second
)

// A client is a connection of a client. It has the methods of [net.Conn] alone: others could read
// past the first bytes, which the proxy has read already.
type client struct {
	net.Conn
	set  *clients
	last atomic.Int64 // when it moved a byte last, on the clock of the set
	cut  atomic.Bool  // it has ended below TLS
	once sync.Once

	// What the server waits for, with HTTP: one of the constants, or for a request since last was
	// this.
	wait atomic.Int64
}

// What a server waits for besides a request.
const (
	waitHandshake = -1
	waitNone      = -2
)

func (c *client) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.last.Store(c.set.now())
	}
	if err == io.EOF {
		c.cut.Store(true)
	}
	return n, err
}

func (c *client) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.last.Store(c.set.now())
	}
	return n, err
}

// Close closes the connection, which leaves the set.
func (c *client) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { c.set.remove(c) })
	return err
}

// reset closes the connection as a failure.
func (c *client) reset() {
	if tcp, ok := c.Conn.(interface{ SetLinger(int) error }); ok {
		tcp.SetLinger(0)
	}
	c.Close()
}

// clients are the connections that are open. Their number is limited, so that there is always a
// descriptor for the service, for certificates and for orders.
type clients struct {
	most  int
	start time.Time

	mu    sync.Mutex
	all   map[*client]struct{}
	freed chan struct{} // gets a value when one has ended
}

// newClients returns an empty set. The limit of descriptors must be known to be enough.
func newClients() *clients {
	return &clients{
		most:  roomFor(descriptors.Limit()),
		start: time.Now(),
		all:   make(map[*client]struct{}),
		freed: make(chan struct{}, 1),
	}
}

// roomFor returns how many clients there is room for under a limit of descriptors: each takes two.
func roomFor(limit int64) int { return int(min((limit-ownDescriptors)/2, clientsMost)) }

// now is the clock of the set.
func (s *clients) now() int64 { return int64(time.Since(s.start)) }

// admit takes a connection into the set. While the set is full it waits, and the proxy with its
// clients, for one to end or to make room.
func (s *clients) admit(conn net.Conn) *client {
	c := &client{Conn: conn, set: s}
	c.last.Store(s.now())
	c.wait.Store(waitHandshake)
	for !s.add(c) {
		if s.makeRoom(false) {
			continue
		}
		timer := time.NewTimer(silentLeast / 10)
		select {
		case <-s.freed:
		case <-timer.C:
		}
		timer.Stop()
	}
	return c
}

func (s *clients) add(c *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) >= s.most {
		return false
	}
	s.all[c] = struct{}{}
	return true
}

func (s *clients) remove(c *client) {
	s.mu.Lock()
	delete(s.all, c)
	s.mu.Unlock()
	select {
	case s.freed <- struct{}{}:
	default:
	}
}

// makeRoom ends the connection that has been silent longest, if there is one that has not just
// moved a byte. With busy only those count that requests or bytes are under way for.
func (s *clients) makeRoom(busy bool) bool {
	silent := s.silentLongest(busy)
	if silent == nil {
		return false
	}
	since := time.Duration(s.now() - silent.last.Load())
	if since < silentLeast {
		return false
	}
	logline.Rationed(func() string {
		return "there are as many connections or requests as may be: ended the connection that had been silent longest, for " + since.Round(time.Second).String()
	})
	silent.reset()
	return true
}

func (s *clients) silentLongest(busy bool) (silent *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		if busy && c.wait.Load() != waitNone {
			continue
		}
		if silent == nil || c.last.Load() < silent.last.Load() {
			silent = c
		}
	}
	return silent
}

// coming reports whether there are clients in the handshake, or sending the head of a request.
func (s *clients) coming() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.all {
		if wait := c.wait.Load(); wait == waitHandshake || wait >= 0 && c.last.Load() > wait {
			return true
		}
	}
	return false
}

func (s *clients) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// cut ends all that is open, and returns how many that were.
func (s *clients) cut() int {
	s.mu.Lock()
	all := make([]*client, 0, len(s.all))
	for c := range s.all {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.reset()
	}
	return len(all)
}
