package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

const acceptProxy = ".accept-proxy"

// startFront starts a daemon that stands behind a balancer.
func startFront(t testing.TB, setups ...setup) *daemon {
	t.Helper()
	dir := hostdirtest.Dir(t)
	hostdirtest.Must(t, os.Mkdir(filepath.Join(dir, acceptProxy), 0o755))
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, dir, setups...)
	l.Close()
	return d
}

// frontV2 returns a header of version 2 with anything in it.
func frontV2(command, protocol byte, rest string) string {
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), command, protocol)
	b = binary.BigEndian.AppendUint16(b, uint16(len(rest)))
	return string(b) + rest
}

const (
	front4   = "\xc0\x00\x02\x01\xc6\x33\x64\x02\x01\x02\x01\xbb" // 192.0.2.1:258 and 198.51.100.2:443
	front6   = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"
	mapped4  = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01"
	ports    = "\x01\x02\x01\xbb"
	headerV1 = "PROXY TCP4 192.0.2.1 198.51.100.2 258 443\r\n"
)

// fronts are headers that a balancer may send, and whose connection that is; none stands for the
// connection's own addresses.
var fronts = []struct{ header, client, listener string }{
	{headerV1, "192.0.2.1:258", "198.51.100.2:443"},
	{"PROXY TCP6 2001:db8::1 2001:db8::2 258 443\r\n", "[2001:db8::1]:258", "[2001:db8::2]:443"},
	{"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 258 443\r\n", "192.0.2.1:258", "198.51.100.2:443"},
	{"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", "0.0.0.0:0", "255.255.255.255:65535"},
	{"PROXY UNKNOWN\r\n", "", ""},
	{"PROXY UNKNOWN " + strings.Repeat("f", 107-16) + "\r\n", "", ""},
	{frontV2(0x21, 0x11, front4), "192.0.2.1:258", "198.51.100.2:443"},
	{frontV2(0x21, 0x11, front4+"\x02\x00\x01a\xee\xff\xff"), "192.0.2.1:258", "198.51.100.2:443"},
	{frontV2(0x21, 0x11, front4+strings.Repeat("\x16", 4096-12)), "192.0.2.1:258", "198.51.100.2:443"},
	{frontV2(0x21, 0x21, front6+front6+ports), "[2001:db8::1]:258", "[2001:db8::1]:443"},
	{frontV2(0x21, 0x21, mapped4+mapped4+ports), "192.0.2.1:258", "192.0.2.1:443"},
	{frontV2(0x21, 0x11, strings.Repeat("\x00", 12)), "0.0.0.0:0", "0.0.0.0:0"},
	{frontV2(0x21, 0x21, strings.Repeat("\x00", 36)), "[::]:0", "[::]:0"},
	{frontV2(0x20, 0x00, ""), "", ""},
	{frontV2(0x20, 0x11, front4), "", ""},
	{frontV2(0x20, 0x00, strings.Repeat("?", 4096)), "", ""},
	{frontV2(0x21, 0x00, "anything"), "", ""},
	{frontV2(0x21, 0x31, strings.Repeat("\x00", 216)), "", ""},
}

// frontHosts makes hosts whose backends send back what they read first: v0.example, v1.example and
// v2.example by the header that they want. Their connections are logged.
func (d *daemon) frontHosts() {
	d.t.Helper()
	for _, name := range []string{"v0.example", "v1.example", "v2.example"} {
		d.serve(name, firstRead)
		hostdirtest.Must(d.t, os.WriteFile(d.hostPath(name, "log-connections"), nil, 0o644))
	}
	hostdirtest.Must(d.t, os.WriteFile(d.hostPath("v1.example", "send-proxy-v1"), nil, 0o644))
	hostdirtest.Must(d.t, os.WriteFile(d.hostPath("v2.example", "send-proxy-v2"), nil, 0o644))
}

// headerFor returns the header of a version, 0 for none, that a backend must get.
func headerFor(version int, client, listener netip.AddrPort, name string) []byte {
	switch version {
	case 0:
		return nil
	case 1:
		family := "TCP4"
		if client.Addr().Is6() {
			family = "TCP6"
		}
		return fmt.Appendf(nil, "PROXY %s %v %v %d %d\r\n", family, client.Addr(), listener.Addr(), client.Port(), listener.Port())
	}
	return headerV2(client, listener, name)
}

// Goal: the addresses in the header are the client's from then on: for the backend, which gets them
// with the hello in one write, and in the log. All that is behind the header reaches the backend,
// however it is cut.
func TestFront(t *testing.T) {
	d := startFront(t)
	d.frontHosts()
	for _, front := range fronts {
		for version := range 3 {
			name := fmt.Sprintf("v%d.example", version)
			hello := sayHello(name) // it ends with the name
			for how, say := range map[string]func(c net.Conn, b []byte){
				"whole":            func(c net.Conn, b []byte) { say(t, c, b) },
				"header by itself": func(c net.Conn, b []byte) { say(t, c, b[:len(front.header)]); say(t, c, b[len(front.header):]) },
				"byte by byte":     func(c net.Conn, b []byte) { sendSlowly(t, c, b) },
				"hello byte by byte": func(c net.Conn, b []byte) {
					say(t, c, b[:len(front.header)+1])
					sendSlowly(t, c, b[len(front.header)+1:])
				},
			} {
				if how != "whole" && len(front.header) > 1000 && version > 0 {
					continue // it takes long
				}
				c := d.dial()
				client, listener := localAddr(c), c.RemoteAddr().(*net.TCPAddr).AddrPort()
				if front.client != "" {
					client, listener = netip.MustParseAddrPort(front.client), netip.MustParseAddrPort(front.listener)
				}
				before := strings.Count(d.err.String(), "served "+client.String()+" for "+name+": bytes up")
				say(c, append([]byte(front.header), hello...))
				got, err := io.ReadAll(c)
				if want := append(headerFor(version, client, listener, name), hello...); !bytes.Equal(got, want) || err != nil {
					t.Errorf("%.120q, %s: the backend got %.200q, error %v, want %.200q", front.header, how, got, err, want)
				}
				c.Close()
				line := fmt.Sprintf("served %v for %s: bytes up %d,", client, name, len(hello))
				hostdirtest.Await(t, line, func() bool { return strings.Count(d.err.String(), line) > before })
			}
		}
	}
}

// Goal: it does not matter where the header and the hello are cut, and what comes behind the hello.
func TestFrontCut(t *testing.T) {
	d := startFront(t)
	d.frontHosts()
	d.serve("echo.example", hostdirtest.Echo)
	for _, front := range fronts[:10] {
		if len(front.header) > 1000 {
			continue
		}
		hello := sayHello("v0.example")
		all := append([]byte(front.header), hello...)
		for cut := range all {
			c := d.dial()
			say(t, c, all[:cut])
			say(t, c, all[cut:])
			if got, err := io.ReadAll(c); !bytes.Equal(got, hello) || err != nil {
				t.Errorf("%.120q, cut after %d bytes: got %.100q, error %v", front.header, cut, got, err)
			}
			c.Close()
		}
		more := randomBytes(200_000)
		c := d.dial()
		go func() {
			c.Write(append(append([]byte(front.header), snitest.Hello("echo.example")...), more...))
			c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); !bytes.Equal(got, more) || err != nil {
			t.Errorf("%.120q: %d bytes came back, error %v, want %d", front.header, len(got), err, len(more))
		}
	}
}

// Goal: a backend that is handed the connection is told the client's address as one with a stream
// socket is, with a marker, and still sees the balancer's itself.
func TestFrontHanded(t *testing.T) {
	d := startFront(t)
	for version := range 3 {
		name := fmt.Sprintf("v%d.example", version)
		l := d.bindDatagram(name)
		hostdirtest.Touch(t, d.hostPath(name, "log-connections"))
		if version > 0 {
			hostdirtest.Touch(t, d.hostPath(name, fmt.Sprintf("send-proxy-v%d", version)))
		}
		for _, front := range fronts {
			for _, piece := range []int{1 << 20, 300} {
				client := d.dial()
				hello := sayHello(name) // it ends with the name
				b := append([]byte(front.header), hello...)
				for i := 0; i < len(b); i += piece {
					say(t, client, b[i:min(i+piece, len(b))])
				}
				peer, listener := localAddr(client), client.RemoteAddr().(*net.TCPAddr).AddrPort()
				if front.client != "" {
					peer, listener = netip.MustParseAddrPort(front.client), netip.MustParseAddrPort(front.listener)
				}
				c, first := receive(t, l)
				if want := append(headerFor(version, peer, listener, name), hello...); !bytes.Equal(first, want) {
					t.Errorf("%.120q: the backend got %.200q, want %.200q", front.header, first, want)
				}
				if got := c.RemoteAddr().String(); got != client.LocalAddr().String() {
					t.Errorf("the backend sees %v, the balancer has %v", got, client.LocalAddr())
				}
				c.Close()
				d.err.Await(t, fmt.Sprintf("served %v for %s: bytes up %d,", peer, name, len(hello)))
			}
		}
	}
}

// notFronts are beginnings of connections without a proper header, and what the log says about
// them. There are no random bytes in them: a daemon is this binary too, and may have no descriptors
// for those when it starts.
var notFronts = []struct{ begin, want string }{
	{string(sayHello("v0.example")), "no PROXY protocol header"},
	{"GET / HTTP/1.1\r\nHost: v0.example\r\n\r\n", "no PROXY protocol header"},
	{"PROXY\r\n", "no PROXY protocol header"},
	{"P\r\n", "no PROXY protocol header"},
	{"\r\n\r\n\x00\r\nQUIT\r", "no PROXY protocol header"},
	{"PROXY TCP4 192.0.2.1 198.51.100.2 258 443\n", "malformed PROXY protocol header"},
	{"PROXY TCP4 ::1 ::1 258 443\r\n", "malformed PROXY protocol header"},
	{"PROXY TCP6 fe80::1%lo ::1 258 443\r\n", "malformed PROXY protocol header"},
	{"PROXY UNKNOWN " + strings.Repeat("f", 107), "PROXY protocol header that is too long"},
	{frontV2(0x31, 0x11, front4), "malformed PROXY protocol header"},
	{frontV2(0x21, 0x13, front4), "malformed PROXY protocol header"},
	{frontV2(0x21, 0x11, front4[1:]), "malformed PROXY protocol header"},
	{frontV2(0x21, 0x12, front4), "PROXY protocol header for another protocol than TCP"},
	{frontV2(0x21, 0x11, front4+strings.Repeat("\x16", 65535-12))[:1000], "PROXY protocol header that is too long"},
	{frontV2(0x20, 0x00, strings.Repeat("\x00", 4097)), "PROXY protocol header that is too long"},
}

// Goal: a connection without a proper header is closed, without an alert. A line names the peer and
// the reason, nothing of what was sent, and it is counted as refused.
func TestFrontRefused(t *testing.T) {
	d := startFront(t)
	d.frontHosts()
	base := d.fds()
	for _, tt := range notFronts {
		for _, slowly := range []bool{false, true} {
			c := d.dial()
			if slowly {
				for i := range min(len(tt.begin), 200) {
					if _, err := io.WriteString(c, tt.begin[i:i+1]); err != nil {
						break // it is closed
					}
				}
			} else if _, err := io.WriteString(c, tt.begin); err != nil {
				t.Error(err)
			}
			got, err := io.ReadAll(c)
			if len(got) > 0 || err != nil && !isReset(err) {
				t.Errorf("%.100q: got %q, error %v, want the end", tt.begin, got, err)
			}
			c.Close()
			line := d.err.Await(t, fmt.Sprintf("refused %v: ", c.LocalAddr()))
			if want := fmt.Sprintf("sniproxy: refused %v: %s; .accept-proxy asks for one (closed without an alert)", c.LocalAddr(), tt.want); line != want {
				t.Errorf("%.100q: the line is %q, want %q", tt.begin, line, want)
			}
		}
	}
	d.awaitFds(base)
	if got, want := d.counters(), fmt.Sprintf("none: %d", 2*len(notFronts)); got.refused != want {
		t.Errorf("refused %q, want %q", got.refused, want)
	}
}

// Goal: what comes behind the header is judged as ever, but by the client's address: a second
// header is no hello.
func TestFrontAlerts(t *testing.T) {
	d := startFront(t)
	for behind, want := range map[string]sni.Description{
		headerV1:                            sni.UnexpectedMessage,
		frontV2(0x21, 0x11, front4):         sni.UnexpectedMessage,
		"GET / HTTP/1.1\r\n\r\n":            sni.UnexpectedMessage,
		string(snitest.Hello("a..b")):       sni.UnrecognizedName,
		string(snitest.Hello("no.example")): sni.UnrecognizedName,
	} {
		for _, front := range fronts[:8] {
			c := d.dial()
			client := c.LocalAddr().String()
			if front.client != "" {
				client = front.client
			}
			before := strings.Count(d.err.String(), "refused "+client)
			io.WriteString(c, front.header+behind)
			if got, err := io.ReadAll(c); alert(got) != int(want) || err != nil {
				t.Errorf("%.80q behind %.80q: got %x, error %v, want alert %d", behind, front.header, got, err, want)
			}
			c.Close()
			hostdirtest.Await(t, "a line about "+client, func() bool { return strings.Count(d.err.String(), "refused "+client) > before })
		}
	}
}

// Goal: a connection that ends before its first byte, or behind a header, is a health check: it has
// no line, and is counted as empty. One that ends within a header is refused.
func TestFrontEmpty(t *testing.T) {
	d := startFront(t)
	base, n := d.fds(), 0
	for _, header := range []string{"", headerV1, frontV2(0x20, 0, ""), frontV2(0x21, 0x11, front4)} {
		for how, end := range map[string]func(c *net.TCPConn){
			"close": func(c *net.TCPConn) { c.Close() },
			"reset": func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
			"half":  func(c *net.TCPConn) { c.CloseWrite(); io.Copy(io.Discard, c); c.Close() },
		} {
			for _, slowly := range []bool{false, true} {
				c := d.dial()
				if slowly {
					sendSlowly(t, c, []byte(header))
					hostdirtest.Await(t, "the connection to be accepted", func() bool { return d.counters().accepted == n+1 })
				} else {
					say(t, c, []byte(header))
				}
				end(c)
				n++
				hostdirtest.Await(t, fmt.Sprintf("%d empty ones, the last %q, %s", n, header, how), func() bool { return d.counters().empty == n })
			}
		}
	}
	d.awaitFds(base)
	if strings.Contains(d.err.String(), "sniproxy: refused ") {
		t.Errorf("there are lines:\n%s", d.err)
	}
	c := d.dial()
	say(t, c, []byte(headerV1[:20]))
	c.CloseWrite()
	if got, err := io.ReadAll(c); len(got) > 0 || err != nil && !isReset(err) {
		t.Errorf("got %q, error %v, want the end", got, err)
	}
	d.err.Await(t, fmt.Sprintf("refused %v: the connection ended within the PROXY protocol header", c.LocalAddr()))
	if got := d.counters(); got.refused != "none: 1" || got.empty != n {
		t.Errorf("refused %q, empty %d", got.refused, got.empty)
	}
}

// Goal: header and hello have ten seconds together: a header in time does not extend them, and one
// that is late closes the connection.
func TestFrontLate(t *testing.T) {
	t.Parallel()
	d := startFront(t)
	before := time.Now()
	silent, part, behind := d.dial(), d.dial(), d.dial()
	say(t, part, []byte(frontV2(0x21, 0x11, front4)[:20]))
	say(t, behind, []byte(headerV1[:20]))
	<-time.After(limits.Hello / 2)
	say(t, behind, []byte(headerV1[20:]))
	say(t, behind, snitest.Hello("a.example")[:20])
	for _, c := range []*net.TCPConn{silent, part} {
		if got, err := io.ReadAll(c); len(got) > 0 || err != nil && !isReset(err) {
			t.Errorf("got %q, error %v, want the end", got, err)
		}
		d.err.Await(t, fmt.Sprintf("refused %v: no complete PROXY protocol header within the time limit", c.LocalAddr()))
	}
	if got, err := io.ReadAll(behind); alert(got) != int(sni.UserCanceled) || err != nil {
		t.Errorf("got %x, error %v", got, err)
	}
	d.err.Await(t, "refused 192.0.2.1:258: ")
	if took := time.Since(before); took < limits.Hello || took > limits.Hello+limits.Hello/4 {
		t.Errorf("they had %v", took)
	}
	hostdirtest.Await(t, "all to be counted", func() bool { return d.counters().refused == "90: 1, none: 2" })
}

// Goal: a marker that is made or removed counts within about a second, for connections that come
// from then on, also after a pause. One of a tenant's does not count, which a line says once.
func TestFrontMarker(t *testing.T) {
	t.Parallel() // it waits for the marker to be noticed
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	hello := snitest.Hello("a.example")
	expect := func(what string, want bool) { d.awaitFront(t, what, want) }
	marker := filepath.Join(d.dir, acceptProxy)
	expect("no header to be expected", false)
	hostdirtest.Must(t, os.Mkdir(marker, 0))
	expect("a header to be expected", true)
	// One that has been accepted already goes on without.
	c := d.dial()
	io.WriteString(c, headerV1)
	hostdirtest.Must(t, os.Remove(marker))
	expect("no header to be expected any more", false)
	c.Write(hello)
	if got, err := io.ReadAll(c); string(got) != "this is a.example" || err != nil {
		t.Errorf("got %q, error %v", got, err)
	}
}

// awaitFront waits until the daemon expects PROXY headers, or does not.
func (d *daemon) awaitFront(t *testing.T, what string, want bool) {
	t.Helper()
	front := func(header string) bool {
		got, _ := d.exchange(append([]byte(header), snitest.Hello("a.example")...))
		return string(got) == "this is a.example"
	}
	hostdirtest.Await(t, what, func() bool { return front(headerV1) == want && front("") == !want })
}

// Goal: only the administrator's marker counts, and one line says so of another's. What is no
// directory does not count either: a tenant can move files of root's out of his own directory.
func TestFrontMarkerOwner(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel() // it waits for the marker to be noticed
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	marker := filepath.Join(d.dir, acceptProxy)
	expect := func(what string, want bool) { d.awaitFront(t, what, want) }
	hostdirtest.Touch(t, d.hostPath("a.example", "moved"))
	hostdirtest.Must(t, os.Rename(d.hostPath("a.example", "moved"), marker))
	d.err.Await(t, ".accept-proxy in the hosts directory does not count: it is no directory")
	expect("no header to be expected, by a file", false)
	hostdirtest.Must(t, os.Remove(marker))
	const ignored = ".accept-proxy in the hosts directory does not count: it belongs to uid 65532, neither to root nor to the owner of the hosts directory"
	hostdirtest.Must(t, os.Mkdir(marker, 0o755))
	expect("a header to be expected again", true)
	hostdirtest.Must(t, os.Chown(marker, 65532, 65532))
	d.err.Await(t, ignored)
	expect("no header to be expected, by a tenant's marker", false)
	hostdirtest.Must(t, os.Chown(d.dir, 65532, 65532))
	expect("a header to be expected, by the marker of the hosts directory's owner", true)
	hostdirtest.Must(t, os.Chown(d.dir, 0, 0))
	hostdirtest.Await(t, "a second line", func() bool { return strings.Count(d.err.String(), ignored) == 2 })
	expect("no header to be expected, again", false)
	if n := strings.Count(d.err.String(), acceptProxy+" in"); n != 3 {
		t.Errorf("%d lines:\n%s", n, d.err)
	}
}

// Goal: while it cannot be found out whether there is a marker, it stays as it was.
func TestFrontUnknown(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel() // it waits for the marker not to be noticed
	d := startFront(t, ordinaryUser(t))
	d.serve("a.example", hostdirtest.Greet)
	hostdirtest.Must(t, os.Chmod(d.hostPath("a.example", "tls-socket"), 0o777))
	served := func(header string) string {
		got, _ := d.exchange(append([]byte(header), snitest.Hello("a.example")...))
		if n := alert(got); n >= 0 {
			return fmt.Sprint("alert ", n)
		}
		return string(got)
	}
	if got := served(headerV1); got != "this is a.example" {
		t.Fatalf("got %q", got)
	}
	hostdirtest.Must(t, os.Chmod(d.dir, 0o700))
	hostdirtest.Must(t, os.Remove(filepath.Join(d.dir, acceptProxy)))
	// Longer than it takes to find out.
	for late := time.Now().Add(2 * time.Second); time.Now().Before(late); {
		if with, without := served(headerV1), served(""); with != "alert 112" || without != "" {
			t.Fatalf("with a header %q, without one %q", with, without)
		}
	}
	hostdirtest.Must(t, os.Chmod(d.dir, 0o755))
	hostdirtest.Await(t, "the header to be a header no more", func() bool { return served("") == "this is a.example" })
}

// Goal: the first connections know whether there is a marker: those that wait in the backlog when
// the daemon starts, and a single one on standard input.
func TestFrontFirst(t *testing.T) {
	for _, marked := range []bool{true, false} {
		header := ""
		dir := hostdirtest.Dir(t)
		hostdirtest.Serve(t, hostDir(dir, "a.example"), hostdirtest.Greet)
		if marked {
			header = headerV1
			hostdirtest.Must(t, os.Mkdir(filepath.Join(dir, acceptProxy), 0o755))
		}
		b := append([]byte(header), snitest.Hello("a.example")...)
		for range 5 {
			l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
			var clients []net.Conn
			for range 20 {
				c, err := net.Dial("tcp", l.Addr().String())
				hostdirtest.Must(t, err)
				defer c.Close()
				c.SetDeadline(time.Now().Add(hostdirtest.Patience))
				say(t, c, b)
				clients = append(clients, c)
			}
			d := startOn(t, l, dir)
			for _, c := range clients {
				if got, err := io.ReadAll(c); string(got) != "this is a.example" || err != nil {
					t.Errorf("marker %v: got %q, error %v", marked, got, err)
				}
				c.Close()
			}
			d.signal(syscall.SIGTERM)
			d.expectExit(0)

			d, c := startSingle(t, dir)
			say(t, c, b)
			if got, err := io.ReadAll(c); string(got) != "this is a.example" || err != nil {
				t.Errorf("marker %v, alone: got %q, error %v", marked, got, err)
			}
			c.Close()
			d.expectExit(0)
		}
	}
}

// Goal: behind the longest header a hello may still have its 64 KiB, and no more.
func TestFrontLong(t *testing.T) {
	d := startFront(t)
	for size, want := range map[int]int{50_000: -1, 70_000: int(sni.InternalError)} {
		b := snitest.Records(snitest.ClientHello{CipherSuites: 40_000, Extensions: func(m *snitest.Message) {
			m.Extension(snitest.Padding, make([]byte, size-40_000))
			m.ServerName(func() { m.Entry(snitest.HostName, fmt.Sprintf("a%d.example", size)) })
		}}.Build().Bytes, 10_000)
		d.serve(fmt.Sprintf("a%d.example", size), func(c *net.UnixConn) {
			got := make([]byte, len(b))
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, b) {
				t.Errorf("the backend got something else, error %v", err)
			}
			io.WriteString(c, "all")
		})
		c := d.dial()
		go c.Write(append([]byte(fronts[8].header), b...))
		got, err := io.ReadAll(c)
		if alert(got) != want || want < 0 && string(got) != "all" || err != nil {
			t.Errorf("%d bytes: got %.40q, error %v, want alert %d", size, got, err, want)
		}
	}
}
