package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

// The test binary is the daemon when it is started with this variable.
const impersonate = "SNIPROXY_TEST_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(impersonate) != "" {
		os.Exit(run())
	}
	// Tests that run in parallel wait for time limits most of the time, not for processors.
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		flag.Set("test.parallel", "8")
	}
	os.Exit(m.Run())
}

// With this variable, a duration, a daemon ends connections of which one direction has ended
// sooner.
func init() {
	if limit := os.Getenv("SNIPROXY_TEST_HALFCLOSED"); os.Getenv(impersonate) != "" && limit != "" {
		var err error
		if limits.HalfClosed, err = time.ParseDuration(limit); err != nil {
			panic(err)
		}
	}
}

// patience is how long a test waits for what must come. It is no limit on speed.
const patience = 30 * time.Second

// need skips the test where a program is not installed, or fails it where all must be.
func need(t testing.TB, program string) string {
	t.Helper()
	for _, name := range []string{program, "/usr/sbin/" + program, "/sbin/" + program} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("SNIPROXY_TEST_REQUIRE") != "" {
		t.Fatalf("%s is not installed, and SNIPROXY_TEST_REQUIRE is set", program)
	}
	t.Skipf("%s is not installed", program)
	return ""
}

// A daemon is a running sniproxy.
type daemon struct {
	t    testing.TB
	cmd  *exec.Cmd
	dir  string // the hosts directory
	addr string // where it listens
	out  *lines // its standard output
	err  *lines // its standard error

	exited chan struct{} // closed when it has ended
}

// A setup changes how a daemon is started.
type setup func(*exec.Cmd)

// start starts a daemon on a free port of 127.0.0.1, with a hosts directory of its own, and
// waits until it listens. It is killed at the end of the test, if it still runs.
func start(t testing.TB, setups ...setup) *daemon {
	t.Helper()
	l := listen(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostsDir(t), setups...)
	l.Close()
	return d
}

// hostsDir returns a new directory, with a short path, since a socket's path is limited.
func hostsDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sni")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// listen returns a plain TCP listener. Go's default would be MPTCP.
func listen(t testing.TB, network, addr string) *net.TCPListener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// startOn starts a daemon on a listening socket, which stays open here, and waits until it listens.
func startOn(t testing.TB, l *net.TCPListener, dir string, setups ...setup) *daemon {
	t.Helper()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := launch(t, f, dir, setups...)
	d.addr = l.Addr().String()
	if d.out != nil {
		d.out.await(t, "listening on ")
	}
	return d
}

// launch starts a daemon with any standard input, and waits for nothing. Standard output and
// error are read into d.out and d.err unless a setup puts something else in their places.
func launch(t testing.TB, stdin *os.File, dir string, setups ...setup) *daemon {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, cmd: exec.Command(self), dir: dir, exited: make(chan struct{})}
	d.cmd.Dir = dir
	d.cmd.Env = append(os.Environ(), impersonate+"=1")
	if stdin != nil {
		d.cmd.Stdin = stdin
	}
	for _, s := range setups {
		s(d.cmd)
	}
	if d.cmd.Stdout == nil {
		d.out = &lines{}
		d.cmd.Stdout = d.out
	}
	if d.cmd.Stderr == nil {
		d.err = &lines{}
		d.cmd.Stderr = d.err
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.cmd.Wait()
		close(d.exited)
	}()
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.exited
		if t.Failed() && d.err != nil {
			t.Logf("the daemon's standard error:\n%s", d.err)
		}
	})
	return d
}

// limitFiles runs the daemon with ulimit -n.
func limitFiles(n int) setup {
	return func(cmd *exec.Cmd) {
		cmd.Args = []string{"sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0"`, n), cmd.Path}
		cmd.Path = "/bin/sh"
	}
}

// signal sends the daemon a signal.
func (d *daemon) signal(s syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(s); err != nil {
		d.t.Fatal(err)
	}
}

// wait waits for the end of the daemon and returns its exit status, -1 after a signal.
func (d *daemon) wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(patience):
		d.cmd.Process.Signal(syscall.SIGQUIT) // for its stacks
		<-d.exited
		d.t.Fatal("the daemon does not end")
	}
	return d.cmd.ProcessState.ExitCode()
}

// fds returns how many sockets and pipes the daemon has open. Other descriptors are no
// connection's; among them are some that Go's runtime opens when it first needs them.
func (d *daemon) fds() (n int) {
	d.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", d.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	for _, e := range entries {
		if to, _ := os.Readlink(dir + e.Name()); strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// allFds returns how many descriptors the daemon has open.
func (d *daemon) allFds() int {
	d.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	return len(entries)
}

// awaitFds waits until the daemon has n descriptors open, at most.
func (d *daemon) awaitFds(n int) {
	d.t.Helper()
	await(d.t, fmt.Sprintf("the daemon to have at most %d descriptors", n), func() bool { return d.fds() <= n })
}

// await waits until ok returns true.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !awaitFor(patience, ok) {
		t.Fatalf("waited in vain for %s", what)
	}
}

// awaitFor waits until ok returns true, for some time at most. It reports whether it did.
func awaitFor(most time.Duration, ok func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(most)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			return false
		}
	}
	return true
}

// lines collects what a program prints.
type lines struct {
	mu   sync.Mutex
	text []byte
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// await waits for a line that contains part, and returns it.
func (l *lines) await(t testing.TB, part string) (line string) {
	t.Helper()
	await(t, fmt.Sprintf("a line with %q", part), func() bool {
		sc := bufio.NewScanner(strings.NewReader(l.String()))
		for sc.Scan() {
			if strings.Contains(sc.Text(), part) {
				line = sc.Text()
				return true
			}
		}
		return false
	})
	return line
}

// hostPath returns the path of a file in the directory of a host, which it makes.
func (d *daemon) hostPath(name, file string) string {
	d.t.Helper()
	return hostPath(d.t, d.dir, name, file)
}

func hostPath(t testing.TB, hosts, name, file string) string {
	t.Helper()
	dir := filepath.Join(hosts, string(hostdir.AppendName(nil, []byte(name))))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, file)
}

// host makes a host and returns the listener on its tls-socket.
func (d *daemon) host(name string) *net.UnixListener {
	d.t.Helper()
	return listenHost(d.t, d.dir, name)
}

func listenHost(t testing.TB, hosts, name string) *net.UnixListener {
	t.Helper()
	path := hostPath(t, hosts, name, "tls-socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	return l
}

// serve makes a host and calls handle, in a goroutine, for each connection to it, which is
// closed when handle returns.
func (d *daemon) serve(name string, handle func(*net.UnixConn)) {
	d.t.Helper()
	serveHost(d.t, d.dir, name, handle)
}

func serveHost(t testing.TB, hosts, name string, handle func(*net.UnixConn)) {
	t.Helper()
	l := listenHost(t, hosts, name)
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(4 * patience))
				handle(c)
			})
		}
	})
	t.Cleanup(func() { l.Close() })
}

// greet is a backend that reads a ClientHello, answers with the server name in it, and
// closes. The name that it found is what the proxy must have routed by.
func greet(c *net.UnixConn) {
	name, _, err := readHello(c)
	if err != nil {
		fmt.Fprintf(c, "error: %v", err)
		return
	}
	io.WriteString(c, "this is "+name)
}

// echo is a backend that reads a ClientHello, then sends back what follows until its end.
func echo(c *net.UnixConn) {
	_, rest, err := readHello(c)
	if err != nil {
		return
	}
	c.Write(rest)
	io.Copy(c, c)
}

// readHello reads a ClientHello, in one record, and returns its server name and what was
// read with it.
func readHello(r io.Reader) (name string, rest []byte, err error) {
	var b []byte
	buf := make([]byte, 4096)
	for len(b) < 5 || len(b) < 5+int(b[3])<<8+int(b[4]) {
		n, err := r.Read(buf)
		if err != nil {
			return "", nil, fmt.Errorf("after %d bytes: %w", len(b), err)
		}
		b = append(b, buf[:n]...)
	}
	var p sni.Parser
	got, _, err := p.Parse(b)
	return string(got), b[5+int(b[3])<<8+int(b[4]):], err
}

// dial connects to the daemon.
func (d *daemon) dial() *net.TCPConn {
	d.t.Helper()
	c, err := d.tryDial()
	if err != nil {
		d.t.Fatal(err)
	}
	return c
}

// tryDial is for goroutines, and for loads where it may fail.
func (d *daemon) tryDial() (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", d.addr, patience)
	if err != nil {
		return nil, err
	}
	d.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(4 * patience))
	return c.(*net.TCPConn), nil
}

// exchange sends b to the daemon and returns all that comes back until the end.
func (d *daemon) exchange(b []byte) ([]byte, error) {
	c, err := net.DialTimeout("tcp", d.addr, patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return io.ReadAll(c)
}

// greeted reports why a client that asks for a host served by greet is not served.
func (d *daemon) greeted(name string) error {
	got, err := d.exchange(hello(name))
	if err == nil && string(got) != "this is "+strings.ToLower(name) {
		err = fmt.Errorf("the answer is %q", got)
	}
	return err
}

// alert returns the description in what a client got, -1 if that is not just one fatal alert.
func alert(got []byte) int {
	if len(got) == 7 && bytes.HasPrefix(got, []byte{21, 3, 3, 0, 2, 2}) {
		return int(got[6])
	}
	return -1
}

// expectAlert sends b, and fails the test unless exactly the alert comes back, and then the end.
func (d *daemon) expectAlert(b []byte, want sni.Description) {
	d.t.Helper()
	got, err := d.exchange(b)
	if err != nil || alert(got) != int(want) {
		d.t.Errorf("got %x, error %v, want alert %d", got, err, want)
	}
}

// hello returns the ClientHello that crypto/tls sends for a server name. The empty name
// gives one without a server name.
func hello(name string) []byte { return helloConfig(&tls.Config{ServerName: name}) }

func helloConfig(c *tls.Config) []byte {
	if c.ServerName == "" {
		c.InsecureSkipVerify = true
	}
	var r recorder
	tls.Client(&r, c).Handshake()
	return r.sent
}

type recorder struct {
	net.Conn
	sent []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.sent = append(r.sent, b...)
	return len(b), nil
}

func (*recorder) Read([]byte) (int, error)         { return 0, io.EOF }
func (*recorder) Close() error                     { return nil }
func (*recorder) SetDeadline(time.Time) error      { return nil }
func (*recorder) SetWriteDeadline(time.Time) error { return nil }

// isReset tells whether a connection ended with a reset.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// localAddr returns the address that the proxy must report for a connection.
func localAddr(c net.Conn) netip.AddrPort { return c.LocalAddr().(*net.TCPAddr).AddrPort() }

// needIPv6 skips the test where the machine has no IPv6.
func needIPv6(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	l.Close()
}
