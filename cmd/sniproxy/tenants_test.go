package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// oneLoop leaves the daemon one processor, so there is no second loop to go on while the
// first is blocked.
func oneLoop(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=1") }

// tricks are more ways to have no socket than badHosts, of tenants who mean harm.
var tricks = map[string]func(dir string) error{
	"FIFO as directory":            func(dir string) error { return unix.Mkfifo(dir, 0o777) },
	"socket as directory":          func(dir string) error { return bindUnix(dir, unix.SOCK_STREAM) },
	"device as directory":          device,
	"hosts directory as directory": func(dir string) error { return os.Symlink(".", dir) },
	"descriptors as directory":     func(dir string) error { return os.Symlink("/proc/self/fd", dir) },
	"directory without permission": func(dir string) error { return os.Mkdir(dir, 0) },
	"device as socket":             inDir(device),
	"terminal as socket":           inDir(func(path string) error { return os.Symlink("/dev/tty", path) }),
	"descriptor 0 as socket":       inDir(func(path string) error { return os.Symlink("/proc/self/fd/0", path) }),
	"descriptor 3 as socket":       inDir(func(path string) error { return os.Symlink("/proc/self/fd/3", path) }),
	"loop of two symlinks": inDir(func(path string) error {
		return errors.Join(os.Symlink("other", path), os.Symlink("tls-socket", filepath.Join(filepath.Dir(path), "other")))
	}),
	"socket without permission": inDir(func(path string) error {
		return errors.Join(bindUnix(path, unix.SOCK_STREAM), os.Chmod(path, 0))
	}),
}

// tenantMarkers are what may be at send-proxy-v1. All of it counts.
var tenantMarkers = map[string]func(path string) error{
	"FIFO":                         func(path string) error { return unix.Mkfifo(path, 0) },
	"device":                       device,
	"socket":                       func(path string) error { return bindUnix(path, unix.SOCK_STREAM) },
	"directory without permission": func(path string) error { return os.Mkdir(path, 0) },
	"dangling symlink":             func(path string) error { return os.Symlink("nowhere", path) },
	"symlink loop":                 func(path string) error { return os.Symlink("send-proxy-v1", path) },
	"symlink to a device":          func(path string) error { return os.Symlink("/dev/null", path) },
	"symlink to a descriptor":      func(path string) error { return os.Symlink("/proc/self/fd/0", path) },
}

// device makes a character device or, for those who may not, a symlink to one.
func device(path string) error {
	if exec.Command("mknod", path, "c", "1", "3").Run() == nil {
		return os.Chmod(path, 0o777)
	}
	return os.Symlink("/dev/null", path)
}

// put makes something in the place of a host's directory. What is at tls-socket may be
// written to by all who may write to it at all, whatever the umask took away: otherwise the
// daemon, if it is another user, would look no further.
func (d *daemon) put(name string, what func(dir string) error) {
	d.t.Helper()
	hostdirtest.Must(d.t, what(d.hostDir(name)))
	path := filepath.Join(d.hostDir(name), "tls-socket")
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSymlink == 0 && st.Mode().Perm() != 0 {
		hostdirtest.Must(d.t, os.Chmod(path, 0o777))
	}
}

// headed is a backend that must get a PROXY header. Then it is like Greet.
func headed(c *net.UnixConn) {
	r := bufio.NewReader(c)
	header, err := r.ReadString('\n')
	if err != nil || !strings.HasPrefix(header, "PROXY TCP4 127.0.0.1 127.0.0.1 ") {
		fmt.Fprintf(c, "the header is %q, error %v", header, err)
		return
	}
	if name, _, err := hostdirtest.ReadHello(r); err == nil {
		io.WriteString(c, "this is "+name)
	}
}

// echoed reports why a client that says hello to a host served by Echo does not get back
// what it sends.
func (d *daemon) echoed(hello, want []byte) error {
	nc, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
	if err != nil {
		return err
	}
	c := nc.(*net.TCPConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	go func() {
		c.Write(hello)
		c.Write(want)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%d bytes came back, which are not the %d that were sent", len(got), len(want))
	}
	return err
}

// Goal: a tenant may put anything where its directory, its socket or its marker is expected, while
// clients ask for all of it at once, and other backends do not accept, do not read, or never stop
// sending. Each host's clients get what they must, other tenants' clients all their bytes, and the
// daemon keeps nothing.
func TestTenants(t *testing.T) {
	d := start(t, ordinaryUser(t), oneLoop)
	base := d.fds()
	d.serve("echo.example", hostdirtest.Echo)
	d.serve("greet.example", hostdirtest.Greet)
	random, hi := randomBytes(200_000), snitest.Hello("echo.example")

	var asks []func() error // for one host each
	ask := func(what, name string, ok func(got []byte) bool) {
		h := snitest.Hello(name)
		asks = append(asks, func() error {
			got, err := d.exchange(h)
			if err != nil || !ok(got) {
				return fmt.Errorf("%s: got %q, error %v", what, got, err)
			}
			return nil
		})
	}
	bad := maps.Clone(badHosts)
	maps.Copy(bad, tricks)
	for what, do := range bad {
		name := fmt.Sprintf("bad-%d.example", len(asks))
		d.put(name, do)
		ask(what, name, func(got []byte) bool { return alert(got) == int(sni.UnrecognizedName) })
	}
	for what, mark := range tenantMarkers {
		name := fmt.Sprintf("marked-%d.example", len(asks))
		d.serve(name, headed)
		if err := mark(d.hostPath(name, "send-proxy-v1")); err != nil {
			t.Fatal(what, err)
		}
		ask(what+" as marker", name, func(got []byte) bool { return string(got) == "this is "+name })
	}
	// Permissions decide whose socket it is.
	hostdirtest.Must(t, os.Symlink(filepath.Join("..", hostDir("", "greet.example"), "tls-socket"), d.hostPath("thief.example", "tls-socket")))
	ask("another tenant's socket", "thief.example", func(got []byte) bool { return string(got) == "this is thief.example" })

	deaf := d.shortBacklog("deaf.example")
	over := make(chan struct{})
	d.serve("mute.example", func(c *net.UnixConn) { <-over })
	d.serve("flood.example", func(c *net.UnixConn) { io.Copy(c, zeros{}) })
	held := d.crowd(100, snitest.Hello("deaf.example"))
	held = append(held, d.crowd(10, snitest.Hello("flood.example"))...)
	var taken atomic.Int64
	for _, c := range d.crowd(10, snitest.Hello("mute.example")) {
		stuff(c, &taken)
		held = append(held, c)
	}
	inParallel(20*len(asks), 24, func(i int) {
		if err := asks[i%len(asks)](); err != nil {
			t.Error(err)
		}
		if i%3 == 0 {
			if err := d.echoed(hi, random[:rand.IntN(len(random))]); err != nil {
				t.Error(err)
			}
		}
	})
	close(over)
	deaf.Close()
	for _, c := range held {
		c.Close()
	}
	d.awaitFds(base)
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
}

// Goal: hundreds of clients of a backend that has stopped accepting get their alert after ten
// seconds. Until then they cost no other client its answer.
func TestTenantDeaf(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	t.Parallel()
	const clients = 400
	d := start(t, oneLoop)
	base := d.fds()
	d.serve("a.example", hostdirtest.Greet)
	hostdirtest.FillBacklog(t, d.hostDir("deaf.example"))
	var waiting sync.WaitGroup
	for _, c := range d.crowd(clients, snitest.Hello("deaf.example")) {
		waiting.Go(func() {
			got, err := io.ReadAll(c)
			expectRecord(t, got, err, sni.InternalError)
			c.Close()
		})
	}
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.counters().accepted == clients })
	inParallel(200, 4, func(int) {
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
	})
	waiting.Wait()
	d.awaitFds(base)
}

// Goal: backends that never read from clients that never stop sending, and backends that never stop
// sending to clients that never read, cost the daemon a bounded amount of memory and no processor
// time. Another host is served, and the daemon keeps nothing.
func TestTenantStuck(t *testing.T) {
	t.Parallel() // it waits for them to stand still
	const conns = 50
	for _, tt := range []struct {
		name     string
		up, down bool // what is sent
	}{
		{"backends do not read", true, false},
		{"clients do not read", false, true},
		{"neither read", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := start(t, oneLoop)
			base := d.fds()
			d.serve("echo.example", hostdirtest.Echo)
			random, hi := randomBytes(1_000_000), snitest.Hello("echo.example")
			l := d.host("stuck.example")
			for range 10 {
				hostdirtest.Must(t, d.echoed(hi, random))
			}
			memory := d.rss()
			var ends []net.Conn
			var taken atomic.Int64
			for range conns {
				client, backend := d.pair(l, "stuck.example")
				ends = append(ends, client, backend)
				if tt.up {
					stuff(client, &taken)
				}
				if tt.down {
					stuff(backend, &taken)
				}
			}
			awaitStill(t, &taken)
			d.expectRest()
			for range 50 {
				hostdirtest.Must(t, d.echoed(hi, random))
			}
			d.expectGrowth(memory, conns*256<<10)
			for _, c := range ends {
				c.Close()
			}
			d.awaitFds(base)
		})
	}
}

// testHalfClosed is how long a connection may be half-closed in tests without moving a byte.
const testHalfClosed = 1500 * time.Millisecond

// Goal: a connection with one direction ended is closed when the other has moved no byte for the
// time limit, not before. The client gets a clean end if the backend has ended, otherwise a reset.
// A connection with no direction ended lives on. All of this holds while loops move relays to
// each other.
func TestHalfClosed(t *testing.T) {
	t.Parallel()
	for _, share := range []string{"", "1"} {
		t.Run("share "+share, func(t *testing.T) {
			t.Parallel()
			d := start(t, func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, fmt.Sprint("SNIPROXY_TEST_HALFCLOSED=", testHalfClosed), "SNIPROXY_TEST_SHARE="+share, "GOMAXPROCS=3")
			})
			d.serve("greet.example", hostdirtest.Greet)
			l := d.host("half.example")
			base := d.fds()
			least := testHalfClosed * 9 / 10
			if share != "" {
				least = testHalfClosed * 3 / 4 // loops look at different times, so one that moves is seen more often
				_, stop := d.load("greet.example")
				defer stop()
			}

			var watches sync.WaitGroup
			client, backend := d.pair(l, "half.example") // which live on
			for what, watch := range halfClosers {
				client, backend := d.pair(l, "half.example")
				client.SetDeadline(time.Now().Add(hostdirtest.Patience))
				backend.SetDeadline(time.Now().Add(hostdirtest.Patience))
				watches.Go(func() {
					begin := time.Now()
					last, err := watch(client, backend)
					if lived := time.Since(last); err == nil && lived < least {
						err = fmt.Errorf("ended after %v of silence", lived)
					}
					if err != nil {
						t.Errorf("%s, after %v: %v", what, time.Since(begin), err)
					}
				})
			}
			watches.Wait()
			ping(t, client, backend)
			ping(t, backend, client)
			client.Close()
			if _, err := io.ReadAll(backend); err != nil {
				t.Error(err)
			}
			backend.Close()
			if share == "" {
				d.awaitFds(base)
			}
		})
	}
}

// halfClosers end one direction of a connection, and wait until the daemon has ended all of it.
// They return the time when the last byte was moved at the latest that they know of.
var halfClosers = map[string]func(client *net.TCPConn, backend *net.UnixConn) (last time.Time, err error){
	"the client has ended": func(client *net.TCPConn, backend *net.UnixConn) (time.Time, error) {
		last := time.Now()
		client.CloseWrite()
		return last, errors.Join(expectEnd(backend), expectReset(client))
	},
	"the client has ended, the backend sends": func(client *net.TCPConn, backend *net.UnixConn) (time.Time, error) {
		client.CloseWrite()
		last, err := trickle(backend, client)
		return last, errors.Join(err, expectEnd(backend), expectReset(client))
	},
	"the client has ended, and does not read": func(client *net.TCPConn, backend *net.UnixConn) (last time.Time, err error) {
		client.CloseWrite()
		last = time.Now() // soon after that there is room only in the system's buffers
		for b := make([]byte, 64<<10); err == nil; {
			_, err = backend.Write(b)
		}
		if !isReset(err) {
			return last, fmt.Errorf("the backend's writing ended with %w", err)
		}
		if _, err := io.Copy(io.Discard, client); !isReset(err) {
			return last, fmt.Errorf("the client got %v, want a reset", err)
		}
		return last, nil
	},
	"the backend has ended": func(client *net.TCPConn, backend *net.UnixConn) (time.Time, error) {
		last := time.Now()
		backend.CloseWrite()
		return last, errors.Join(expectEnd(client), expectEnd(backend), expectNoReset(client))
	},
	"the backend has ended, the client sends": func(client *net.TCPConn, backend *net.UnixConn) (time.Time, error) {
		backend.CloseWrite()
		last, err := trickle(client, backend)
		return last, errors.Join(err, expectEnd(client), expectEnd(backend), expectNoReset(client))
	},
	"the backend has ended, and does not read": func(client *net.TCPConn, backend *net.UnixConn) (last time.Time, err error) {
		backend.CloseWrite()
		if err := expectEnd(client); err != nil {
			return last, err
		}
		last = time.Now() // soon after that there is room only in the system's buffers
		for b := make([]byte, 64<<10); err == nil; {
			_, err = client.Write(b)
		}
		if !isReset(err) {
			return last, fmt.Errorf("the client's writing ended with %w", err)
		}
		return last, nil
	},
	"the backend has closed": func(client *net.TCPConn, backend *net.UnixConn) (time.Time, error) {
		backend.Close()
		// Whether that is all is not for the client to see, but for the count of descriptors.
		return time.Time{}, errors.Join(expectEnd(client), expectNoReset(client))
	},
}

// trickle moves a byte every 200 ms, for longer than a connection may be half-closed and
// silent. It returns the time before the last.
func trickle(from, to net.Conn) (last time.Time, err error) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for begin := time.Now(); time.Since(begin) < 3*testHalfClosed; {
		<-tick.C
		last = time.Now()
		if _, err := from.Write([]byte{'a'}); err != nil {
			return last, fmt.Errorf("while bytes were moved: %w", err)
		}
		if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
			return last, fmt.Errorf("while bytes were moved: %w", err)
		}
	}
	return last, nil
}

// expectEnd reports what c gets instead of a clean end.
func expectEnd(c net.Conn) error {
	if got, err := io.ReadAll(c); len(got) > 0 || err != nil {
		return fmt.Errorf("%v got %q, error %w, want the end", c.LocalAddr().Network(), got, err)
	}
	return nil
}

// expectReset reports what c gets instead of a reset.
func expectReset(c net.Conn) error {
	if got, err := io.ReadAll(c); len(got) > 0 || !isReset(err) {
		return fmt.Errorf("%v got %q, error %v, want a reset", c.LocalAddr().Network(), got, err)
	}
	return nil
}

// expectNoReset reports a reset that came behind a clean end.
func expectNoReset(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var pending int
	if closed := raw.Control(func(fd uintptr) { pending, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR) }); closed != nil || err != nil {
		return errors.Join(closed, err)
	}
	if pending != 0 {
		return fmt.Errorf("after its end the client got: %w", unix.Errno(pending))
	}
	return nil
}

// A notice is a line that says why a client was refused.
type notice struct {
	addr, name, reason string
	alert              sni.Description
}

var (
	noticeLine  = regexp.MustCompile(`^sniproxy: refused (\S+?)(?: for (\S+))?: (.+) \(alert (\d+), ([a-z_]+)\)$`)
	leftOutLine = regexp.MustCompile(`^sniproxy: (\d+) more such lines? (?:was|were) left out$`)
)

// notices takes standard error apart: the notices, the number of those left out, and all else.
func notices(text string) (told []notice, leftOut int, others []string) {
	for line := range strings.Lines(text) {
		whole, ended := strings.CutSuffix(line, "\n")
		if !ended {
			break // the rest is still to come
		}
		if m := noticeLine.FindStringSubmatch(whole); m != nil {
			n, _ := strconv.Atoi(m[4])
			if d := sni.Description(n); d.String() == m[5] {
				told = append(told, notice{m[1], m[2], m[3], d})
				continue
			}
		}
		if m := leftOutLine.FindStringSubmatch(whole); m != nil {
			n, _ := strconv.Atoi(m[1])
			leftOut += n
			continue
		}
		others = append(others, whole)
	}
	return told, leftOut, others
}

// expectNotice fails the test unless exactly one notice is as wanted but for what follows the
// reason, and no other is of that client.
func (d *daemon) expectNotice(want notice) {
	d.t.Helper()
	d.err.Await(d.t, "refused "+want.addr)
	told, _, _ := notices(d.err.String())
	var of []notice
	for _, n := range told {
		if n.addr == want.addr {
			of = append(of, n)
		}
	}
	if len(of) != 1 || of[0].name != want.name || of[0].alert != want.alert || !strings.HasPrefix(of[0].reason, want.reason) {
		d.t.Errorf("the log has %+v, want %+v", of, want)
	}
}

// expectPlain fails the test if standard error has something else than readable ASCII.
func (d *daemon) expectPlain() {
	d.t.Helper()
	for line := range strings.Lines(d.err.String()) {
		for _, b := range []byte(strings.TrimSuffix(line, "\n")) {
			if b < ' ' || b > '~' {
				d.t.Errorf("the log has the line %q", line)
				break
			}
		}
	}
}

// Goal: each refused client has one line that says who it was, what it asked for, if that can be
// said, its alert, and why. Nothing that a client sends gets into the log unless it is a canonical
// name.
func TestLogReasons(t *testing.T) {
	type test struct {
		sent []byte
		end  bool // the client's side ends
		want notice
	}
	var tests []test
	add := func(sent []byte, end bool, name, reason string, alert sni.Description) {
		tests = append(tests, test{sent, end, notice{"", name, reason, alert}})
	}
	asking := func(name string) []byte { return snitest.Named(name).Stream() }

	d := start(t, ordinaryUser(t))
	uid := os.Geteuid()
	if uid == 0 {
		uid = 65534
	}
	for _, host := range []struct {
		name   string
		what   func(dir string) error
		reason string
	}{
		{"absent.example", badHosts["no directory"], "no directory"},
		{"no-directory.example", badHosts["file as directory"], "no directory"},
		{"empty.example", badHosts["no socket"], "no tls-socket"},
		{"abandoned.example", badHosts["abandoned socket"], "nobody listens on tls-socket"},
		{"silent.example", badHosts["socket that does not hear"], "nobody listens on tls-socket"},
		{"closed.example", tricks["directory without permission"], fmt.Sprintf("permission denied for uid %d", uid)},
		{"locked.example", tricks["socket without permission"], fmt.Sprintf("permission denied for uid %d", uid)},
		{"dangling.example", badHosts["dangling socket symlink"], "tls-socket is a symlink that leads nowhere"},
		{"fifo.example", badHosts["FIFO as socket"], "tls-socket is not a socket"},
		{"file.example", badHosts["read-only file as socket"], "tls-socket is not a socket"},
		{"packets.example", badHosts["seqpacket socket"], "tls-socket is neither a stream nor a datagram socket"},
	} {
		d.put(host.name, host.what)
		add(asking(strings.ToUpper(host.name)), false, host.name, host.reason, sni.UnrecognizedName)
	}

	for _, name := range []string{
		"", "forged\nsniproxy: forged", "\x1b[2Jforged", "forged\x00", "forged\xff", "forged\r", "forged example", "../forged",
		"forged..", "\u202eforged", "%d%s%!forged", strings.Repeat("forged.", 1000),
	} {
		_, err := sni.AppendCanonical(nil, []byte(name))
		var a sni.Alert
		if !errors.As(err, &a) {
			t.Fatalf("%q: %v", name, err)
		}
		add(asking(name), false, "", a.Reason, sni.UnrecognizedName)
	}
	add(snitest.ClientHello{}.Build().Stream(), false, "", "no server name", sni.UnrecognizedName)
	add(snitest.Hello(""), false, "", "no server name", sni.UnrecognizedName)
	add(snitest.Hello("")[:60], true, "", "the client ended the connection before the server name", sni.DecodeError)
	add(asking("forged")[:60], true, "", "the client ended the connection before the server name", sni.DecodeError)
	add([]byte("PROX"), true, "", "neither TLS nor anything else that is known here", sni.UnexpectedMessage)
	add([]byte{22, 3, 1, 255, 255}, false, "", "record is longer", sni.RecordOverflow)
	add([]byte("GET /forged\x1b[2J HTTP/1.1\r\n\r\n"), false, "", "plain HTTP, not TLS", sni.UnexpectedMessage)
	add(hello64K(1), false, "", "no server name within the first 64 KiB", sni.InternalError)

	for _, tt := range tests {
		c := d.dial()
		if _, err := c.Write(tt.sent); err != nil {
			t.Fatal(err)
		}
		if tt.end {
			c.CloseWrite()
		}
		got, err := io.ReadAll(c)
		expectRecord(t, got, err, tt.want.alert)
		tt.want.addr = c.LocalAddr().String()
		d.expectNotice(tt.want)
		c.Close()
	}
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	told, leftOut, others := notices(d.err.String())
	if len(told) != len(tests) || leftOut > 0 || len(others) > 0 {
		t.Errorf("%d lines are about refused clients, %d were left out, and there is %q; want %d", len(told), leftOut, others, len(tests))
	}
	d.expectPlain()
	if strings.Contains(d.err.String(), "forged") {
		t.Error("what a client sent is in the log")
	}
}

// Goal: a client that has not said what it wants within ten seconds, and one whose backend did not
// accept, has one line with the right reason.
func TestLogLate(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	t.Parallel()
	d := start(t)
	hostdirtest.FillBacklog(t, d.hostDir("deaf.example"))
	nameless := snitest.ClientHello{}.Build().Bytes
	var clients sync.WaitGroup
	for _, tt := range []struct {
		sent []byte
		want notice
	}{
		{nil, notice{"", "", "sent nothing within the time limit; it may wait for the server to speak first, as SMTP, IMAP and MySQL clients do", sni.UserCanceled}},
		{[]byte("PROX"), notice{"", "", "neither TLS nor anything else that is known here", sni.UnexpectedMessage}},
		{snitest.Record(22, nameless[:len(nameless)-1]...), notice{"", "", "no complete server name within the time limit", sni.UserCanceled}},
		{snitest.Hello("deaf.example")[:60], notice{"", "", "no complete server name within the time limit", sni.UserCanceled}},
		{snitest.Hello("deaf.example"), notice{"", "deaf.example", "the backlog of tls-socket is full", sni.InternalError}},
	} {
		c := d.dial()
		if _, err := c.Write(tt.sent); err != nil {
			t.Fatal(err)
		}
		tt.want.addr = c.LocalAddr().String()
		clients.Go(func() {
			got, err := io.ReadAll(c)
			expectRecord(t, got, err, tt.want.alert)
		})
		defer d.expectNotice(tt.want)
	}
	clients.Wait()
}

// Goal: a client's address is in brackets if it is IPv6, and dotted if it is IPv4, even if the
// socket is for both.
func TestLogAddresses(t *testing.T) {
	for _, tt := range []struct{ network, listener, client, begin string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1", "127.0.0.1:"},
		{"tcp6", "[::1]:0", "::1", "[::1]:"},
		{"tcp", "[::]:0", "127.0.0.1", "127.0.0.1:"},
		{"tcp", "[::]:0", "::1", "[::1]:"},
	} {
		t.Run(fmt.Sprintf("%s %s from %s", tt.network, tt.listener, tt.client), func(t *testing.T) {
			if tt.network != "tcp4" {
				hostdirtest.NeedIPv6(t)
			}
			l := hostdirtest.ListenTCP(t, tt.network, tt.listener)
			d := startOn(t, l, hostdirtest.Dir(t))
			d.addr = net.JoinHostPort(tt.client, fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
			c := d.dial()
			if _, err := c.Write(snitest.Hello("absent.example")); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			expectRecord(t, got, err, sni.UnrecognizedName)
			addr := tt.begin + fmt.Sprint(localAddr(c).Port())
			d.expectNotice(notice{addr, "absent.example", "no directory", sni.UnrecognizedName})
		})
	}
}

// Goal: a client that is dropped to make room has one line.
func TestLogDropped(t *testing.T) {
	d := start(t, limitFiles(64), oneLoop)
	d.serve("a.example", hostdirtest.Greet)
	first := d.dial()
	d.crowd(30, nil)
	for range 10 {
		d.crowd(10, nil)
		hostdirtest.Must(t, d.greeted("a.example"))
	}
	dropped := fmt.Sprintf("sniproxy: dropped %v to make room: ", first.LocalAddr())
	d.err.Await(t, dropped)
	if n := strings.Count(d.err.String(), dropped); n != 1 {
		t.Errorf("there are %d lines about a client that was dropped", n)
	}
	if got, err := io.ReadAll(first); len(got) > 0 || err != nil && !isReset(err) {
		t.Errorf("the client got %x, error %v", got, err)
	}
}

// Goal: the log says nothing of clients that are served, however they end, nor of those that are
// gone before the daemon can tell them anything.
func TestLogServed(t *testing.T) {
	d := start(t)
	d.serve("greet.example", hostdirtest.Greet)
	d.serve("echo.example", hostdirtest.Echo)
	base := d.fds()
	random, hi := randomBytes(500_000), snitest.Hello("echo.example")
	inParallel(200, 8, func(i int) {
		if err := d.greeted("greet.example"); err != nil {
			t.Error(err)
		}
		if err := d.echoed(hi, random[:i*1000]); err != nil {
			t.Error(err)
		}
	})
	for i := range 50 {
		c := d.dial()
		if i%2 == 0 {
			c.Write(hi)
			ping(t, c, c)
		} else {
			c.Write(hi[:i])
		}
		abort(c)
	}
	d.awaitFds(base)
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	if got := d.err.String(); got != "" {
		t.Errorf("standard error has %q", got)
	}
}

// refuse has n clients refused, width at a time. They end with a reset, so that no port is
// lost to TIME_WAIT.
func (d *daemon) refuse(n, width int) {
	h := snitest.Hello("absent.example")
	inParallel(n, width, func(int) {
		nc, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
		if err != nil {
			d.t.Error(err)
			return
		}
		c := nc.(*net.TCPConn)
		defer abort(c)
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
		c.Write(h)
		if got, err := io.ReadAll(c); err != nil || alert(got) != int(sni.UnrecognizedName) {
			d.t.Errorf("got %x, error %v, want alert %d", got, err, sni.UnrecognizedName)
		}
	})
}

// Goal: of many lines about refused clients only some are printed. A line counts the rest, even if
// nothing more happens; then there is room again. At the stop it comes at once.
func TestLogRation(t *testing.T) {
	t.Parallel() // it waits for the ration
	const burst, perSecond, clients = 50, 10, 1000
	d := start(t)
	begin := time.Now()
	d.refuse(clients, 20)
	var told []notice
	var leftOut int
	hostdirtest.Await(t, "all to be told", func() bool {
		told, leftOut, _ = notices(d.err.String())
		return len(told)+leftOut >= clients
	})
	most := burst + perSecond*int(time.Since(begin)/time.Second+1)
	if n := len(told); n+leftOut != clients || n < burst || n > most {
		t.Errorf("%d lines were printed and %d left out, want %d in all, and %d to %d printed", n, leftOut, clients, burst, most)
	}
	<-time.After(time.Second)
	for range perSecond / 2 {
		c := d.dial()
		c.Write(snitest.Hello("absent.example"))
		d.expectNotice(notice{c.LocalAddr().String(), "absent.example", "no directory", sni.UnrecognizedName})
	}
	d.refuse(clients, 20)
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	told, leftOut, others := notices(d.err.String())
	if n := clients + perSecond/2 + clients; len(told)+leftOut != n || len(others) > 0 {
		t.Errorf("%d lines were printed and %d left out, want %d in all; there is also %q", len(told), leftOut, n, others)
	}
}

// Goal: while most lines about refused clients are left out, the daemon's lines about itself are
// not.
func TestLogLifecycle(t *testing.T) {
	t.Parallel() // it waits for the ration
	d := start(t)
	l := d.host("live.example")
	d.pair(l, "live.example")
	var over atomic.Bool
	var flood sync.WaitGroup
	h := snitest.Hello("absent.example")
	for range 4 {
		flood.Go(func() {
			for !over.Load() {
				d.exchange(h) // which fails when the daemon stops
			}
		})
	}
	defer flood.Wait()
	defer over.Store(true)
	d.err.Await(t, "left out")
	d.signal(syscall.SIGHUP)
	d.out.Await(t, "got SIGHUP, shutting down")
	d.signal(syscall.SIGHUP)
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if _, _, others := notices(d.err.String()); len(others) != 1 || !strings.Contains(others[0], "got SIGHUP again, cut what was open: ") {
		t.Errorf("standard error has %q besides the lines about clients", others)
	}
}

// Goal: while nobody reads the log, and no more lines fit into it, clients are refused and served
// as ever. Nothing is lost when somebody reads again.
func TestLogUnread(t *testing.T) {
	t.Parallel() // it waits for the number of lines left out
	const clients = 1000
	r, w := openPipe(t)
	fill(t, w)
	d := start(t, oneLoop, output2(w))
	w.Close()
	d.serve("a.example", hostdirtest.Greet)
	_, stop := d.load("a.example")
	d.refuse(clients, 20)
	stop()
	var read hostdirtest.Lines
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(&read, r)
	}()
	text := func() string { return strings.ReplaceAll(read.String(), "\x00", "") } // without what the pipe was filled with
	hostdirtest.Await(t, "all to be told", func() bool {
		told, leftOut, _ := notices(text())
		return len(told)+leftOut >= clients
	})
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	<-done
	if told, leftOut, others := notices(text()); len(told)+leftOut != clients || len(others) > 0 {
		t.Errorf("%d lines were printed and %d left out, want %d in all; there is also %q", len(told), leftOut, clients, others)
	}
}
