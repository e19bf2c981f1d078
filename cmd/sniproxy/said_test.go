package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: the log says of a client that does not speak TLS what it speaks, in words of the daemon's.
func TestLogForeign(t *testing.T) {
	d := start(t)
	for _, c := range []struct{ sent, reason string }{
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1024 443\r\n", "a PROXY protocol header in place of TLS"},
		{"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00", "a PROXY protocol header in place of TLS"},
		{"GET / HTTP/1.1\r\nHost: forged\r\n\r\n", "plain HTTP, not TLS"},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "plain HTTP, not TLS"},
		{"SSH-2.0-forged\r\n", "SSH, not TLS"},
		{"\x00\x00\x00\x08\x04\xd2\x16\x2f", "PostgreSQL without direct TLS"},
		{"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", "client hello in the format of SSL 2.0"},
		{"\x03\x00\x00\x2b\x26\xe0\x00\x00", "RDP"},
		{"EHLO forged\r\n", "neither TLS nor anything else"},
		{"\x15\x03\x01\x00\x02\x02\x0a", "first record is not a handshake"},
	} {
		for _, piece := range []int{100, 1} {
			client := d.dial()
			for b := range slices.Chunk([]byte(c.sent), piece) {
				client.Write(b)
			}
			got, err := io.ReadAll(client)
			expectRecord(t, got, err, sni.UnexpectedMessage)
			d.expectNotice(notice{client.LocalAddr().String(), "", c.reason, sni.UnexpectedMessage})
			client.Close()
		}
	}
	if strings.Contains(d.err.String(), "forged") {
		t.Error("what a client sent is in the log")
	}
}

// Goal: programs that do not speak TLS are told apart.
func TestLogForeignPrograms(t *testing.T) {
	t.Parallel()
	d := start(t)
	_, port, _ := net.SplitHostPort(d.addr)
	for _, c := range []struct {
		program string
		args    []string
		reason  string
	}{
		{"curl", []string{"-q", "-sS", "--noproxy", "*", "http://" + d.addr + "/"}, "plain HTTP, not TLS"},
		{"curl", []string{"-q", "-sS", "--noproxy", "*", "--http2-prior-knowledge", "http://" + d.addr + "/"}, "plain HTTP, not TLS"},
		{"curl", []string{"-q", "-sS", "--noproxy", "*", "--haproxy-protocol", "-k", "https://" + d.addr + "/"}, "a PROXY protocol header in place of TLS: one is read only where .accept-proxy is in the hosts directory, and only one"},
		{"ssh", []string{"-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-p", port, "127.0.0.1"}, "SSH, not TLS"},
		{"psql", []string{"host=127.0.0.1 user=a sslmode=require port=" + port}, "PostgreSQL without direct TLS (sslnegotiation=direct, since PostgreSQL 17)"},
		{"psql", []string{"host=127.0.0.1 user=a sslmode=disable port=" + port}, "PostgreSQL without direct TLS (sslnegotiation=direct, since PostgreSQL 17)"},
		// Java's tool for certificates is a TLS client that can be told to be old.
		{"keytool", []string{"-J-Djdk.tls.client.protocols=SSLv2Hello,TLSv1.2", "-printcert", "-sslserver", d.addr}, "client hello in the format of SSL 2.0, which is too old"},
	} {
		t.Run(c.program+" "+c.reason, func(t *testing.T) {
			before, _, _ := notices(d.err.String())
			if out, status := execute(t, c.program, c.args...); status == 0 {
				t.Errorf("exit status 0, output %q", out)
			}
			var told []notice
			hostdirtest.Await(t, "a line", func() bool {
				told, _, _ = notices(d.err.String())
				return len(told) > len(before)
			})
			if got := told[len(told)-1]; got.reason != c.reason || got.alert != sni.UnexpectedMessage {
				t.Errorf("the log has %+v, want %q", got, c.reason)
			}
		})
	}
}

// Goal: the log says what is wrong with a name, of those that openssl sends as it is told, and that
// a client has sent an IPv6 address in place of one.
func TestLogNames(t *testing.T) {
	t.Parallel()
	d := start(t)
	for name, reason := range map[string]string{
		"one.example:443":    "server name has a port behind it",
		"[one.example]":      "server name has brackets",
		"bücher.example":     "server name has a character that is not ASCII",
		"https://a.example/": "server name is a URL",
		"*.example":          "server name has an asterisk",
		"one example":        "server name has a space",
		"one..example":       "server name has an empty label",
		"2001:db8::1":        "no server name but an IPv6 address",
		"[2001:db8::1]":      "no server name but an IPv6 address",
	} {
		before, _, _ := notices(d.err.String())
		out, status := execute(t, "openssl", "s_client", "-connect", d.addr, "-servername", name)
		if status == 0 || !strings.Contains(out, "alert number 112") {
			t.Errorf("%s: exit status %d, output %s", name, status, out)
		}
		var told []notice
		hostdirtest.Await(t, "a line", func() bool {
			told, _, _ = notices(d.err.String())
			return len(told) > len(before)
		})
		if len(told) != len(before)+1 || !strings.HasPrefix(told[len(told)-1].reason, reason) || told[len(told)-1].name != "" {
			t.Errorf("%s: the log has %+v, want %q", name, told[len(before):], reason)
		}
	}
}

// Goal: an IPv6 address in place of a name, in brackets or not, is no name: such a client goes to
// *.
func TestAddressAsName(t *testing.T) {
	d := start(t)
	names := []string{"2001:db8::1", "[2001:DB8::1]", "fe80::1%eth0", "::ffff:192.0.2.1", "[::1]."}
	for _, name := range names {
		d.expectAlert(snitest.Named(name).Stream(), sni.UnrecognizedName)
	}
	d.serve("*", answering("*"))
	hostdirtest.Touch(t, d.hostPath("*", "send-proxy-v2"))
	for _, name := range append(names, "192.0.2.1") {
		got, err := d.exchange(snitest.Named(name).Stream())
		if err != nil || !strings.HasSuffix(string(got), "*") {
			t.Errorf("%s: got %q, error %v", name, got, err)
		}
	}
}

// Goal: a name with a dot at its end is that of the same host: for openssl, which sends it, for
// curl, and for a browser. The backend is one that accepts such a name.
func TestDotAtTheEnd(t *testing.T) {
	t.Parallel()
	d := start(t)
	ca := newAuthority(t)
	_, port, _ := net.SplitHostPort(d.addr)
	file := pemFile(t, ca.issue(t, "one.example"))
	startBackend(t, d.hostPath("one.example", "tls-socket"), "openssl", "s_server", "-unix", "tls-socket", "-cert", file, "-key", file, "-www")
	t.Run("openssl", func(t *testing.T) {
		out, status := execute(t, "openssl", "s_client", "-connect", d.addr, "-servername", "one.example.", "-CAfile", ca.file, "-verify_return_error")
		if status != 0 || !strings.Contains(out, "200 ok") {
			t.Errorf("exit status %d, output %s", status, out)
		}
	})
	t.Run("curl", func(t *testing.T) {
		out, status := execute(t, "curl", "-q", "-sS", "-k", "--noproxy", "*", "--resolve", "one.example.:"+port+":127.0.0.1", "https://one.example.:"+port+"/")
		if status != 0 || !strings.Contains(out, "s_server") {
			t.Errorf("exit status %d, output %s", status, out)
		}
	})
	t.Run("chromium", func(t *testing.T) {
		for _, host := range []string{"one.example", "one.example."} {
			out, _ := execute(t, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
				"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir="+t.TempDir(),
				"--ignore-certificate-errors", "--host-resolver-rules=MAP * 127.0.0.1", "--dump-dom", "https://"+host+":"+port+"/")
			if !strings.Contains(out, "s_server") {
				t.Errorf("%s: output %s", host, out)
			}
		}
	})
}

// Goal: crypto/tls in a backend refuses a name with a dot at its end, as the manual page says: the
// client gets its alert, not one of ours.
func TestDotAndGo(t *testing.T) {
	d := start(t)
	d.serveHTTPS("one.example", &tls.Config{Certificates: []tls.Certificate{newAuthority(t).issue(t, "one.example")}})
	out, status := execute(t, "openssl", "s_client", "-connect", d.addr, "-servername", "one.example.")
	if status == 0 || strings.Contains(out, "alert number 112") || !strings.Contains(out, "alert number") {
		t.Errorf("exit status %d, output %s", status, out)
	}
	if got := d.err.String(); got != "" {
		t.Errorf("standard error has %q", got)
	}
}

// Goal: clients that are gone when the daemon looks at them are named all the same.
func TestLogGone(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("no /proc")
	}
	d := start(t)
	var addrs []string
	d.whileStopped(func() {
		for range 20 {
			c := d.dial()
			c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			addrs = append(addrs, c.LocalAddr().String())
			abort(c)
		}
	})
	for _, addr := range addrs {
		d.expectNotice(notice{addr, "", "plain HTTP, not TLS", sni.UnexpectedMessage})
	}
	if strings.Contains(d.err.String(), "gone") {
		t.Error("a client was not named")
	}
}

// whileStopped calls do while the daemon is stopped (SIGSTOP).
func (d *daemon) whileStopped(do func()) {
	d.t.Helper()
	d.signal(syscall.SIGSTOP)
	hostdirtest.Await(d.t, "the daemon to stop", func() bool {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
		return strings.Contains(string(stat), ") T ")
	})
	do()
	d.signal(syscall.SIGCONT)
}

// Goal: a connection that ends without a byte, by an end or a reset, before or after it was
// accepted, has no line and does not count as refused. It takes nothing of the ration of others.
func TestEmpty(t *testing.T) {
	const clients = 100
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	base := d.fds()
	var want counted
	end := map[bool]func(*net.TCPConn){false: func(c *net.TCPConn) { c.Close() }, true: abort}
	for range clients {
		for _, reset := range []bool{false, true} {
			end[reset](d.dial())
			want.accepted++
		}
	}
	d.whileStopped(func() {
		for range clients {
			for _, reset := range []bool{false, true} {
				end[reset](d.dial())
				want.accepted++
			}
		}
	})
	want.empty = want.accepted
	d.awaitCounters(want)
	if got, err := d.tell(nil, 1, true); err != nil || alert(got) != int(sni.DecodeError) {
		t.Errorf("got %x, error %v", got, err)
	}
	c := d.dial()
	c.Write(snitest.Hello("absent.example"))
	d.expectNotice(notice{c.LocalAddr().String(), "absent.example", "no directory", sni.UnrecognizedName})
	c.Close()
	if told, leftOut, _ := notices(d.err.String()); len(told) != 1 || leftOut != 0 {
		t.Errorf("the log has %+v, and %d were left out", told, leftOut)
	}
	d.awaitFds(base)
}

// Goal: the checks of a load balancer are counted, and the log says what is wrong with those that
// send a PROXY header, and who they are.
func TestBalancerChecks(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		check, reason string
	}{
		// By default HAProxy resets a connection before it is one, and nobody accepts it.
		{"check inter 20ms\n\toption tcp-check\n\ttcp-check connect linger", ""},
		{"check inter 200ms send-proxy", "a PROXY protocol header in place of TLS"},
		{"check inter 200ms send-proxy-v2", "a PROXY protocol header in place of TLS"},
		{"check inter 200ms check-ssl verify none", "no server name"},
		{"check inter 200ms check-ssl verify none check-sni absent.example", "no directory"},
	} {
		t.Run(strings.ReplaceAll(tt.check, "\n", " "), func(t *testing.T) {
			d := start(t)
			config := writeFile(t, "config", fmt.Appendf(nil, "defaults\n\tmode tcp\n\ttimeout connect 30s\n\ttimeout client 30s\n\ttimeout server 30s\n"+
				"listen site\n\tbind unix@%s/front\n\tserver s %s %s\n", hostdirtest.Dir(t), d.addr, tt.check))
			spawn(t, "", "haproxy", "-db", "-f", config)
			if tt.reason == "" {
				hostdirtest.Await(t, "checks", func() bool { return d.counters().empty >= 25 })
				if told, leftOut, _ := notices(d.err.String()); len(told) > 0 || leftOut > 0 {
					t.Errorf("the log has %+v", told)
				}
				return
			}
			var told []notice
			hostdirtest.Await(t, "lines", func() bool {
				told, _, _ = notices(d.err.String())
				return len(told) >= 5
			})
			for _, n := range told {
				if !strings.HasPrefix(n.reason, tt.reason) || !strings.HasPrefix(n.addr, "127.0.0.1:") {
					t.Errorf("the log has %+v, want %q", n, tt.reason)
				}
			}
		})
	}
}

var unansweredLine = regexp.MustCompile(`^sniproxy: (?:the|a) backend of (\S+|uid \d+|the entry \S+) has closed (\S+) without an answer; (.*)$`)

// unanswered returns the lines about backends that did not answer: the host, the client and the
// advice.
func (d *daemon) unanswered() (lines [][]string) {
	for line := range strings.Lines(d.err.String()) {
		if m := unansweredLine.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
			m[1] = strings.TrimPrefix(m[1], "the entry ") // of a relay that has moved to another loop
			lines = append(lines, m[1:])
		}
	}
	return lines
}

// Goal: a backend that ends without a byte before its client does has a line, which names the host,
// the client and the markers. One that has answered, or whose client ended first, has none.
func TestUnanswered(t *testing.T) {
	const plain, v1, v2 = "without send-proxy-v1 and send-proxy-v2 it must expect no PROXY header",
		"with send-proxy-v1 it must expect a PROXY header of version 1",
		"with send-proxy-v2 it must expect a PROXY header of version 2"
	read := func(c *net.UnixConn) { c.Read(make([]byte, 64<<10)) }
	for _, tt := range []struct {
		what, name, marker string
		backend            func(*net.UnixConn)
		client             func(*net.TCPConn)
		want               string
	}{
		{"reads and closes", "a.example", "", read, nil, plain},
		{"closes at once", "a.example", "", func(*net.UnixConn) {}, nil, plain},
		{"reads a part, so closing is a reset", "a.example", "", func(c *net.UnixConn) { c.Read(make([]byte, 5)) }, nil, plain},
		{"version 1", "a.example", "send-proxy-v1", read, nil, v1},
		{"version 2", "a.example", "send-proxy-v2", read, nil, v2},
		{"ends its side", "a.example", "", func(c *net.UnixConn) {
			read(c)
			c.CloseWrite()
			io.Copy(io.Discard, c)
		}, nil, plain},
		{"answers", "a.example", "", hostdirtest.Greet, nil, ""},
		{"one byte", "a.example", "", func(c *net.UnixConn) {
			read(c)
			c.Write([]byte{21})
		}, nil, ""},
		{"the client ends first", "a.example", "", func(c *net.UnixConn) { io.Copy(io.Discard, c) },
			func(c *net.TCPConn) { c.CloseWrite() }, ""},
		{"the client resets", "a.example", "", func(c *net.UnixConn) { io.Copy(io.Discard, c) }, abort, ""},
		{"no name", "*", "", read, nil, plain},
	} {
		t.Run(tt.what, func(t *testing.T) {
			d := start(t)
			begun := make(chan struct{})
			d.serve(tt.name, func(c *net.UnixConn) {
				tt.backend(c)
				close(begun)
			})
			if tt.marker != "" {
				hostdirtest.Touch(t, d.hostPath(tt.name, tt.marker))
			}
			c := d.dial()
			c.Write(snitest.Hello(strings.Trim(tt.name, "*")))
			addr := c.LocalAddr().String()
			if tt.client != nil {
				hostdirtest.Await(t, "the relay", func() bool { return d.counters().up > 0 })
				tt.client(c)
			}
			if tt.want != "" {
				d.err.Await(t, "without an answer")
			}
			io.ReadAll(c)
			c.Close()
			<-begun
			hostdirtest.Await(t, "the end", func() bool { return d.counters().open == 0 })
			want := [][]string{{tt.name, addr, tt.want}}
			if tt.want == "" {
				want = nil
			}
			if got := d.unanswered(); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("the log has %q, want %q", got, want)
			}
		})
	}
}

// Goal: the lines about a tenant's backend take nothing of the ration of other tenants, nor of
// refused clients, and are themselves limited. How many were left out is said at the stop.
func TestUnansweredRation(t *testing.T) {
	const clients, burst = 300, 5
	d := start(t)
	silent := func(c *net.UnixConn) { c.Read(make([]byte, 64<<10)) }
	d.serve("loud.example", silent)
	d.serve("other.example", silent)
	begin := time.Now()
	inParallel(clients, 8, func(int) {
		if _, err := d.exchange(snitest.Hello("loud.example")); err != nil && !isReset(err) {
			t.Error(err)
		}
	})
	took := time.Since(begin)
	d.exchange(snitest.Hello("other.example"))
	refused := d.dial()
	refused.Write(snitest.Hello("absent.example"))
	d.expectNotice(notice{refused.LocalAddr().String(), "absent.example", "no directory", sni.UnrecognizedName})
	refused.Close()
	count := func() (of map[string]int) {
		of = map[string]int{}
		for _, line := range d.unanswered() {
			of[line[0]]++
		}
		return of
	}
	hostdirtest.Await(t, "a line about the other", func() bool { return count()["other.example"] == 1 })
	got := count()["loud.example"]
	if most := burst + 1 + int(took/(10*time.Second)); got < burst || got > most {
		t.Errorf("%d lines, want %d to %d", got, burst, most)
	}
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	left := regexp.MustCompile(`(?m)^sniproxy: (\d+) more such lines about (.*loud\.example|uid \d+|the entry \S+) were left out$`).FindStringSubmatch(d.err.String())
	if left == nil || left[1] != fmt.Sprint(clients-got) {
		t.Errorf("%q were left out, want %d", left, clients-got)
	}
}

// Goal: a real server that expects a PROXY header, and is sent none for want of a marker, leaves a
// line that says so.
func TestUnansweredServers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		config string
		args   []string
	}{
		"nginx":   {nginxConfig, []string{"-e", "stderr", "-c"}},
		"haproxy": {haproxyConfig, []string{"-db", "-f"}},
	} {
		t.Run(name, func(t *testing.T) {
			hostdirtest.Need(t, name)
			ca := newAuthority(t)
			d := start(t)
			socket := d.hostPath("site.example", "tls-socket")
			config := writeFile(t, "config", fmt.Appendf(nil, tt.config, socket, pemFile(t, ca.issue(t, "site.example")), t.TempDir()))
			startBackend(t, socket, name, append(tt.args, config)...)
			if _, _, err := get(t, ca, d.addr); err == nil {
				t.Error("the backend does not require the header")
			}
			d.err.Await(t, "without an answer; without send-proxy-v1 and send-proxy-v2 it must expect no PROXY header")
			hostdirtest.Touch(t, filepath.Join(filepath.Dir(socket), "send-proxy-v1"))
			if _, _, err := get(t, ca, d.addr); err != nil {
				t.Error(err)
			}
		})
	}
}

// Goal: whatever clients send first, and whatever they ask for, the log has no byte of it: each
// line is the address and one of the daemon's own reasons, and a name only if it is canonical.
func TestLogNothingChosen(t *testing.T) {
	const token = "fOrGeD" // no canonical name has it
	random := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	var inputs [][]byte
	for _, begin := range []string{
		"", "PROXY ", "\r\n\r\n\x00\r\nQUIT\n", "GET /", "POST ", "SSH-", "\x00\x00\x00\x08\x04\xd2\x16\x2f", "\x80\x2e\x01", "\x03\x00",
		"\x15\x03\x01", "\x16\x03\x01\x00\x40\x01\x00\x00\x3c", "\x16\x03\x01\xff\xff", "\x1b[2J", "\nsniproxy: refused ", "%s%d",
	} {
		for range 4 {
			inputs = append(inputs, fmt.Appendf(nil, "%s%s%s", begin, token, noise(random.IntN(40))))
		}
	}
	for _, form := range []string{"%s%s", "%s:%s", "[%s]%s", "%s.%s", "http://%s/%s", "%s\n%s", "*.%s%s", "::%s%s", "-%s%s", "%s\x1b[2J%s"} {
		for n := range 12 {
			inputs = append(inputs, snitest.Named(fmt.Sprintf(form, token, noise(n))).Stream())
		}
	}
	const perDaemon = 40 // all of them are within the ration
	for len(inputs) > 0 {
		n := min(perDaemon, len(inputs))
		part := inputs[:n]
		inputs = inputs[n:]
		d := start(t)
		for _, sent := range part {
			var parser sni.Parser
			name, _, err := parser.Parse(sent)
			want := notice{reason: "the client ended the connection before the server name", alert: sni.DecodeError}
			var a sni.Alert
			switch {
			case errors.As(err, &a) || errors.As(parser.Foreign(), &a):
				want.reason, want.alert = a.Reason, a.Description
			case len(name) > 0:
				want = notice{"", string(name), "no directory", sni.UnrecognizedName}
			case parser.Address():
				want.reason, want.alert = "no server name but an IPv6 address", sni.UnrecognizedName
			}
			c := d.dial()
			c.Write(sent)
			c.CloseWrite()
			io.ReadAll(c)
			want.addr = c.LocalAddr().String()
			told := d.err.Await(t, "refused "+want.addr)
			if got, _, _ := notices(told + "\n"); len(got) != 1 || got[0] != want {
				t.Errorf("%q: the log has %q, want %+v", sent, told, want)
			}
			c.Close()
		}
		d.expectPlain()
		if strings.Contains(d.err.String(), token) {
			t.Errorf("what a client sent is in the log")
		}
	}
}

// Goal: a backend that does not answer has a line also if it is a write to it that fails.
func TestUnansweredWrite(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("no /proc")
	}
	d := start(t)
	l := d.host("a.example")
	c := d.dial()
	hello := snitest.Hello("a.example")
	c.Write(hello)
	backend, err := l.AcceptUnix()
	hostdirtest.Must(t, err)
	hostdirtest.Await(t, "the relay", func() bool { return d.counters().up == len(hello) })
	d.whileStopped(func() {
		c.Write([]byte("more"))
		backend.Close() // with the hello unread, so this is a reset
	})
	d.err.Await(t, "without an answer")
	io.ReadAll(c)
	if n := len(d.unanswered()); n != 1 {
		t.Errorf("%d lines", n)
	}
}
