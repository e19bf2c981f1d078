package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// bindDatagram makes the tls-socket of a host a datagram socket, in place of what there is.
func (d *daemon) bindDatagram(name string) *net.UnixConn {
	d.t.Helper()
	os.Remove(d.hostPath(name, "tls-socket"))
	return hostdirtest.ListenDatagram(d.t, d.hostDir(name))
}

// receive takes a connection that was handed over, and the bytes that came with it.
func receive(t testing.TB, l *net.UnixConn) (c *net.TCPConn, first []byte) {
	t.Helper()
	l.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
	c, first, err := hostdirtest.Receive(l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, first
}

// serveHanded makes a host whose connections are handed over to handle.
func (d *daemon) serveHanded(name string, handle func(c *net.TCPConn, first []byte)) {
	d.t.Helper()
	hostdirtest.ServeDatagram(d.t, d.hostDir(name), handle)
}

// greetHanded answers like greet, also behind a header of version 1.
func greetHanded(c *net.TCPConn, first []byte) {
	if bytes.HasPrefix(first, []byte("PROXY ")) {
		_, first, _ = bytes.Cut(first, []byte("\r\n"))
	}
	name, _, err := hostdirtest.ReadHello(bytes.NewReader(first))
	if err != nil {
		fmt.Fprintf(c, "error: %v", err)
		return
	}
	io.WriteString(c, "this is "+name)
}

// Goal: a backend whose tls-socket is a datagram socket gets the connection itself, as accept(2)
// would have returned it, and all bytes read so far, behind the header that a marker asks for. Then
// the daemon has nothing of it any more.
func TestHanded(t *testing.T) {
	for _, marker := range []string{"", "send-proxy-v1", "send-proxy-v2"} {
		for name, say := range map[string]func(c net.Conn, b []byte){
			"whole":        func(c net.Conn, b []byte) { c.Write(b) },
			"byte by byte": func(c net.Conn, b []byte) { sendSlowly(t, c.(*net.TCPConn), b) },
		} {
			t.Run(marker+" "+name, func(t *testing.T) {
				d := start(t)
				l := d.bindDatagram("a.example")
				if marker != "" {
					hostdirtest.Touch(t, d.hostPath("a.example", marker))
				}
				base := d.fds()
				for range 3 {
					client := d.dial()
					h := snitest.Hello("A.example")
					say(client, h)
					c, first := receive(t, l)
					begin := max(0, bytes.Index(first, h[:5]))
					header, rest := first[:begin], make([]byte, max(0, begin+len(h)-len(first)))
					if _, err := io.ReadFull(c, rest); err != nil {
						t.Fatal(err)
					}
					if got := append(first[begin:], rest...); !bytes.Equal(got, h) || (begin > 0) != (marker != "") {
						t.Fatalf("behind a header of %d bytes the backend got %d bytes other than the client has sent", begin, len(got))
					}
					if marker == "send-proxy-v1" && !strings.HasPrefix(string(header), "PROXY TCP4 127.0.0.1 127.0.0.1 ") {
						t.Errorf("the header is %q", header)
					}
					if got := c.RemoteAddr().String(); got != client.LocalAddr().String() {
						t.Errorf("the backend sees %v, the client has %v", got, client.LocalAddr())
					}
					d.awaitFds(base + 1) // the socket that sends stays for a while
					ping(t, client, c)
					ping(t, c, client)
					c.CloseWrite()
					if got, err := io.ReadAll(client); err != nil || len(got) > 0 {
						t.Errorf("the client got %q, error %v, want the end", got, err)
					}
				}
				hostdirtest.Await(t, "the socket that sends to be closed", func() bool { return d.fds() == base })
				d.signal(unix.SIGUSR1)
				d.err.Await(t, "handed 3")
			})
		}
	}
}

// Goal: the host of a datagram socket that nobody reads costs its clients ten seconds and alert 80,
// and other hosts nothing; when it is read again those who wait are handed over. It is not parallel
// to other tests: all of its clients must come, and be handed over, within the ten seconds of the
// first.
func TestHandedFull(t *testing.T) {
	d := start(t)
	d.serve("other.example", hostdirtest.Greet)
	l := d.bindDatagram("deaf.example")
	const clients = 400 // more than a tenant may have under way
	h := snitest.Hello("deaf.example")
	waiting := d.crowd(clients, h)
	hostdirtest.Await(t, "clients to wait", func() bool { return d.counters().waiting > 0 })
	for range 20 {
		if err := d.greeted("other.example"); err != nil {
			t.Error(err)
		}
	}
	handed := make(chan int, 1)
	go func() {
		n := 0
		for l.SetReadDeadline(time.Now().Add(hostdirtest.Patience)); n < clients; n++ {
			c, first, err := hostdirtest.Receive(l)
			if err != nil {
				t.Errorf("after %d connections: %v", n, err)
				break
			}
			greetHanded(c, first)
			c.Close()
		}
		handed <- n
	}()
	for _, c := range waiting {
		if got, err := io.ReadAll(c); err != nil || string(got) != "this is deaf.example" {
			t.Fatalf("got %q, error %v", got, err)
		}
	}
	if n := <-handed; n != clients {
		t.Errorf("%d of %d were handed over", n, clients)
	}
}

// Goal: each kind of failure has its alert.
func TestHandedAlerts(t *testing.T) {
	t.Parallel()
	d := start(t, ordinaryUser(t))
	l := d.bindDatagram("gone.example")
	d.expectHanded(l, "gone.example")
	l.Close()
	d.expectAlert(snitest.Hello("gone.example"), sni.UnrecognizedName)
	d.bindDatagram("forbidden.example")
	hostdirtest.Must(t, os.Chmod(d.hostPath("forbidden.example", "tls-socket"), 0))
	d.expectAlert(snitest.Hello("forbidden.example"), sni.UnrecognizedName)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	path := d.hostPath("packets.example", "tls-socket")
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	unix.Listen(fd, 10)
	os.Chmod(path, 0o777)
	d.expectAlert(snitest.Hello("packets.example"), sni.UnrecognizedName)
}

// Goal: who finds a full queue for ten seconds is refused, and not handed over when it is read
// later.
func TestHandedFullForLong(t *testing.T) {
	t.Parallel()
	const clients = 300 // more than a tenant may have under way
	d := start(t, oneLoop)
	d.serveHanded("other.example", greetHanded)
	l := d.bindDatagram("full.example")
	base, begin := d.fds(), time.Now()
	crowd := d.crowd(clients, snitest.Hello("full.example"))
	last := crowd[len(crowd)-1]
	if got, err := io.ReadAll(last); err != nil || alert(got) != int(sni.InternalError) {
		t.Errorf("behind a full queue a client got %x, error %v", got, err)
	}
	if took := time.Since(begin); took < limits.Hello-time.Second {
		t.Errorf("it was refused after %v", took)
	}
	hostdirtest.Await(t, "nobody to wait", func() bool { return d.counters().waiting == 0 })
	handed := d.counters().handed
	served := map[string]bool{}
	for range handed {
		c, first := receive(t, l)
		served[c.RemoteAddr().String()] = true
		greetHanded(c, first)
		c.Close()
	}
	// What a client sends after its refusal is read, as before, by a daemon that does not wait for
	// more.
	for _, c := range crowd {
		if !served[c.LocalAddr().String()] {
			c.Write([]byte("what?"))
		}
	}
	if err := d.greeted("other.example"); err != nil {
		t.Error(err)
	}
	if l.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); handed == 0 || handed == clients {
		t.Errorf("%d of %d were handed over", handed, clients)
	} else if _, _, err := hostdirtest.Receive(l); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("behind %d connections that were handed over: error %v", handed, err)
	}
	greeted := 0
	for _, c := range crowd[:clients-1] {
		got, err := io.ReadAll(c)
		switch {
		case err == nil && string(got) == "this is full.example":
			greeted++
		case err != nil || alert(got) != int(sni.InternalError):
			t.Errorf("a client got %q, error %v", got, err)
		}
	}
	if greeted != handed {
		t.Errorf("%d clients were served, %d were handed over", greeted, handed)
	}
	d.awaitFds(base) // also of clients who stay
}

// expectHanded has a client handed over.
func (d *daemon) expectHanded(l *net.UnixConn, name string) {
	d.t.Helper()
	client := d.dial()
	client.Write(snitest.Hello(name))
	c, _ := receive(d.t, l)
	ping(d.t, client, c)
	client.Close()
	c.Close()
}

// Goal: a host may change between the two kinds of sockets at any time.
func TestHandedSwitched(t *testing.T) {
	d := start(t)
	for range 5 {
		l := d.bindDatagram("a.example")
		d.expectHanded(l, "a.example")
		d.expectHanded(l, "a.example")
		l.Close()
		os.Remove(d.hostPath("a.example", "tls-socket"))
		stream := d.host("a.example")
		for range 2 {
			client, backend := d.pair(stream, "a.example")
			ping(t, client, backend)
			client.Close()
			backend.Close()
		}
		stream.Close()
	}
}

// Goal: thousands of connections are handed over, and nothing stays behind: no descriptor, no
// memory, and, as the system counts them for a user who is not root, no descriptor under way.
func TestHandedMany(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 2000
	}
	d := start(t, ordinaryUser(t), limitFiles(256))
	d.serveHanded("a.example", greetHanded)
	base, memory := d.fds(), 0
	for _, part := range []int{n / 4, n - n/4} {
		inParallel(part, 8, func(int) {
			if err := d.greeted("a.example"); err != nil {
				t.Error(err)
			}
		})
		if memory == 0 {
			memory = d.rss()
		}
	}
	d.awaitFds(base)
	d.expectGrowth(memory, 8<<20)
	if c, up := d.counters(), n*len(snitest.Hello("a.example")); c.handed != n || c.open != 0 || c.up != up {
		t.Errorf("the counters are %+v after %d, want %d bytes up", c, n, up)
	}
}

// Goal: a single connection on standard input is handed over, and the daemon ends with status 0.
func TestHandedSingle(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.ServeDatagram(t, hostDir(hosts, "a.example"), greetHanded)
	d, client := startSingle(t, hosts)
	client.Write(snitest.Hello("a.example"))
	if got, err := io.ReadAll(client); err != nil || string(got) != "this is a.example" {
		t.Errorf("got %q, error %v", got, err)
	}
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d: %s", status, d.err)
	}
}

// Goal: the stop neither waits for connections that were handed over nor ends them; clients that
// wait for a place in a queue are still handed over.
func TestHandedStop(t *testing.T) {
	d := start(t)
	l := d.bindDatagram("a.example")
	client := d.dial()
	client.Write(snitest.Hello("a.example"))
	c, _ := receive(t, l)
	waiting := d.crowd(40, snitest.Hello("a.example"))
	hostdirtest.Await(t, "all to be accepted, and some to wait", func() bool {
		c := d.counters()
		return c.waiting > 0 && c.accepted == 1+len(waiting)
	})
	d.signal(unix.SIGTERM)
	d.out.Await(t, "shutting down")
	for range waiting {
		c, first := receive(t, l)
		greetHanded(c, first)
		c.Close()
	}
	for _, w := range waiting {
		if got, err := io.ReadAll(w); err != nil || string(got) != "this is a.example" {
			t.Errorf("a client that waited got %q, error %v", got, err)
		}
	}
	d.expectExit(0)
	ping(t, client, c)
	ping(t, c, client)
}

// Goal: a client that is gone when there is a place for it is not handed over, and neither is one
// that was refused.
func TestHandedGone(t *testing.T) {
	d := start(t, oneLoop)
	l := d.bindDatagram("a.example")
	h := snitest.Hello("a.example")
	queued := 0
	for d.counters().waiting == 0 { // until the queue is full
		d.crowd(1, h)
		queued++
		hostdirtest.AwaitFor(100*time.Millisecond, func() bool { return d.counters().handed == queued })
	}
	queued--
	gone := d.crowd(5, h)
	hostdirtest.Await(t, "clients to wait", func() bool { return d.counters().waiting == 6 })
	for _, c := range gone {
		c.SetLinger(0)
		c.Close()
	}
	for range queued + 1 {
		receive(t, l)
	}
	hostdirtest.Await(t, "nobody to wait", func() bool { return d.counters().waiting == 0 })
	if c := d.counters(); c.handed != queued+1 {
		t.Errorf("%d were handed over, want %d", c.handed, queued+1)
	}
}

// Goal: a connection that is handed over is logged at that moment, if it is to be, and counted,
// with the bytes of the client that were given to the backend: not with those of a header.
func TestHandedLogged(t *testing.T) {
	for _, marker := range []string{"", "send-proxy-v1", "send-proxy-v2"} {
		t.Run(marker, func(t *testing.T) {
			d := start(t)
			l := d.bindDatagram("a.example")
			hostdirtest.Touch(t, d.hostPath("a.example", "log-connections"))
			if marker != "" {
				hostdirtest.Touch(t, d.hostPath("a.example", marker))
			}
			client := d.dial()
			h := snitest.Hello("a.example")
			client.Write(h)
			receive(t, l)
			line := d.err.Await(t, "served "+client.LocalAddr().String()+" for a.example: ")
			if !strings.Contains(line, fmt.Sprintf("bytes up %d, bytes down 0, ", len(h))) || !strings.HasSuffix(line, " s, handed over") {
				t.Errorf("the line is %q", line)
			}
			hostdirtest.Await(t, "the end", func() bool { return d.counters().open == 0 })
			if c := d.counters(); c.handed != 1 || c.up != len(h) || c.down != 0 {
				t.Errorf("the counters are %+v, want %d bytes up", c, len(h))
			}
		})
	}
}

// Goal: a backend is given all that the daemon has read, up to 64 KiB, and the longest header, also
// by a daemon with few descriptors.
func TestHandedLarge(t *testing.T) {
	for _, marker := range []string{"", "send-proxy-v1", "send-proxy-v2"} {
		t.Run(marker, func(t *testing.T) {
			testHandedLarge(t, start(t), marker)
		})
	}
	t.Run("few descriptors", func(t *testing.T) { testHandedLarge(t, start(t, limitFiles(64)), "send-proxy-v2") })
}

func testHandedLarge(t *testing.T, d *daemon, marker string) {
	name := "a.example"
	if anyName {
		name = longName()
	}
	h := largestHello(name)
	l := d.bindDatagram(name)
	if marker != "" {
		hostdirtest.Touch(t, d.hostPath(name, marker))
	}
	for range 3 {
		client := d.dial()
		client.Write(append(h, "and more"...))
		c, first := receive(t, l)
		begin := max(0, bytes.Index(first, h[:5]))
		if got := first[begin:]; !bytes.Equal(got, h) || begin > 0 != (marker != "") {
			t.Errorf("%d bytes behind a header of %d, want %d", len(got), begin, len(h))
		}
		if got := make([]byte, len("and more")); readFull(c, got) != "and more" {
			t.Errorf("then the backend reads %q", got)
		}
	}
}

func readFull(r io.Reader, b []byte) string {
	n, _ := io.ReadFull(r, b)
	return string(b[:n])
}

// longName returns a name of the greatest length.
func longName() string { return strings.Repeat("a-long-label.", 20)[:sni.MaxName] }

// largestHello returns a hello whose name ends with the last byte that the daemon reads.
func largestHello(name string) []byte {
	n := sni.MaxHello - 1000
	for len(padded(name, n).Stream()) < sni.MaxHello {
		n++
	}
	return padded(name, n).Stream()
}

// Goal: wildcards, * and symlinks hand over as well, also those who name no host.
func TestHandedNames(t *testing.T) {
	d := start(t)
	answer := func(word string) func(*net.TCPConn, []byte) {
		return func(c *net.TCPConn, _ []byte) { io.WriteString(c, word) }
	}
	for _, name := range []string{"exact.example.com", "*.example.com", "*"} {
		d.serveHanded(name, answer(name))
	}
	elsewhere := filepath.Join(hostdirtest.Dir(t), "host")
	hostdirtest.ServeDatagram(t, elsewhere, answer("elsewhere"))
	hostdirtest.Must(t, os.Symlink(elsewhere, d.hostDir("linked.example.com")))
	hostdirtest.Must(t, os.Symlink(elsewhere, d.hostDir("*.linked.example")))
	for range 3 {
		d.expectAnswers(map[string]string{
			"exact.example.com":  "exact.example.com",
			"a.example.com":      "*.example.com",
			"A.EXAMPLE.com":      "*.example.com",
			"b.a.example.com":    "*",
			"linked.example.com": "elsewhere",
			"a.linked.example":   "elsewhere",
		})
		if got, err := d.exchange(snitest.HelloConfig(&tls.Config{InsecureSkipVerify: true})); string(got) != "*" || err != nil {
			t.Errorf("a client that names no host got %q, error %v", got, err)
		}
	}
	if c := d.counters(); c.handed != 21 {
		t.Errorf("the counters are %+v", c)
	}
}

// Goal: clients who are dropped to make room are not handed over when there is a place for them.
func TestHandedDropped(t *testing.T) {
	testHandedDropped(t, start(t, limitFiles(64), oneLoop))
}

func testHandedDropped(t *testing.T, d *daemon) {
	l := d.bindDatagram("full.example")
	const clients = 150
	crowd := d.crowd(clients, snitest.Hello("full.example"))
	hostdirtest.Await(t, "clients to be dropped", func() bool {
		c := d.counters()
		return c.dropped > 0 && c.handed+c.waiting+c.dropped == clients
	})
	served := make(chan int, 1)
	go func() {
		n := 0
		for ; ; n++ {
			l.SetReadDeadline(time.Now().Add(time.Second))
			c, first, err := hostdirtest.Receive(l)
			if err != nil {
				break
			}
			greetHanded(c, first)
			c.Close()
		}
		served <- n
	}()
	greeted, dropped := 0, 0
	for _, c := range crowd {
		switch got, err := io.ReadAll(c); {
		case string(got) == "this is full.example" && err == nil:
			greeted++
		case len(got) == 0:
			dropped++
		default:
			t.Errorf("a client got %q, error %v", got, err)
		}
	}
	if n, c := <-served, d.counters(); n != greeted || n != c.handed || dropped != c.dropped {
		t.Errorf("%d were received; of the clients %d were served, %d were not; the counters are %+v", n, greeted, dropped, c)
	}
}
