package main

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// mostPassed is how many descriptors there can be in a message (SCM_MAX_FD).
const mostPassed = 253

// passedLine is what the log says of a backend that has passed descriptors.
var passedLine = regexp.MustCompile(`(?im)^sniproxy: .*passed.*descriptor`)

// passTo sends b, and descriptors with it.
func passTo(c *net.UnixConn, b []byte, flags int, fds ...int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	failed := raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), b, unix.UnixRights(fds...), nil, flags)
		return sent != unix.EAGAIN
	})
	return errors.Join(failed, sent)
}

// A token is a socket of which descriptors are passed: who has the other end finds out whether all
// of them are closed.
type token struct {
	fd    int
	other net.Conn
}

func newToken(t *testing.T) token {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "socket")
	defer f.Close()
	other, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return token{fds[0], other}
}

// expectClosed closes this process's descriptor, and fails the test unless that was the last.
func (k token) expectClosed(t *testing.T) {
	t.Helper()
	unix.Close(k.fd)
	k.other.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if err := expectEnd(k.other); err != nil {
		t.Errorf("a descriptor that was passed is still open: %v", err)
	}
}

// Goal: where the system has SO_PASSRIGHTS, a backend cannot pass descriptors, and trying does not
// harm its connections.
func TestPassedRefused(t *testing.T) {
	needPassRights(t)
	d := start(t)
	l := d.host("evil.example")
	for _, flags := range []int{0, unix.MSG_OOB} {
		client, backend := d.pair(l, "evil.example")
		k := newToken(t)
		if err := passTo(backend, []byte("a"), flags, k.fd); !errors.Is(err, unix.EPERM) {
			t.Errorf("passing a descriptor with the flags %#x: got error %v, want EPERM", flags, err)
		}
		k.expectClosed(t)
		ping(t, client, backend)
		ping(t, backend, client)
	}
}

// needPassRights skips the test where the system, or the run of the tests, does not have
// SO_PASSRIGHTS.
func needPassRights(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, hostdirtest.SOPassRights, 0); err != nil || denied("passrights") {
		t.Skipf("no SO_PASSRIGHTS, which Linux has since 6.16: %v", err)
	}
}

// Goal: where the system lacks it, a backend that passes descriptors, in whatever way, loses its
// connection as if it had reset it, with a line in the log. None of the descriptors stays open.
func TestPassedDescriptors(t *testing.T) {
	many := func(fd int) (fds []int) {
		for range mostPassed {
			fds = append(fds, fd)
		}
		return fds
	}
	bulk := make([]byte, 20_000)
	for _, tt := range []struct {
		name string
		pass func(c *net.UnixConn, fd int) error
	}{
		{"one", func(c *net.UnixConn, fd int) error { return passTo(c, []byte("a"), 0, fd) }},
		{"as many as there can be", func(c *net.UnixConn, fd int) error { return passTo(c, []byte("a"), 0, many(fd)...) }},
		{"many messages", func(c *net.UnixConn, fd int) error {
			for range 20 {
				if err := passTo(c, []byte("a"), 0, many(fd)...); err != nil && !isReset(err) {
					return err
				}
			}
			return nil
		}},
		{"urgent", func(c *net.UnixConn, fd int) error { return passTo(c, []byte("a"), unix.MSG_OOB, fd) }},
		{"in the middle", func(c *net.UnixConn, fd int) error {
			if _, err := c.Write(bulk); err != nil {
				return err
			}
			if err := passTo(c, bulk, 0, fd); err != nil && !isReset(err) {
				return err
			}
			c.Write(bulk)
			return nil
		}},
		{"and ends", func(c *net.UnixConn, fd int) error {
			err := passTo(c, []byte("a"), 0, fd)
			c.CloseWrite()
			return err
		}},
		{"and closes", func(c *net.UnixConn, fd int) error {
			err := passTo(c, []byte("a"), 0, fd)
			c.Close()
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := start(t, deny("passrights"))
			l := d.host("evil.example")
			d.serve("good.example", hostdirtest.Greet)
			base, all := d.fds(), d.allFds()
			client, backend := d.pair(l, "evil.example")
			k := newToken(t)
			hostdirtest.Must(t, tt.pass(backend, k.fd))
			if _, err := io.Copy(io.Discard, client); !isReset(err) {
				t.Errorf("the client got %v, want a reset", err)
			}
			if _, err := io.Copy(io.Discard, backend); err != nil && !isReset(err) && !errors.Is(err, net.ErrClosed) {
				t.Errorf("the backend got %v, want the end", err)
			}
			hostdirtest.Await(t, "a line about it", func() bool { return passedLine.MatchString(d.err.String()) })
			client.Close()
			backend.Close()
			k.expectClosed(t)
			d.awaitFds(base)
			hostdirtest.Await(t, "the descriptors to be closed", func() bool { return d.allFds() <= all+8 })
			if err := d.greeted("good.example"); err != nil {
				t.Error(err)
			}
			d.signal(unix.SIGTERM)
			d.expectExit(0)
		})
	}
}

// Goal: no descriptor stays open that is in a message which nobody has read when the client goes
// away, nor one that came while the daemon could not send on what it had.
func TestPassedUnread(t *testing.T) {
	d := start(t, deny("passrights"))
	l := d.host("evil.example")
	base := d.fds()
	for _, end := range []func(c *net.TCPConn){abort, func(c *net.TCPConn) { c.Close() }} {
		client, backend := d.pair(l, "evil.example")
		hostdirtest.Must(t, fillUp(backend))
		k := newToken(t)
		for range 3 {
			if err := passTo(backend, []byte("a"), 0, k.fd); err != nil && !isReset(err) {
				t.Fatal(err)
			}
		}
		end(client)
		io.Copy(io.Discard, backend)
		backend.Close()
		k.expectClosed(t)
		d.awaitFds(base)
	}
}

// fillUp sends until nothing is taken any more. There is still some room in the socket.
func fillUp(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	taken := func() (yes bool) {
		raw.Control(func(fd uintptr) {
			n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
			yes = n == 0 && err == nil
		})
		return yes
	}
	for b := make([]byte, 32<<10); ; {
		if _, err := c.Write(b); err != nil {
			return err
		}
		if !hostdirtest.AwaitFor(200*time.Millisecond, taken) {
			return nil
		}
	}
}

// slowFiles are files that are open, and that nobody closes quickly who is the last to do so.
type slowFiles struct {
	fds     []int
	arm     func() // to be called when they are passed, and closed here
	release func() // ends it
}

// lingeringSockets returns sockets of TCP whose last close waits until what was sent has arrived.
func lingeringSockets(t *testing.T, n int) (files slowFiles) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	share(t, l).do(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) })
	var others []*net.TCPConn
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		files.fds = append(files.fds, fd)
		addr := l.Addr().(*net.TCPAddr)
		if err := errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4096),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 60}),
			unix.Connect(fd, &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(addr.IP.To4())}),
			unix.SetNonblock(fd, true),
		); err != nil {
			t.Fatal(err)
		}
		other, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		others = append(others, other)
		for b := make([]byte, 4096); err == nil; {
			_, err = unix.Write(fd, b)
		}
	}
	files.arm = func() {}
	files.release = func() {
		for _, other := range others {
			abort(other)
		}
	}
	return files
}

// writtenFile returns descriptors of a file in user space, which wait for what was written to it.
func writtenFile(t *testing.T, n int) (files slowFiles) {
	hostdirtest.OwnMounts(t)
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	fs.Lazy = true
	fs.Add(hostdirtest.RootNode, "f", unix.S_IFREG|0o666, "")
	fs.Serve(time.Hour)
	for range n + 1 {
		fd, err := unix.Open(filepath.Join(fs.Dir, "f"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		files.fds = append(files.fds, fd)
	}
	writer := files.fds[n]
	files.fds = files.fds[:n]
	files.arm = func() {
		fs.HoldWrites()
		if _, err := unix.Write(writer, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	files.release = sync.OnceFunc(func() {
		fs.Abort()
		unix.Close(writer)
	})
	return files
}

// Goal: descriptors whose last close takes long or hangs, in messages that are read or not, keep no
// other host from being served, whoever closes them. Few threads close them. The daemon ends when
// it is told to, as soon as the system lets it.
func TestPassedSlow(t *testing.T) {
	for _, tt := range []struct {
		name               string
		make               func(t *testing.T, n int) slowFiles
		backends, messages int
		each               int // descriptors of a message
	}{
		{"sockets that linger", lingeringSockets, 1, 2, mostPassed},
		{"file that was written to", writtenFile, 1, 1, 1},
		{"file that was written to, by many backends", writtenFile, 40, 1, 1},
	} {
		for _, end := range []struct {
			name string
			do   func(client *net.TCPConn)
		}{
			{"read", func(client *net.TCPConn) { go io.Copy(io.Discard, client) }},
			{"not read", abort},
		} {
			t.Run(tt.name+", "+end.name, func(t *testing.T) {
				t.Parallel()
				d := start(t, deny("passrights"), oneLoop)
				d.serve("good.example", hostdirtest.Greet)
				l := d.host("evil.example")
				base, threads := d.fds(), d.threads()
				files := tt.make(t, tt.backends*tt.messages*tt.each)
				defer files.release()
				var clients []*net.TCPConn
				var backends []*net.UnixConn
				for range tt.backends {
					client, backend := d.pair(l, "evil.example")
					clients, backends = append(clients, client), append(backends, backend)
				}
				inParallel(len(backends), len(backends), func(i int) {
					if err := fillUp(backends[i]); err != nil {
						t.Error(err)
					}
				})
				for fds := files.fds; len(fds) > 0; fds = fds[tt.each:] {
					hostdirtest.Must(t, passTo(backends[len(fds)/tt.each%len(backends)], []byte("a"), 0, fds[:tt.each]...))
				}
				for _, fd := range files.fds {
					unix.Close(fd)
				}
				files.arm()
				for _, client := range clients {
					end.do(client)
				}
				h := snitest.Hello("good.example")
				for i := range 300 {
					got, err := d.exchangeWithin(h, limits.Hello/2)
					if err != nil || string(got) != "this is good.example" {
						t.Errorf("client %d of another host: got %q, error %v", i, got, err)
						break
					}
				}
				if n := d.threads(); !t.Failed() && n > threads+16 {
					t.Errorf("the daemon has %d threads, and had %d before, want at most %d", n, threads, threads+16)
				}
				for i, backend := range backends {
					backend.Close()
					clients[i].Close()
				}
				files.release()
				d.awaitFds(base)
				d.signal(syscall.SIGTERM)
				d.expectExit(0)
			})
		}
	}
}
