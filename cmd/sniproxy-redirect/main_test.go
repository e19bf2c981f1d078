package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/usage"
	"sniproxy/hostdir/hostdirtest"
)

// The test binary is sniproxy-redirect when it is started with this variable.
const impersonate = "SNIPROXY_REDIRECT_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(impersonate) != "" {
		os.Exit(run())
	}
	// Tests that run in parallel wait for time limits, not for processors.
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		flag.Set("test.parallel", "16")
	}
	os.Exit(m.Run())
}

// A redirector is a running sniproxy-redirect.
type redirector struct {
	t        testing.TB
	cmd      *exec.Cmd
	addr     string
	out, err *hostdirtest.Lines
	exited   chan struct{}
}

// start starts one on a free port of 127.0.0.1, and waits until it listens.
func start(t testing.TB, setups ...func(*exec.Cmd)) *redirector {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	defer l.Close()
	return startOn(t, l, setups...)
}

func startOn(t testing.TB, l *net.TCPListener, setups ...func(*exec.Cmd)) *redirector {
	t.Helper()
	f, err := l.File()
	hostdirtest.Must(t, err)
	defer f.Close()
	d := launch(t, f, setups...)
	d.addr = l.Addr().String()
	d.out.Await(t, "listening on "+d.addr)
	return d
}

// launch starts one with any standard input, and waits for nothing.
func launch(t testing.TB, stdin *os.File, setups ...func(*exec.Cmd)) *redirector {
	t.Helper()
	d := &redirector{
		t: t, cmd: hostdirtest.Command(t, impersonate+"=1"), exited: make(chan struct{}),
		out: new(hostdirtest.Lines), err: new(hostdirtest.Lines),
	}
	d.cmd.Stdin, d.cmd.Stdout, d.cmd.Stderr = stdin, d.out, d.err
	for _, s := range setups {
		s(d.cmd)
	}
	hostdirtest.Must(t, d.cmd.Start())
	go func() {
		d.cmd.Wait()
		close(d.exited)
	}()
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.exited
		if t.Failed() {
			t.Logf("standard error: %s", d.err)
		}
	})
	return d
}

func (d *redirector) signal(s syscall.Signal) {
	d.t.Helper()
	hostdirtest.Must(d.t, d.cmd.Process.Signal(s))
}

// wait waits for the end of the program and returns its exit status.
func (d *redirector) wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(hostdirtest.Patience):
		d.t.Fatal("the program does not end")
	}
	return d.cmd.ProcessState.ExitCode()
}

// A client is a connection to a redirector.
type client struct {
	t testing.TB
	*net.TCPConn
	r *bufio.Reader
}

func newClient(t testing.TB, c net.Conn) *client {
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	t.Cleanup(func() { c.Close() })
	return &client{t, c.(*net.TCPConn), bufio.NewReader(c)}
}

func (d *redirector) dial() *client {
	d.t.Helper()
	c, err := net.Dial("tcp", d.addr)
	hostdirtest.Must(d.t, err)
	return newClient(d.t, c)
}

func (c *client) send(b ...[]byte) {
	c.t.Helper()
	for _, b := range b {
		if _, err := c.Write(b); err != nil {
			c.t.Error(err)
		}
	}
}

// expect reads the answer to a request with a method, which leads to location, and the end of the
// connection.
func (c *client) expect(method, location string) {
	c.t.Helper()
	a, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("no answer: %v", err)
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	date, bad := http.ParseTime(a.Header.Get("Date"))
	if a.StatusCode != 308 || a.Header.Get("Location") != location || len(b) > 0 || err != nil ||
		bad != nil || time.Since(date).Abs() > time.Minute || a.Header.Get("Strict-Transport-Security") != "" {
		c.t.Errorf("the answer is %s, %v, content %q, error %v, want location %q", a.Status, a.Header, b, err, location)
	}
	c.expectEnd()
}

// refused reads the answer to a request that is refused, up to the end of the connection.
func (c *client) refused(status int) string {
	c.t.Helper()
	b, err := io.ReadAll(c.r)
	if !strings.HasPrefix(string(b), "HTTP/1.") || !strings.HasPrefix(string(b[min(len(b), 9):]), strconv.Itoa(status)) || strings.Contains(string(b), "Location") || err != nil {
		c.t.Errorf("the answer is %q, error %v, want %d", b, err, status)
	}
	return string(b)
}

// expectEnd fails the test unless the connection ends cleanly, with nothing before.
func (c *client) expectEnd() {
	c.t.Helper()
	if b, err := io.ReadAll(c.r); len(b) > 0 || err != nil {
		c.t.Errorf("got %q, error %v, want the end", b, err)
	}
}

// served has a client of its own redirected.
func (d *redirector) served() {
	d.t.Helper()
	c := d.dial()
	defer c.Close()
	c.send(head("GET /served HTTP/1.1", "Host: one.example"))
	c.expect("GET", "https://one.example/served")
}

var getOne = head("GET /a HTTP/1.1", "Host: one.example")

// Goal: a request is answered, however it is cut, and the connection ends. A HEAD gets no content.
func TestRequests(t *testing.T) {
	d := start(t)
	c := d.dial()
	for i := range getOne {
		c.send(getOne[i : i+1])
	}
	c.expect("GET", "https://one.example/a")
	for cut := range len(getOne) {
		c := d.dial()
		c.send(getOne[:cut], getOne[cut:])
		c.expect("GET", "https://one.example/a")
		c.Close()
	}
	c = d.dial()
	c.send(head("HEAD / HTTP/1.0", "Host: two.example"))
	c.expect("HEAD", "https://two.example/")
}

// Goal: a request with content is answered, and what comes behind a request is never taken for
// another.
func TestContent(t *testing.T) {
	d := start(t)
	for _, field := range []string{"Content-Length: 200000", "Transfer-Encoding: chunked"} {
		c := d.dial()
		c.send(head("POST /a HTTP/1.1", "Host: one.example", field), bytes.Repeat(getOne, 200_000/len(getOne)))
		b, err := io.ReadAll(c.r)
		if n := bytes.Count(b, []byte("Location: https://one.example/a\r\n")); n != 1 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the answer is %q, error %v", b, err)
		}
	}
}

// Goal: a refusal says why.
func TestRefused(t *testing.T) {
	d := start(t)
	for _, c := range []struct{ line, host, reason string }{
		{"GET / HTTP/1.1", "-one.example", errHost.Error()},
		{"CONNECT one.example:443 HTTP/1.1", "one.example", errTarget.Error()},
	} {
		client := d.dial()
		client.send(head(c.line, "Host: "+c.host))
		if got := client.refused(400); !strings.HasSuffix(got, c.reason+"\n") {
			t.Errorf("%q to %q: the answer is %q, want %q", c.line, c.host, got, c.reason)
		}
	}
}

// Goal: the head of a request has 8 KiB at most.
func TestHeadSize(t *testing.T) {
	d := start(t)
	fill := func(n int) []byte {
		const start, end = "GET / HTTP/1.1\r\nHost: one.example\r\nCookie: ", "\r\n\r\n"
		return []byte(start + strings.Repeat("c", n-len(start+end)) + end)
	}
	c := d.dial()
	c.send(fill(maxHead - 1))
	c.expect("GET", "https://one.example/")
	c = d.dial()
	c.send(fill(maxHead + 1))
	c.refused(431)
}

// Goal: a request has ten seconds, however many bytes come.
func TestTimeLimit(t *testing.T) {
	t.Parallel()
	d := start(t)
	before := time.Now()
	silent, slow := d.dial(), d.dial()
	var trickling sync.WaitGroup
	trickling.Go(func() {
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		for _, b := range head("GET / HTTP/1.1", "Host: one.example", "Cookie: "+strings.Repeat("c", 100)) {
			if _, err := slow.Write([]byte{b}); err != nil {
				return
			}
			<-tick.C
		}
	})
	for _, c := range []*client{silent, slow} {
		if b, err := io.ReadAll(c.r); bytes.Contains(b, []byte("Location")) || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %q, error %v, want the end", b, err)
		}
	}
	slow.Close()
	if took := time.Since(before); took < requestTime {
		t.Errorf("they had %v", took)
	}
	trickling.Wait()
}

// Goal: when descriptors run out, the client that has waited longest makes room, so silent clients
// cannot lock out others.
func TestSilentClientsMakeRoom(t *testing.T) {
	d := start(t, func(cmd *exec.Cmd) {
		cmd.Args = []string{"sh", "-c", `ulimit -n 40; exec "$0"`, cmd.Path}
		cmd.Path = "/bin/sh"
	})
	first := d.dial()
	for range 50 {
		d.dial()
		d.served()
	}
	first.expectEnd()
	d.err.Await(t, "to make room")
	d.signal(syscall.SIGHUP)
	d.out.Await(t, "shutting down")
	d.signal(syscall.SIGTERM)
	d.wait()
}

// Goal: a socket that others make blocking over and over, as systemd does, stalls neither clients
// nor the stop.
func TestMadeBlocking(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l)
	f, err := l.File()
	hostdirtest.Must(t, err)
	defer f.Close()
	raw, err := f.SyscallConn()
	hostdirtest.Must(t, err)
	block := func() { raw.Control(func(fd uintptr) { unix.SetNonblock(int(fd), false) }) }
	over := make(chan struct{})
	var blocking sync.WaitGroup
	blocking.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
				block()
			}
		}
	})
	for range 200 {
		d.served()
	}
	close(over)
	blocking.Wait()
	block()
	d.signal(syscall.SIGHUP)
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Goal: the signals stop the program: the port is free at once, clients that are there are
// answered, and the program ends with the last.
func TestStop(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(unix.SignalName(s), func(t *testing.T) {
			d := start(t)
			fresh, busy := d.dial(), d.dial()
			busy.send(getOne[:9])
			d.served() // so both were accepted
			d.signal(s)
			hostdirtest.Await(t, "the port to be free", func() bool {
				l, err := net.Listen("tcp", d.addr)
				if err == nil {
					l.Close()
				}
				return err == nil
			})
			busy.send(getOne[9:])
			busy.expect("GET", "https://one.example/a")
			fresh.send(getOne)
			fresh.expect("GET", "https://one.example/a")
			if status := d.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
			want := fmt.Sprintf("listening on %s\ngot %s, shutting down\n", d.addr, unix.SignalName(s))
			if got := d.out.String(); got != want || d.err.String() != "" {
				t.Errorf("standard output is %q, want %q; standard error is %q", got, want, d.err)
			}
		})
	}
}

// Goal: a second signal ends the program at once, but not SIGQUIT; what was cut is counted.
func TestCut(t *testing.T) {
	for _, c := range []struct {
		name    string
		signals []syscall.Signal
		line    string
	}{
		{"second", []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, "got SIGINT again, cut what was open: 1 connection"},
		{"twice", []syscall.Signal{syscall.SIGHUP, syscall.SIGHUP}, "got SIGHUP again, cut what was open: 1 connection"},
		{"quit", []syscall.Signal{syscall.SIGQUIT}, ""},
		{"quit and term", []syscall.Signal{syscall.SIGQUIT, syscall.SIGTERM}, "got SIGTERM again, cut what was open: 1 connection"},
		{"quit and quit", []syscall.Signal{syscall.SIGQUIT, syscall.SIGQUIT}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := start(t)
			open := d.dial()
			open.send(getOne[:9])
			d.served()
			d.signal(c.signals[0])
			d.out.Await(t, "shutting down")
			for _, s := range c.signals[1:] {
				d.signal(s)
				// Of several that are there at once it sees the one with the lowest number first.
				hostdirtest.Await(t, "the signal to arrive", func() bool { return !pending(d.cmd.Process.Pid) })
			}
			if status := d.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
			want := ""
			if c.line != "" {
				want = "sniproxy-redirect: " + c.line + "\n"
			}
			if got := d.err.String(); got != want {
				t.Errorf("standard error is %q, want %q", got, want)
			}
		})
	}
}

// pending tells whether a signal waits for a process that has not ended.
func pending(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	_, mask, _ := strings.Cut(string(b), "ShdPnd:\t")
	mask, _, _ = strings.Cut(mask, "\n")
	return strings.Trim(mask, "0") != ""
}

// Goal: when somebody who shares the listening socket shuts it down, the program says so and ends
// with status 1.
func TestCannotGoOn(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l)
	raw, err := l.SyscallConn()
	hostdirtest.Must(t, err)
	raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if err != nil {
		t.Skipf("this system does not shut listening sockets down: %v", err)
	}
	if status := d.wait(); status != 1 {
		t.Errorf("exit status %d", status)
	}
	if got := d.err.String(); !strings.Contains(got, "was shut down by another process") {
		t.Errorf("standard error is %q", got)
	}
}

// Goal: one connection on descriptors 0, 1 and 2, as of inetd, is served, nothing is printed to its
// client, and the program ends with it.
func TestSingle(t *testing.T) {
	for _, all := range []bool{false, true} {
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		conn, err := net.Dial("tcp", l.Addr().String())
		hostdirtest.Must(t, err)
		server, err := l.AcceptTCP()
		hostdirtest.Must(t, err)
		f, err := server.File()
		hostdirtest.Must(t, err)
		server.Close()
		c := newClient(t, conn)
		d := launch(t, f, func(cmd *exec.Cmd) {
			if all {
				cmd.Stdout, cmd.Stderr = f, f
			}
		})
		f.Close()
		c.send(getOne)
		c.expect("GET", "https://one.example/a")
		c.Close()
		if status := d.wait(); status != 0 || d.out.String()+d.err.String() != "" {
			t.Errorf("exit status %d, output %q", status, d.out.String()+d.err.String())
		}
	}
}

// Goal: sockets that systemd passes are served, all of them.
func TestPassed(t *testing.T) {
	var files []*os.File
	var addrs []string
	for range 2 {
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		f, err := l.File()
		hostdirtest.Must(t, err)
		defer f.Close()
		addrs = append(addrs, l.Addr().String())
		files = append(files, f)
		l.Close()
	}
	d := launch(t, nil, func(cmd *exec.Cmd) {
		cmd.ExtraFiles = files
		cmd.Args = []string{"sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0"`, cmd.Path}
		cmd.Path = "/bin/sh"
	})
	for _, d.addr = range addrs {
		d.out.Await(t, "listening on "+d.addr)
		d.served()
	}
	d.signal(syscall.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Goal: anything else on standard input is refused with a line that says what was found.
func TestWrongStdin(t *testing.T) {
	null, err := os.Open(os.DevNull)
	hostdirtest.Must(t, err)
	defer null.Close()
	d := launch(t, null)
	if status := d.wait(); status != 1 || d.out.String() != "" {
		t.Errorf("exit status %d, standard output %q", status, d.out)
	}
	got := d.err.String()
	if !strings.HasPrefix(got, "sniproxy-redirect: standard input is ") || !strings.Contains(got, "it must be a listening TCP socket") {
		t.Errorf("standard error is %q", got)
	}
}

// Goal: with too few descriptors the program says so, and ends.
func TestTooFewDescriptors(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	f, err := l.File()
	hostdirtest.Must(t, err)
	defer f.Close()
	for n := 4; n < 20; n++ { // three do not start a program
		d := launch(t, f, func(cmd *exec.Cmd) {
			cmd.Args = []string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0"`, n), cmd.Path}
			cmd.Path = "/bin/sh"
		})
		hostdirtest.Await(t, "a line", func() bool { return d.out.Find("listening") != "" || d.err.Find("") != "" })
		if d.out.String() != "" { // it is enough
			d.addr = l.Addr().String()
			d.served()
			return
		}
		if status := d.wait(); status != 1 || d.err.Find("sniproxy-redirect: the limit of open files") == "" {
			t.Errorf("limit %d: exit status %d, standard error %q", n, status, d.err)
		}
	}
	t.Error("19 descriptors are too few")
}

// Goal: -h gives the usage on standard output, and any other argument on standard error, with
// status 2.
func TestArguments(t *testing.T) {
	for _, arg := range []string{"-h", "--help", ":80", ""} {
		cmd := hostdirtest.Command(t, impersonate+"=1", arg)
		stdout, stderr, status := hostdirtest.Run(t, cmd)
		wantOut, wantErr, want := "", usage.Text(usageText), 2
		if arg == "-h" {
			wantOut, wantErr, want = wantErr, "", 0
		}
		if stdout != wantOut || stderr != wantErr || status != want {
			t.Errorf("%q: exit status %d, standard output %q, standard error %q", arg, status, stdout, stderr)
		}
	}
}

// Goal: curl understands the redirect, with and without content, HTTP/1.0 included.
func TestCurl(t *testing.T) {
	curl := hostdirtest.Need(t, "curl")
	d := start(t)
	for _, c := range []struct {
		want string
		args []string
	}{
		{"308 https://one.example/a/../b?c=d%20e", []string{"--path-as-is", "http://one.example/a/../b?c=d%20e"}},
		{"308 https://one.example/", []string{"--http1.0", "http://one.example"}},
		{"308 https://one.example/", []string{"--head", "http://one.example"}},
		{"308 https://one.example/a", []string{"--data", "content", "http://one.example/a"}},
		{"308 https://one.example/a", []string{"--data-binary", "@-", "--header", "Expect: 100-continue", "http://one.example/a"}},
		{"308 https://one.example", []string{"--request", "OPTIONS", "--request-target", "*", "http://one.example"}},
		{"400 ", []string{"--http1.0", "--header", "Host:", "http://one.example"}},
		{"400 ", []string{"--header", "Host: one_example/", "http://one.example"}},
	} {
		args := []string{"--silent", "--show-error", "--output", os.DevNull, "--write-out", "%{http_code} %header{location}", "--connect-to", "::" + d.addr}
		cmd := exec.Command(curl, append(args, c.args...)...)
		cmd.Stdin = strings.NewReader(strings.Repeat("content ", 20_000))
		if stdout, stderr, status := hostdirtest.Run(t, cmd); stdout != c.want || status != 0 {
			t.Errorf("curl %q prints %q, exit status %d: %s", c.args, stdout, status, stderr)
		}
	}
}
