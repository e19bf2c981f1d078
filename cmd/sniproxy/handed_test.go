package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
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

// greetHanded answers like greet.
func greetHanded(c *net.TCPConn, first []byte) {
	name, _, err := hostdirtest.ReadHello(bytes.NewReader(first))
	if err != nil {
		fmt.Fprintf(c, "error: %v", err)
		return
	}
	io.WriteString(c, "this is "+name)
}

// Goal: a backend whose tls-socket is a datagram socket gets the connection itself, as accept(2) would
// have returned it, and all bytes read so far, behind the header that a marker asks for. Then the
// daemon has nothing of it any more.
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
					expectPlain(t, c)
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

// expectPlain fails the test unless a socket is as accept(2) returns it.
func expectPlain(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
			if v, err := unix.GetsockoptTimeval(int(fd), unix.SOL_SOCKET, name); err != nil || *v != (unix.Timeval{}) {
				t.Errorf("socket option %d is %v, error %v", name, v, err)
			}
		}
	})
}

// Goal: the host of a datagram socket that nobody reads costs its clients ten seconds and alert 80, and
// other hosts nothing; when it is read again those who wait are handed over. It is not parallel to other
// tests: all of its clients must come, and be handed over, within the ten seconds of the first.
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
	full := d.bindDatagram("full.example")
	begin := time.Now()
	crowd := d.crowd(300, snitest.Hello("full.example"))
	last := crowd[len(crowd)-1]
	if got, err := io.ReadAll(last); err != nil || alert(got) != int(sni.InternalError) {
		t.Errorf("behind a full queue a client got %x, error %v", got, err)
	}
	if took := time.Since(begin); took < limits.Hello-time.Second {
		t.Errorf("it was refused after %v", took)
	}
	full.Close()
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

// Goal: thousands of connections are handed over, and nothing stays behind.
func TestHandedMany(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 2000
	}
	d := start(t)
	d.serveHanded("a.example", greetHanded)
	base := d.allFds()
	inParallel(n, 8, func(int) {
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
	})
	hostdirtest.Await(t, "all descriptors to be closed", func() bool { return d.allFds() <= base+4 })
	if c := d.counters(); c.handed != n || c.open != 0 || c.up < 16*n {
		t.Errorf("the counters are %+v after %d", c, n)
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

// Goal: the stop neither waits for connections that were handed over nor ends them; clients that wait
// for a place in a queue are still handed over.
func TestHandedStop(t *testing.T) {
	d := start(t)
	l := d.bindDatagram("a.example")
	client := d.dial()
	client.Write(snitest.Hello("a.example"))
	c, _ := receive(t, l)
	waiting := d.crowd(40, snitest.Hello("a.example"))
	hostdirtest.Await(t, "clients to wait", func() bool { return d.counters().waiting > 0 })
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

// Goal: a client that is gone when there is a place for it is not handed over, and neither is one that
// was refused.
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

// Goal: a connection that is handed over is logged at that moment, if it is to be.
func TestHandedLogged(t *testing.T) {
	d := start(t)
	l := d.bindDatagram("a.example")
	hostdirtest.Touch(t, d.hostPath("a.example", "log-connections"))
	client := d.dial()
	h := snitest.Hello("a.example")
	client.Write(h)
	receive(t, l)
	line := d.err.Await(t, "served "+client.LocalAddr().String()+" for a.example: ")
	if !strings.Contains(line, fmt.Sprintf("bytes up %d, bytes down 0, ", len(h))) || !strings.HasSuffix(line, " s, handed over") {
		t.Errorf("the line is %q", line)
	}
}
