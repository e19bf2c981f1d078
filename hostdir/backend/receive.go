package backend

import (
	"bytes"
	"sync"

	"golang.org/x/sys/unix"

	"sniproxy/proxyproto"
)

const (
	// dataMost is the most bytes that a message may have: 64 KiB of the client, and a header of the
	// PROXY protocol.
	dataMost = 64<<10 + proxyproto.MaxParse

	// controlSize is more than it takes for as many descriptors as one message can pass (253 on
	// Linux), so that the system closes none itself: that may take any time.
	controlSize = 2048

	// tries is how often a message whose descriptors the system does not give out is tried while
	// there are free ones. Other threads may take these each time, but hardly that often.
	tries = 100

	// closers is how many threads may be busy with closing.
	closers = 64
)

// A message is what was sent to the socket.
type message struct {
	fds     []int
	data    []byte
	cut     bool // there was more of either
	missing bool // none of its descriptors could be received
}

// good reports whether the message is what the proxy sends: one connected TCP socket.
func (m *message) good() bool {
	if m.cut || len(m.fds) != 1 {
		return false
	}
	// Only TCP has the option, and only connections have a peer.
	if _, err := unix.GetsockoptInt(m.fds[0], unix.IPPROTO_TCP, unix.TCP_NODELAY); err != nil {
		return false
	}
	_, err := unix.Getpeername(m.fds[0])
	return err == nil
}

// A receiver takes messages from a socket.
type receiver struct{ data, control []byte }

// receive takes a message, and does not wait for one: the error is EAGAIN then. It takes none whose
// descriptors this process has no room for: the error is EMFILE.
//
// Where the system can show a message without taking it (peeks), receive gets the descriptors that
// way, and then throws the message away, which still holds them itself. Elsewhere it looks for free
// descriptors first, and another thread may be faster to take them.
func (r *receiver) receive(s int) (message, error) {
	if r.data == nil {
		r.data, r.control = make([]byte, dataMost), make([]byte, controlSize)
	}
	if !peeks {
		if !haveFree(s) {
			return message{}, unix.EMFILE
		}
		return r.read(s)
	}
	for range tries {
		m, err := r.read(s)
		if err != nil {
			return m, err
		}
		if !m.missing {
			return m, discard(s, m)
		}
		if !haveFree(s) {
			return m, unix.EMFILE
		}
	}
	// A security module forbids to receive what was sent.
	return message{cut: true}, discard(s, message{})
}

// recvmsg is for tests.
var recvmsg = unix.Recvmsg

// read reads a message.
func (r *receiver) read(s int) (m message, err error) {
	n, controls, flags, _, err := recvmsg(s, r.data, r.control, receiveFlags)
	if err != nil {
		return m, err
	}
	m.fds = passed(r.control[:controls])
	m.cut = flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0
	m.missing = flags&unix.MSG_CTRUNC != 0 && len(m.fds) == 0
	if !m.cut && len(m.fds) == 1 {
		m.data = bytes.Clone(r.data[:n])
	}
	return m, nil
}

// discard throws away the message that read has shown. If that fails, which does not happen, it
// closes the descriptors, since the message would be received twice.
func discard(s int, m message) error {
	for {
		switch _, _, err := unix.Recvfrom(s, nil, unix.MSG_DONTWAIT); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			ignored.close(m.fds)
			return err
		}
	}
}

// passed returns the descriptors in control messages.
func passed(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		if more, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, more...)
		}
	}
	if receiveFlags&cloexec == 0 {
		for _, fd := range fds {
			unix.CloseOnExec(fd)
		}
	}
	return fds
}

// haveFree reports whether two descriptors are free: one to receive, and one that package net needs
// to make a connection of it.
func haveFree(s int) bool {
	first, err := unix.FcntlInt(uintptr(s), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(first)
	second, err := unix.FcntlInt(uintptr(s), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(second)
	return true
}

// ignored closes what was sent by mistake or in bad faith.
var ignored closing

// A closing has descriptors to close, where close(2) may take any time, or never return: a file can
// be on a file system that does not answer. Those that no thread is left for stay open.
type closing struct {
	mu      sync.Mutex
	fds     []int
	running int
}

func (c *closing) close(fds []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fds = append(c.fds, fds...)
	for range fds {
		if c.running < closers {
			c.running++
			go c.run()
		}
	}
}

func (c *closing) run() {
	for {
		c.mu.Lock()
		last := len(c.fds) - 1
		if last < 0 {
			c.running--
			c.mu.Unlock()
			return
		}
		fd := c.fds[last]
		c.fds = c.fds[:last]
		c.mu.Unlock()
		unix.Close(fd)
	}
}
