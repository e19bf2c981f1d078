package main

import (
	"bytes"
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
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// The test binary is the daemon when it is started with this variable.
const impersonate = "SNIPROXY_TEST_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(impersonate) != "" {
		os.Exit(run())
	}
	// Tests that run in parallel wait for time limits most of the time, not for processors. With
	// the race detector they take several times as much of those.
	most := "16"
	if raceEnabled {
		most = "8"
	}
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		flag.Set("test.parallel", most)
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

// A daemon is a running sniproxy.
type daemon struct {
	t    testing.TB
	cmd  *exec.Cmd
	dir  string             // the hosts directory
	addr string             // where it listens
	out  *hostdirtest.Lines // its standard output
	err  *hostdirtest.Lines // its standard error

	exited chan struct{} // closed when it has ended
}

// A setup changes how a daemon is started.
type setup func(*exec.Cmd)

// start starts a daemon on a free port of 127.0.0.1, with a hosts directory of its own, and
// waits until it listens. It is killed at the end of the test, if it still runs.
func start(t testing.TB, setups ...setup) *daemon {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostdirtest.Dir(t), setups...)
	l.Close()
	return d
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
		d.out.Await(t, "listening on ")
	}
	return d
}

// launch starts a daemon with any standard input, and waits for nothing. Standard output and
// error are read into d.out and d.err unless a setup puts something else in their places.
func launch(t testing.TB, stdin *os.File, dir string, setups ...setup) *daemon {
	t.Helper()
	d := &daemon{t: t, cmd: hostdirtest.Command(t, impersonate+"=1"), dir: dir, exited: make(chan struct{})}
	d.cmd.Dir = dir
	if stdin != nil {
		d.cmd.Stdin = stdin
	}
	for _, s := range setups {
		s(d.cmd)
	}
	if d.cmd.Stdout == nil {
		d.out = &hostdirtest.Lines{}
		d.cmd.Stdout = d.out
	}
	if d.cmd.Stderr == nil {
		d.err = &hostdirtest.Lines{}
		d.cmd.Stderr = d.err
	}
	hostdirtest.Must(t, d.cmd.Start())
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
	hostdirtest.Must(d.t, d.cmd.Process.Signal(s))
}

// wait waits for the end of the daemon and returns its exit status, -1 after a signal.
func (d *daemon) wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(hostdirtest.Patience):
		d.cmd.Process.Signal(syscall.SIGABRT) // for its stacks
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
	hostdirtest.Await(d.t, fmt.Sprintf("the daemon to have at most %d descriptors", n), func() bool { return d.fds() <= n })
}

// hostDir returns the path of the directory of a host, without making it.
func hostDir(hosts, name string) string { return filepath.Join(hosts, hostdirtest.Entry(name)) }

func (d *daemon) hostDir(name string) string { return hostDir(d.dir, name) }

// hostPath returns the path of a file in the directory of a host, which it makes.
func (d *daemon) hostPath(name, file string) string {
	d.t.Helper()
	return hostPath(d.t, d.dir, name, file)
}

func hostPath(t testing.TB, hosts, name, file string) string {
	t.Helper()
	dir := hostDir(hosts, name)
	hostdirtest.Must(t, os.MkdirAll(dir, 0o755))
	return filepath.Join(dir, file)
}

// host makes a host and returns the listener on its tls-socket.
func (d *daemon) host(name string) *net.UnixListener {
	d.t.Helper()
	return hostdirtest.Listen(d.t, d.hostDir(name))
}

// serve makes a host with a backend, as hostdirtest.Serve does.
func (d *daemon) serve(name string, handle func(*net.UnixConn)) {
	d.t.Helper()
	hostdirtest.Serve(d.t, d.hostDir(name), handle)
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
	c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
	if err != nil {
		return nil, err
	}
	d.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	return c.(*net.TCPConn), nil
}

// exchange sends b to the daemon and returns all that comes back until the end.
func (d *daemon) exchange(b []byte) ([]byte, error) {
	c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return io.ReadAll(c)
}

// greeted reports why a client that asks for a host served by Greet is not served.
func (d *daemon) greeted(name string) error {
	got, err := d.exchange(snitest.Hello(name))
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

// isReset tells whether a connection ended with a reset.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// localAddr returns the address that the proxy must report for a connection.
func localAddr(c net.Conn) netip.AddrPort { return c.LocalAddr().(*net.TCPAddr).AddrPort() }
