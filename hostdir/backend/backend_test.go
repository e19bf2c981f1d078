package backend_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/proxyproto"
)

// serveHTTP serves pages with the version of HTTP and the client's address.
func serveHTTP(t testing.TB, l net.Listener) *http.Server {
	t.Helper()
	s := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s for %s", r.Proto, r.RemoteAddr)
		}),
		ErrorLog: log.New(io.Discard, "", 0),
	}
	t.Cleanup(func() { s.Close() })
	go s.ServeTLS(l, certFile, keyFile)
	return s
}

// Goal: a web server with the listener serves TLS and HTTP/2, and knows its clients.
func TestHTTP(t *testing.T) {
	dir := hostDir(t)
	serveHTTP(t, listen(t, dir))
	proxy := startProxy(t, dir, "")
	for range 20 {
		got, client, err := get(proxy)
		if want := "HTTP/2.0 for " + client; got != want || err != nil {
			t.Fatalf("the page is %q, error %v; want %q", got, err, want)
		}
	}
}

// Goal: RemoteAddr is what a PROXY header says, if there is one that says something; it is not
// among the bytes to read. Whatever is not such a header is.
func TestHeader(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	const v2 = "\r\n\r\n\x00\r\nQUIT\n"
	for _, test := range []struct{ data, client, first string }{
		{"PROXY TCP4 192.0.2.1 192.0.2.2 258 443\r\nhello", "192.0.2.1:258", "hello"},
		{"PROXY TCP6 2001:db8::1 ::1 258 443\r\nhello", "[2001:db8::1]:258", "hello"},
		{v2 + "\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x01\x02\x01\xbbhello", "192.0.2.1:258", "hello"},
		{v2 + "\x21\x11\x00\x10\xc0\x00\x02\x01\xc0\x00\x02\x02\x01\x02\x01\xbb\x02\x00\x01ahello", "192.0.2.1:258", "hello"},
		{"PROXY UNKNOWN\r\nhello", "", "hello"},
		{v2 + "\x20\x00\x00\x00hello", "", "hello"},
		{v2 + "\x21\x00\x00\x00hello", "", "hello"},
		{"PROXY UNKNOWN\r\n", "", ""},
		{"PROXY UNKNOWN\r\nPROXY TCP4 192.0.2.1 192.0.2.2 258 443\r\n", "", "PROXY TCP4 192.0.2.1 192.0.2.2 258 443\r\n"},
		{"hello", "", "hello"},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 258 443", "", "PROXY TCP4 192.0.2.1 192.0.2.2 258 443"},
		{"PROXY nonsense\r\nhello", "", "PROXY nonsense\r\nhello"},
		{v2, "", v2},
		{"P", "", "P"},
	} {
		client := handOver(t, dir, test.data)
		io.WriteString(client, ", world")
		client.CloseWrite()
		c := accept(t, l)
		if test.client == "" {
			test.client = client.LocalAddr().String()
		}
		if _, ok := c.RemoteAddr().(*net.TCPAddr); !ok || c.RemoteAddr().String() != test.client {
			t.Errorf("%q: the client is %v, want %s", test.data, c.RemoteAddr(), test.client)
		}
		if got, want := c.LocalAddr().String(), client.RemoteAddr().String(); got != want {
			t.Errorf("%q: the local address is %s, want %s", test.data, got, want)
		}
		if got, err := io.ReadAll(c); string(got) != test.first+", world" || err != nil {
			t.Errorf("%q: read %q, error %v; want %q", test.data, got, err, test.first+", world")
		}
	}
}

// Goal: an empty message with a connection is a connection, and the longest is read to the last
// byte.
func TestSizes(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	for _, size := range []int{0, 1, 2048, 64 << 10, 64<<10 + proxyproto.MaxParse} {
		first := strings.Repeat("0123456789abcdef", size/16+1)[:size]
		client := handOver(t, dir, first)
		io.WriteString(client, " and more")
		client.CloseWrite()
		if got, err := io.ReadAll(accept(t, l)); string(got) != first+" and more" || err != nil {
			t.Errorf("%d bytes: read %d bytes, error %v; want %d", size, len(got), err, size+len(" and more"))
		}
	}
}

// Goal: a listener for a socket that somebody else has made takes what comes there, and after Stop
// and Close leaves the socket as it is, and the connections that wait to the next listener.
func TestFileListener(t *testing.T) {
	dir := hostDir(t)
	path := filepath.Join(dir, "tls-socket")
	made, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	defer made.Close()
	socket, err := made.File()
	must(t, err)
	defer socket.Close()
	take := func() *backend.Listener {
		t.Helper()
		must(t, unix.SetNonblock(int(socket.Fd()), false)) // as systemd does before it starts a program
		l, err := backend.FileListener(socket)
		must(t, err)
		t.Cleanup(func() { l.Close() })
		return l
	}
	first := take()
	if got := first.Addr().String(); got != path {
		t.Errorf("the address is %s, want %s", got, path)
	}
	handOver(t, dir, "one")
	handOver(t, dir, "two")
	expect := func(l net.Listener, want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(accept(t, l), got); string(got) != want || err != nil {
			t.Errorf("read %q, error %v, want %q", got, err, want)
		}
	}
	expect(first, "one")
	must(t, first.Stop())
	if _, err := first.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Stop: %v", err)
	}
	must(t, first.Close())
	handOver(t, dir, "three")
	next := take()
	expect(next, "two")
	expect(next, "three")
	waits := make(chan error)
	go func() {
		_, err := next.Accept()
		waits <- err
	}()
	must(t, next.Close())
	if err := <-waits; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}

	tcp := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	other, err := tcp.File()
	must(t, err)
	defer other.Close()
	if _, err := backend.FileListener(other); err == nil || !strings.Contains(err.Error(), "not a Unix datagram socket") {
		t.Errorf("for a TCP socket the error is %v", err)
	}
}

// Goal: what is not exactly one connected TCP socket is closed, and Accept waits for the next.
func TestIgnored(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)

	file := func() int {
		fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		must(t, err)
		return fd
	}
	socket := func(family, kind int) int { return newSocket(t, family, kind) }
	pipe := func() int {
		var fds [2]int
		must(t, unix.Pipe(fds[:]))
		unix.Close(fds[1])
		return fds[0]
	}
	many := func() (fds []int) {
		for range 253 {
			fds = append(fds, file())
		}
		return fds
	}
	var clients []*net.TCPConn
	connection := func() int {
		client, fd := pair(t)
		clients = append(clients, client)
		return fd
	}
	listener := func() int {
		l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
		defer l.Close()
		return dup(t, l)
	}
	connectedUDP := func() int {
		fd := socket(unix.AF_INET, unix.SOCK_DGRAM)
		must(t, unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}}))
		return fd
	}
	unixPair := func() int {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		must(t, err)
		unix.Close(fds[1])
		return fds[0]
	}
	resetConnection := func() int {
		client, fd := pair(t)
		client.SetLinger(0)
		client.Close()
		hostdirtest.Await(t, "the reset", func() bool {
			_, err := unix.Getpeername(fd)
			return err != nil
		})
		return fd
	}
	for _, test := range []struct {
		what string
		data string
		fds  func() []int
	}{
		{"nothing", "", func() []int { return nil }},
		{"data alone", "hello", func() []int { return nil }},
		{"a file", "hello", func() []int { return []int{file()} }},
		{"a pipe", "hello", func() []int { return []int{pipe()} }},
		{"two connections", "hello", func() []int { return []int{connection(), connection()} }},
		{"a connection and a file", "hello", func() []int { return []int{connection(), file()} }},
		{"as many descriptors as can be", "hello", many},
		{"a socket that listens", "hello", func() []int { return []int{listener()} }},
		{"a socket that is not connected", "hello", func() []int { return []int{socket(unix.AF_INET, unix.SOCK_STREAM)} }},
		{"one of IPv6", "hello", func() []int { return []int{socket(unix.AF_INET6, unix.SOCK_STREAM)} }},
		{"a UDP socket", "hello", func() []int { return []int{connectedUDP()} }},
		{"a Unix socket", "hello", func() []int { return []int{unixPair()} }},
		{"a connection that was reset", "hello", func() []int { return []int{resetConnection()} }},
		{"too much data", strings.Repeat("a", backend.DataMost+1), func() []int { return []int{connection()} }},
	} {
		before := descriptors(t)
		fds := test.fds()
		send(t, dir, test.data, fds...)
		client := handOver(t, dir, "good")
		c := accept(t, l)
		if c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("%s: was accepted", test.what)
		}
		c.Close()
		for _, client := range append(clients, client) {
			client.Close()
		}
		awaitDescriptors(t, test.what, before+2) // the senders
	}
}

// Goal: no error of recvmsg(2) ends Accept.
func TestErrorsOfRecvmsg(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	client := handOver(t, dir, "hello")
	failures := []error{unix.EINTR, unix.ENOBUFS, unix.ENOMEM, unix.ECONNRESET, unix.EMFILE, unix.ENFILE, unix.EIO}
	backend.Recvmsg(t, func(fd int, data, control []byte, flags int) (int, int, int, unix.Sockaddr, error) {
		if len(failures) > 0 {
			err := failures[0]
			failures = failures[1:]
			return -1, 0, 0, nil, err
		}
		return unix.Recvmsg(fd, data, control, flags)
	})
	if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() || len(failures) > 0 {
		t.Errorf("accepted %v, want %v; %d errors are left", c.RemoteAddr(), client.LocalAddr(), len(failures))
	}
}

// Goal: a descriptor that a security module forbids to receive is ignored.
func TestForbidden(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	backend.Recvmsg(t, func(fd int, data, control []byte, flags int) (int, int, int, unix.Sockaddr, error) {
		n, controls, received, from, err := unix.Recvmsg(fd, data, control, flags)
		if err == nil && string(data[:n]) == "forbidden" {
			messages, err := unix.ParseSocketControlMessage(control[:controls])
			must(t, err)
			fds, err := unix.ParseUnixRights(&messages[0])
			must(t, err)
			unix.Close(fds[0])
			controls, received = 0, received|unix.MSG_CTRUNC
		}
		return n, controls, received, from, err
	})
	handOver(t, dir, "forbidden")
	client := handOver(t, dir, "hello")
	if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() {
		t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
	}
}

// Goal: the programs that a backend starts inherit nothing.
func TestCloseOnExec(t *testing.T) {
	open := func() map[int]bool { // and whether others inherit them
		m := make(map[int]bool)
		for fd := range 4096 {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				m[fd] = flags&unix.FD_CLOEXEC == 0
			}
		}
		return m
	}
	before := open()
	dir := hostDir(t)
	l := listen(t, dir)
	handOver(t, dir, "hello")
	accept(t, l)
	for fd, inherited := range open() {
		if _, old := before[fd]; inherited && !old {
			t.Errorf("descriptor %d is inherited", fd)
		}
	}
}

// Goal: a connection of Multipath TCP, or one that began with an attempt at it, is a connection.
func TestMultipath(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	var lc net.ListenConfig
	lc.SetMultipathTCP(true)
	tcp, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer tcp.Close()
	for _, both := range []bool{true, false} {
		var d net.Dialer
		d.SetMultipathTCP(both)
		client, err := d.Dial("tcp", tcp.Addr().String())
		must(t, err)
		defer client.Close()
		server, err := tcp.Accept()
		must(t, err)
		send(t, dir, "hello", dup(t, server.(*net.TCPConn)))
		server.Close()
		c := accept(t, l)
		if c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
		}
		multipath, err := c.MultipathTCP()
		t.Logf("Multipath TCP is in use: %v, %v", multipath, err)
	}
}

// descriptors returns how many descriptors are open.
func descriptors(t testing.TB) int {
	t.Helper()
	open := 0
	for fd := range 4096 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			open++
		}
	}
	return open
}

// awaitDescriptors waits until no more descriptors are open.
func awaitDescriptors(t testing.TB, what string, most int) {
	t.Helper()
	var open int
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		open = descriptors(t)
		return open <= most
	}) {
		t.Fatalf("%s: %d descriptors are open, want %d", what, open, most)
	}
}

// Goal: thousands of connections leave no descriptor behind.
func TestLeak(t *testing.T) {
	const rounds, size = 500, 4
	dir := hostDir(t)
	l := listen(t, dir)
	s := newSender(t, dir)
	tcp := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	before := descriptors(t)
	for range rounds {
		var clients [size]net.Conn
		for i := range clients {
			client, err := net.Dial("tcp", tcp.Addr().String())
			must(t, err)
			clients[i] = client
			server, err := tcp.AcceptTCP()
			must(t, err)
			fd := dup(t, server)
			server.Close()
			must(t, s.send([]byte("hello"), fd))
			must(t, s.send([]byte("hello"), fd, fd))
			unix.Close(fd)
			c, err := l.Accept()
			must(t, err)
			c.Close()
			client.Close()
		}
	}
	awaitDescriptors(t, "after all", before)
}

// Goal: the socket can be used by everybody, whatever the umask is.
func TestUmask(t *testing.T) {
	for _, mask := range []int{0o777, 0o022, 0} {
		dir := hostDir(t)
		old := syscall.Umask(mask)
		l, err := backend.Listen(dir)
		syscall.Umask(old)
		must(t, err)
		info, err := os.Lstat(filepath.Join(dir, "tls-socket"))
		must(t, err)
		if want := os.ModeSocket | 0o666; info.Mode() != want {
			t.Errorf("with the umask %#o the mode is %v, want %v", mask, info.Mode(), want)
		}
		client := handOver(t, dir, "hello")
		if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
		}
		must(t, l.Close())
	}
}

// only fails the test unless the directory has just these files.
func only(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("in the directory are %q, want %q", got, want)
	}
}

// Goal: whatever is in the place of the socket is replaced, unless it is a directory.
func TestStale(t *testing.T) {
	for what, make := range map[string]func(path string) error{
		"a socket of the same kind": func(path string) error {
			fd := hostdirtest.Bind(t, filepath.Dir(path), unix.SOCK_DGRAM)
			return unix.Shutdown(fd, unix.SHUT_RDWR)
		},
		"a stream socket": func(path string) error {
			hostdirtest.Abandon(t, filepath.Dir(path))
			return nil
		},
		"a file":                      func(path string) error { return os.WriteFile(path, nil, 0o400) },
		"a symlink":                   func(path string) error { return os.Symlink("/dev/null", path) },
		"a symlink that leads astray": func(path string) error { return os.Symlink("/nowhere", path) },
	} {
		dir := hostDir(t)
		must(t, make(filepath.Join(dir, "tls-socket")))
		l := listen(t, dir)
		client := handOver(t, dir, "hello")
		if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("%s: accepted %v, want %v", what, c.RemoteAddr(), client.LocalAddr())
		}
		only(t, dir, "tls-socket")
		must(t, l.Close())
		only(t, dir)
	}
	if info, err := os.Stat("/dev/null"); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("/dev/null is %v, %v", info, err)
	}
	dir := hostDir(t)
	must(t, os.Mkdir(filepath.Join(dir, "tls-socket"), 0o755))
	if _, err := backend.Listen(dir); !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory: error %v, want EISDIR", err)
	}
	only(t, dir, "tls-socket")
}

// Goal: errors name the socket and what is wrong.
func TestErrors(t *testing.T) {
	dir := hostdirtest.Dir(t)
	hostdirtest.Touch(t, filepath.Join(dir, "file"))
	for name, want := range map[string]error{"none": unix.ENOENT, "file": unix.ENOTDIR} {
		path := filepath.Join(dir, name)
		before := descriptors(t)
		_, err := backend.Listen(path)
		if !errors.Is(err, want) || !strings.HasPrefix(fmt.Sprint(err), "listen unixgram "+path+"/tls-socket: ") {
			t.Errorf("%s: error %v, want %v", name, err, want)
		}
		if after := descriptors(t); after != before {
			t.Errorf("%s: %d descriptors are open, want %d", name, after, before)
		}
	}
}

// Goal: neither the length of the directory's name nor a strange one is an obstacle, wherever the
// program runs.
func TestNames(t *testing.T) {
	check := func(t *testing.T, dir string) {
		t.Helper()
		short := filepath.Join(hostdirtest.Dir(t), "d") // for the sender, which is not what is tested
		abs, err := filepath.Abs(dir)
		must(t, err)
		must(t, os.Symlink(abs, short))
		l := listen(t, dir)
		if got, want := l.Addr().String(), filepath.Join(dir, "tls-socket"); got != want {
			t.Errorf("the address is %q, want %q", got, want)
		}
		client := handOver(t, short, "hello")
		if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
		}
		only(t, dir, "tls-socket")
		must(t, l.Close())
		only(t, dir)
	}
	long := func(t *testing.T) string {
		dir := filepath.Join(hostdirtest.Dir(t), strings.Repeat("a", 200))
		must(t, os.Mkdir(dir, 0o755))
		return dir
	}
	t.Run("200 bytes", func(t *testing.T) { check(t, long(t)) })
	for i, way := range backend.Ways {
		if i == 0 {
			continue
		}
		t.Run("200 bytes "+way, func(t *testing.T) {
			backend.OnlyWays(t, 0, i)
			check(t, long(t))
		})
	}
	t.Run("200 bytes in no way", func(t *testing.T) {
		backend.OnlyWays(t, 0)
		dir := long(t)
		if _, err := backend.Listen(dir); err == nil || !strings.Contains(err.Error(), "too long") {
			t.Errorf("error %v, want that the path is too long", err)
		}
		only(t, dir)
	})
	t.Run("every length", func(t *testing.T) {
		parent := hostdirtest.Dir(t)
		for n := 60; n < 110; n++ {
			dir := filepath.Join(parent, strings.Repeat("a", n-len(parent)-1))
			must(t, os.Mkdir(dir, 0o755))
			must(t, listen(t, dir).Close())
		}
	})
	t.Run("relative", func(t *testing.T) {
		t.Chdir(hostdirtest.Dir(t))
		for _, dir := range []string{"a", "@a", "a b"} {
			must(t, os.Mkdir(dir, 0o755))
			check(t, dir)
		}
		t.Chdir("a")
		check(t, ".")
		check(t, "../@a")
	})
	t.Run("symlink", func(t *testing.T) {
		dir := hostDir(t)
		link := filepath.Join(filepath.Dir(dir), "link")
		must(t, os.Symlink("one.example", link))
		check(t, link)
	})
}

// Goal: Close is about the directory that Listen was told of, whatever happens to its name and to
// the working directory.
func TestMoved(t *testing.T) {
	parent := hostdirtest.Dir(t)
	t.Chdir(parent)
	must(t, os.Mkdir("a", 0o755))
	l := listen(t, "a")
	must(t, os.Rename("a", "b"))
	must(t, os.Mkdir("a", 0o755))
	other := listen(t, "a")
	t.Chdir("/")
	must(t, l.Close())
	only(t, filepath.Join(parent, "b"))
	only(t, filepath.Join(parent, "a"), "tls-socket")
	must(t, other.Close())
	only(t, filepath.Join(parent, "a"))
}

// Goal: Stop removes the socket at once; Accept returns what had come before, and then fails, also
// where it has waited; Close leaves the socket of another backend alone.
func TestStop(t *testing.T) {
	dir := hostDir(t)
	for _, waiting := range []int{0, 1, 5} {
		l := listen(t, dir)
		var ended sync.WaitGroup
		if waiting == 0 {
			for range 3 {
				ended.Go(func() {
					if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
						t.Errorf("Accept: %v, want net.ErrClosed", err)
					}
				})
			}
		}
		var clients []*net.TCPConn
		for range waiting {
			clients = append(clients, handOver(t, dir, "hello"))
		}
		must(t, l.Stop())
		only(t, dir)
		for _, client := range clients {
			c := accept(t, l)
			client.CloseWrite()
			if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
				t.Errorf("the connection reads %q, error %v", got, err)
			}
			c.Close()
			client.Close()
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept afterwards: %v, want net.ErrClosed", err)
		}
		ended.Wait()
		if err := l.Stop(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("stopped twice: %v", err)
		}
		next := listen(t, dir)
		must(t, l.Close())
		only(t, dir, "tls-socket")
		must(t, next.Close())
	}
}

// Goal: Close ends each Accept, removes the socket, and closes what nobody has accepted; what was
// accepted goes on.
func TestClose(t *testing.T) {
	dir := hostDir(t)
	before := descriptors(t)
	l := listen(t, dir)
	client := handOver(t, dir, "hello")
	c := accept(t, l)

	var ended sync.WaitGroup
	for range 3 {
		ended.Go(func() {
			if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept: %v, want net.ErrClosed", err)
			}
		})
	}
	must(t, l.Close())
	ended.Wait()
	only(t, dir)
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if err := l.Stop(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("stopped afterwards: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept afterwards: %v", err)
	}
	io.WriteString(client, ", world")
	client.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "hello, world" || err != nil {
		t.Errorf("the connection reads %q, error %v", got, err)
	}
	c.Close()
	client.Close()

	l = listen(t, dir)
	client = handOver(t, dir, "hello")
	must(t, l.Close())
	if n, err := client.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection that nobody has accepted: %d bytes, error %v", n, err)
	}
	client.Close()
	awaitDescriptors(t, "after all", before+2) // the senders
}

// Goal: Close leaves a socket that is not its own where it is, and the directory may be gone.
func TestCloseOther(t *testing.T) {
	dir := hostDir(t)
	first := listen(t, dir)
	second := listen(t, dir)
	must(t, first.Close())
	only(t, dir, "tls-socket")
	client := handOver(t, dir, "hello")
	if c := accept(t, second); c.RemoteAddr().String() != client.LocalAddr().String() {
		t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
	}
	must(t, os.Remove(filepath.Join(dir, "tls-socket")))
	hostdirtest.Touch(t, filepath.Join(dir, "tls-socket"))
	must(t, second.Close())
	only(t, dir, "tls-socket")

	dir = hostDir(t)
	l := listen(t, dir)
	must(t, os.RemoveAll(dir))
	must(t, l.Close())
}

// Goal: a socket that comes just when Close has found its own one there is left.
func TestCloseRace(t *testing.T) {
	for _, newest := range []bool{false, true} {
		dir := hostDir(t)
		first := listen(t, dir)
		var second net.Listener
		backend.BeforeRename(t, func() {
			backend.BeforeRename(t, func() {})
			second = listen(t, dir)
			if newest { // and goes again
				must(t, second.Close())
			}
		})
		must(t, first.Close())
		if newest {
			only(t, dir)
			continue
		}
		only(t, dir, "tls-socket")
		client := handOver(t, dir, "hello")
		if c := accept(t, second); c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
		}
		must(t, second.Close())
		only(t, dir)
	}
}

// Goal: a backend that is replaced again and again while clients come loses none.
func TestReplace(t *testing.T) {
	const rounds = 100
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	must(t, err)
	var servers sync.WaitGroup
	serve := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			servers.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(hostdirtest.Patience))
				io.WriteString(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}), c.RemoteAddr().String())
			})
		}
	}
	dir := hostDir(t)
	proxy := startProxy(t, dir, "")
	visit := func() error {
		c, err := tls.Dial("tcp", proxy, clientConfig())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
		want := c.LocalAddr().String()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			return fmt.Errorf("read %q, error %v, want %q", got, err, want)
		}
		return nil
	}

	l := listen(t, dir)
	servers.Go(func() { serve(l) })
	var ended atomic.Bool
	var served atomic.Int64
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for !ended.Load() {
				if err := visit(); err != nil {
					t.Errorf("after %d clients: %v", served.Load(), err)
					ended.Store(true)
				}
				served.Add(1)
			}
		})
	}
	for range rounds {
		before := served.Load()
		hostdirtest.Await(t, "clients", func() bool { return served.Load() >= before+4 || ended.Load() })
		next := listen(t, dir)
		servers.Go(func() { serve(next) })
		must(t, l.Close())
		l = next
	}
	ended.Store(true)
	clients.Wait()
	must(t, l.Close())
	servers.Wait()
	t.Logf("%d clients served", served.Load())
}

// Goal: connections that nobody has accepted go to the backend that has taken over, and to none
// other than the one in the directory.
func TestHandOn(t *testing.T) {
	for _, i := range []int{0, 1, 2, 3} {
		t.Run(backend.Ways[i], func(t *testing.T) {
			backend.OnlyWays(t, i)
			dir := hostDir(t)
			first := listen(t, dir)
			var clients []*net.TCPConn
			for range 3 {
				clients = append(clients, handOver(t, dir, "PROXY UNKNOWN\r\nhello"))
				send(t, dir, "nothing")
			}
			second := listen(t, dir)
			must(t, first.Close())
			for _, client := range clients {
				client.CloseWrite()
				c := accept(t, second)
				if c.RemoteAddr().String() != client.LocalAddr().String() {
					t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
				}
				if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
					t.Errorf("read %q, error %v", got, err)
				}
			}
		})
	}
}

// Goal: a queue that is full, or a process without descriptors, delays connections that are handed
// on.
func TestHandOnLater(t *testing.T) {
	dir := hostDir(t)
	first := listen(t, dir)
	want := make(map[string]bool)
	hand := func() error {
		client, fd := pair(t)
		defer unix.Close(fd)
		err := newSender(t, dir).try([]byte("hello"), fd)
		if err == nil {
			want[client.LocalAddr().String()] = true
		}
		return err
	}
	for range 3 {
		must(t, hand())
	}
	second := listen(t, dir)
	for {
		if err := hand(); err == unix.EAGAIN {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	var calls atomic.Int64
	full := make(chan struct{})
	backend.Recvmsg(t, func(fd int, data, control []byte, flags int) (int, int, int, unix.Sockaddr, error) {
		switch calls.Add(1) {
		case 1:
			return -1, 0, 0, nil, unix.ENOBUFS
		case 2:
			close(full) // there is no room for the message that comes now
		}
		return unix.Recvmsg(fd, data, control, flags)
	})
	var closed sync.WaitGroup
	closed.Go(func() {
		if err := first.Close(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-full:
	case <-time.After(hostdirtest.Patience):
		t.Fatal("nothing is handed on")
	}
	for len(want) > 0 {
		c := accept(t, second)
		delete(want, c.RemoteAddr().String())
	}
	closed.Wait()
}
