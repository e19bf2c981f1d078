package backend

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"sniproxy/proxyproto"
)

// A Conn is a client's TCP connection. It has all the methods of [net.TCPConn], and reading begins
// with the bytes that the proxy has read already. Like every connection of package net it has
// TCP_NODELAY and keepalive set.
//
// Until those are read, [Conn.File] fails, and so does the Read method of what [Conn.SyscallConn]
// returns: they would miss them.
type Conn struct {
	*tcpConn
	raw    syscall.RawConn // of tcpConn
	remote net.Addr

	// What is left of the first bytes. Only a function that raw.Read calls touches it: raw.Read
	// lets one in at a time, and none after a deadline or once the connection is closed.
	first  []byte
	unread atomic.Bool // there is something left
}

// tcpConn hides the connection from other packages, which could read past the first bytes.
type tcpConn = net.TCPConn

// errUnread is the error of what would read past the first bytes.
var errUnread = errors.New("the first bytes of the connection are not read yet")

// newConn makes a connection of a socket, of which it takes a descriptor of its own, and the data
// that came with it. The connection is nil if there is an error.
func newConn(f *os.File, data []byte) (*Conn, error) {
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok || tcp.RemoteAddr() == nil { // the client has reset it in the meantime
		nc.Close()
		return nil, syscall.ENOTCONN
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		tcp.Close()
		return nil, err
	}
	c := &Conn{tcpConn: tcp, raw: raw, remote: tcp.RemoteAddr(), first: data}
	if h, n, err := proxyproto.Parse(data); err == nil && n > 0 {
		c.first = data[n:]
		if h.Client.IsValid() {
			c.remote = net.TCPAddrFromAddrPort(h.Client)
		}
	}
	c.unread.Store(len(c.first) > 0)
	return c, nil
}

// RemoteAddr returns the client's address, a [*net.TCPAddr]: what the PROXY protocol header says,
// or else that of the connection.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// takeFirst calls take with what is left of the first bytes; take returns how many it has taken.
func (c *Conn) takeFirst(take func([]byte) int) error {
	err := c.raw.Read(func(uintptr) bool {
		if n := take(c.first); n < len(c.first) {
			c.first = c.first[n:]
		} else {
			c.first = nil
			c.unread.Store(false)
		}
		return true
	})
	if e, ok := errors.AsType[*net.OpError](err); ok {
		e.Op = "read"
	}
	return err
}

func (c *Conn) Read(b []byte) (n int, err error) {
	if c.unread.Load() && len(b) > 0 {
		err := c.takeFirst(func(first []byte) int {
			n = copy(b, first)
			return n
		})
		if n > 0 || err != nil {
			return n, err
		}
	}
	return c.tcpConn.Read(b)
}

// WriteTo implements [io.WriterTo].
func (c *Conn) WriteTo(w io.Writer) (n int64, err error) {
	if c.unread.Load() {
		var all []byte
		err := c.takeFirst(func(first []byte) int {
			all = first
			return len(first)
		})
		if err != nil {
			return 0, err
		}
		written, err := w.Write(all)
		n = int64(written)
		if err == nil && written < len(all) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return n, err
		}
	}
	rest, err := c.tcpConn.WriteTo(w)
	return n + rest, err
}

// File is that of [net.TCPConn].
func (c *Conn) File() (*os.File, error) {
	if c.unread.Load() {
		return nil, &net.OpError{Op: "file", Net: "tcp", Source: c.LocalAddr(), Addr: c.remote, Err: errUnread}
	}
	return c.tcpConn.File()
}

// SyscallConn is that of [net.TCPConn].
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	if c.unread.Load() {
		// It must not be the original: package os splices from that one.
		return rawConn{c}, nil
	}
	return c.tcpConn.SyscallConn()
}

// A rawConn is a connection whose first bytes may be unread.
type rawConn struct{ c *Conn }

func (r rawConn) Control(f func(fd uintptr)) error { return r.c.raw.Control(f) }

func (r rawConn) Write(f func(fd uintptr) bool) error { return r.c.raw.Write(f) }

func (r rawConn) Read(f func(fd uintptr) bool) error {
	if r.c.unread.Load() {
		return &net.OpError{Op: "raw-read", Net: "tcp", Source: r.c.LocalAddr(), Addr: r.c.remote, Err: errUnread}
	}
	return r.c.raw.Read(f)
}
