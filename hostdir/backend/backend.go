// Package backend is the other end of sniproxy: a listener for a program that serves a host and is
// handed the connections of its clients.
//
// If the tls-socket in a host's directory is a datagram socket, sniproxy hands over the client's
// connection itself as soon as it has read the name, and is out of the way from then on. Such a
// connection costs the proxy nothing, goes on when the proxy ends, and has the client's address.
// A program becomes such a backend by its listener:
//
//	l, err := backend.Listen("/srv/sniproxy/one.example") // the host's directory
//	if err != nil {
//		log.Fatal(err)
//	}
//	log.Fatal(http.ServeTLS(l, handler, "cert.pem", "key.pem"))
//
// If systemd makes the socket, [FileListener] takes that, and clients wait while the program
// restarts.
//
// The connections are TCP connections whose first bytes, the beginning of a ClientHello, the proxy
// has read already. [Conn] gives them back.
//
// # Addresses
//
// RemoteAddr is the client's address as the connection itself knows it, without a marker such as
// send-proxy-v1. If the proxy is behind a load balancer that sends PROXY protocol headers, make a
// marker: the package reads the header, of either version, and RemoteAddr is what it says.
// LocalAddr is always that of the connection.
//
// # Permissions
//
// The socket has mode 0666, so let the directory keep everybody but the proxy out (mode 0710, and
// the proxy's group). Whoever can write to the socket is trusted to say who clients are.
//
// # What is ignored
//
// A message that does not come with exactly one descriptor, or with one that is not a connected TCP
// socket, is closed and ignored. It never makes [Listener.Accept] fail.
//
// # Limits
//
// A connection waits in the socket's queue until Accept is called. The system limits the queue (on
// Linux net.unix.max_dgram_qlen, 10 unless somebody has raised it), and while it is full the proxy
// tries again for ten seconds. So call Accept in a loop that does nothing slow. A process without
// free descriptors takes nothing from the queue.
//
// The path of a Unix socket is limited to about a hundred bytes. On Linux Listen gets around that
// with /proc or, where there is none, with a working directory of a thread's own; elsewhere with a
// symlink in the directory for temporary files.
package backend

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// socketName is the name of the socket in a host's directory.
	socketName = "tls-socket"

	// pauseMost is the longest pause after a failure that time may cure, such as no free
	// descriptor.
	pauseMost = 100 * time.Millisecond

	// handOnMost is how long Close waits for room in the queue of the backend that has taken over.
	handOnMost = time.Second
)

// A Listener takes the connections that are handed to a backend. It is a [net.Listener].
type Listener struct {
	dir  *directory // nil for a socket that somebody else has made
	addr *net.UnixAddr
	own  inode // of the socket's file, if dir is there
	file *os.File
	raw  syscall.RawConn // of file

	stopOnce  sync.Once
	closing   chan struct{} // closed by Close
	closeOnce sync.Once

	mu       sync.Mutex
	receiver receiver // guarded by mu
	stopped  bool     // by Stop: the socket has no file any more; guarded by mu
}

// Listen makes the socket in the directory of a host. The host is served by this process from then
// on: a backend that served it before gets no more connections, and a socket that a crash has left
// is replaced. There is no moment without a socket in between.
func Listen(dir string) (*Listener, error) {
	path := filepath.Join(dir, socketName)
	addr := &net.UnixAddr{Name: path, Net: "unixgram"}
	fail := func(err error) (*Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: addr.Net, Addr: addr, Err: err}
	}
	d, err := openDirectory(dir)
	if err != nil {
		return fail(err)
	}
	fd, err := newSocket()
	if err != nil {
		d.close()
		return fail(err)
	}
	l, err := newListener(fd, addr)
	if err == nil {
		l.dir = d
		if l.own, err = d.install(fd); err != nil {
			l.file.Close()
		}
	}
	if err != nil {
		d.close()
		return fail(err)
	}
	return l, nil
}

// FileListener returns a listener for a datagram socket that somebody else has made, and keeps:
// systemd, for a socket unit with ListenDatagram=. So clients wait in its queue while the backend
// restarts. The file is still the caller's, who may close it; the socket becomes non-blocking for
// all who have it.
//
// Stop and Close leave the path of the socket alone, and leave the connections that wait to who
// takes them next. Two processes must not take connections from one socket at the same time: they
// would lose some.
func FileListener(f *os.File) (*Listener, error) {
	fail := func(err error) (*Listener, error) {
		return nil, &net.OpError{Op: "file+net", Net: "unixgram", Err: err}
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return fail(err)
	}
	fd := -1
	failed := raw.Control(func(file uintptr) { fd, err = unix.FcntlInt(file, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(failed, os.NewSyscallError("fcntl", err)); err != nil {
		return fail(err)
	}
	addr, err := unix.Getsockname(fd)
	path, ok := addr.(*unix.SockaddrUnix)
	kind, kindErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kindErr != nil || !ok || kind != unix.SOCK_DGRAM {
		unix.Close(fd)
		return fail(errors.New("it is not a Unix datagram socket"))
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fail(os.NewSyscallError("fcntl", err))
	}
	prepare(fd)
	l, err := newListener(fd, &net.UnixAddr{Name: path.Name, Net: "unixgram"})
	if err != nil {
		return fail(err)
	}
	return l, nil
}

// newListener returns a listener for a socket, which it closes if it cannot.
func newListener(fd int, addr *net.UnixAddr) (*Listener, error) {
	file := os.NewFile(uintptr(fd), addr.Name)
	raw, err := file.SyscallConn()
	if err == nil {
		// This fails if the runtime could not put the socket on its poller.
		err = file.SetDeadline(time.Time{})
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return &Listener{addr: addr, file: file, raw: raw, closing: make(chan struct{})}, nil
}

// Addr returns the path of the socket, as a [*net.UnixAddr].
func (l *Listener) Addr() net.Addr { return l.addr }

// Accept waits for a connection and returns it, a [*Conn]. It fails only once the listener is
// closed, or is stopped and has none left, with an error that is [net.ErrClosed].
func (l *Listener) Accept() (net.Conn, error) {
	var pause time.Duration
	for {
		m, err := l.receive()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || !l.wait(&pause) {
				return nil, l.closed("accept")
			}
			continue
		}
		pause = 0
		if c := l.admit(m); c != nil {
			return c, nil
		}
	}
}

// receive waits for a message. An error may be gone the next time, unless the listener is closed.
func (l *Listener) receive() (m message, err error) {
	take := func(fd uintptr) bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.isClosed() || l.stopped && l.dir == nil {
			err = net.ErrClosed // what is left is for Close, or for who takes it next
			return true
		}
		m, err = l.receiver.receive(int(fd))
		if err == unix.EAGAIN && l.stopped {
			err = net.ErrClosed
		}
		return err != unix.EAGAIN
	}
	var failed error
	if l.isStopped() {
		failed = l.raw.Control(func(fd uintptr) { take(fd) }) // it must not wait
	} else {
		failed = l.raw.Read(take)
	}
	return m, errors.Join(failed, err)
}

func (l *Listener) isStopped() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stopped
}

func (l *Listener) isClosed() bool {
	select {
	case <-l.closing:
		return true
	default:
		return false
	}
}

// closed is the error of what is called after Close.
func (l *Listener) closed(op string) error {
	return &net.OpError{Op: op, Net: l.addr.Net, Addr: l.addr, Err: net.ErrClosed}
}

// wait pauses, longer each time, and reports whether the listener is still open.
func (l *Listener) wait(pause *time.Duration) bool {
	*pause = min(max(2*time.Millisecond, 2**pause), pauseMost)
	timer := time.NewTimer(*pause)
	defer timer.Stop()
	select {
	case <-l.closing:
		return false
	case <-timer.C:
		return true
	}
}

// admit makes a connection of a message. It returns nil if it cannot.
func (l *Listener) admit(m message) *Conn {
	if !m.good() {
		ignored.close(m.fds)
		return nil
	}
	f := os.NewFile(uintptr(m.fds[0]), "")
	defer f.Close()
	var pause time.Duration
	for {
		c, err := newConn(f, m.data)
		if err == nil || !passes(err) || !l.wait(&pause) {
			return c
		}
	}
}

// passes reports whether an error is about something that a system may have again later.
func passes(err error) bool {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// Stop removes the socket, unless another backend has replaced it. Accept still returns the
// connections that wait already, and fails when there are no more. Call Close then. (For those of
// [FileListener] see there.)
func (l *Listener) Stop() error {
	err := l.closed("stop")
	l.stopOnce.Do(func() {
		if !l.isClosed() {
			err = l.stop()
		}
	})
	return err
}

func (l *Listener) stop() error {
	var err error
	if l.dir != nil {
		_, err = l.dir.remove(l.own)
	}
	l.mu.Lock()
	l.stopped = true
	l.mu.Unlock()
	l.file.SetReadDeadline(time.Unix(1, 0)) // each Accept that waits looks again
	if err != nil {
		return &net.OpError{Op: "stop", Net: l.addr.Net, Addr: l.addr, Err: err}
	}
	return nil
}

// Close removes the socket, unless another backend has replaced it, and ends Accept. Connections
// that wait to be accepted go to the backend that has replaced this one; if there is none, they are
// closed. Connections that were accepted go on.
func (l *Listener) Close() error {
	err := l.closed("close")
	l.closeOnce.Do(func() { err = l.close() })
	return err
}

func (l *Listener) close() error {
	l.mu.Lock()
	close(l.closing)
	l.mu.Unlock()
	if l.dir == nil {
		l.file.Close()
		return nil
	}
	// The socket must be open until its file is gone: no other file can have the inode until then.
	replaced, err := l.dir.remove(l.own)
	if replaced {
		l.raw.Control(func(fd uintptr) { l.handOn(int(fd)) })
	}
	l.file.Close()
	l.dir.close()
	if err != nil {
		return &net.OpError{Op: "close", Net: l.addr.Net, Addr: l.addr, Err: err}
	}
	return nil
}

// handOn sends the messages that are left to the socket that is in the directory now, which is
// where the proxy would send them.
func (l *Listener) handOn(fd int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	late := time.Now().Add(handOnMost)
	// again pauses after what may succeed the next time.
	again := func(err error) bool {
		if err != unix.EAGAIN && !passes(err) || time.Now().After(late) {
			return false
		}
		time.Sleep(time.Millisecond)
		return true
	}
	for {
		m, err := l.receiver.receive(fd)
		if err == unix.EAGAIN {
			return // that was the last
		}
		if err != nil {
			if again(err) {
				continue
			}
			return
		}
		for m.good() {
			err := l.dir.reach(socketName, func(path string) error {
				return unix.Sendmsg(fd, m.data, unix.UnixRights(m.fds[0]), &unix.SockaddrUnix{Name: path}, 0)
			})
			if !again(err) {
				break
			}
		}
		ignored.close(m.fds)
	}
}

// temporaryName returns a name for what is to become the socket, and for what was it.
func temporaryName() string { return fmt.Sprintf(".%s-%08x", socketName, rand.Uint32()) }
