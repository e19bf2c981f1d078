package main

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// awaitRefused waits until nobody listens any more where the daemon did.
func (d *daemon) awaitRefused() {
	d.t.Helper()
	hostdirtest.Await(d.t, "the port to be closed", func() bool {
		c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
		if err == nil {
			c.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// awaitFree waits until the daemon's port can be bound, and returns a listener on it.
func (d *daemon) awaitFree() (l net.Listener) {
	d.t.Helper()
	hostdirtest.Await(d.t, "the port to be free", func() bool {
		var err error
		l, err = net.Listen("tcp", d.addr)
		return err == nil
	})
	d.t.Cleanup(func() { l.Close() })
	return l
}

// expectExit waits for the end of the daemon, and fails the test unless it has the
// status and the daemon did not wait for the end of the ten seconds to cut connections.
func (d *daemon) expectExit(status int) {
	d.t.Helper()
	if got := d.wait(); got != status {
		d.t.Errorf("exit status %d, want %d", got, status)
	}
	if d.err != nil && strings.Contains(d.err.String(), "cut") {
		d.t.Errorf("connections were cut: %s", d.err)
	}
}

// running tells whether the daemon has not ended.
func (d *daemon) running() bool {
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// Goal: connections live on after a stop, new ones are not accepted, and the program
// ends with the last.
func TestStopLive(t *testing.T) {
	d := start(t)
	l := d.host("live.example")
	client1, backend1 := d.pair(l, "live.example")
	client2, backend2 := d.pair(l, "live.example")
	d.signal(syscall.SIGHUP)
	d.awaitRefused()
	ping(t, client1, backend1)
	ping(t, backend2, client2)
	client1.Close()
	if got, err := io.ReadAll(backend1); len(got) > 0 || err != nil {
		t.Errorf("the backend got %q, error %v, want the end", got, err)
	}
	backend1.Close()
	// Half of a connection is a connection.
	client2.CloseWrite()
	if got, err := io.ReadAll(backend2); len(got) > 0 || err != nil {
		t.Errorf("the backend got %q, error %v, want the end", got, err)
	}
	ping(t, backend2, client2)
	if !d.running() {
		t.Error("the daemon ended before the last connection")
	}
	backend2.Close()
	if got, err := io.ReadAll(client2); len(got) > 0 || err != nil {
		t.Errorf("the client got %q, error %v, want the end", got, err)
	}
	d.expectExit(0)
}

// Goal: a connection that is still sending its hello when the stop comes is served.
func TestStopHello(t *testing.T) {
	d := start(t)
	d.serve("late.example", hostdirtest.Greet)
	base := d.fds()
	h := snitest.Hello("late.example")
	silent, slow := d.dial(), d.dial()
	if _, err := slow.Write(h[:len(h)/2]); err != nil {
		t.Fatal(err)
	}
	hostdirtest.Await(t, "the connections to be accepted", func() bool { return d.fds() >= base+2 })
	d.signal(syscall.SIGHUP)
	d.awaitRefused()
	for c, part := range map[*net.TCPConn][]byte{silent: h, slow: h[len(h)/2:]} {
		if _, err := c.Write(part); err != nil {
			t.Error(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "this is late.example" {
			t.Errorf("the answer is %q, error %v", got, err)
		}
		c.Close()
	}
	d.expectExit(0)
}

// Goal: after a stop the port can be bound at once while connections live on, even if the listening
// socket was on descriptors 0, 1 and 2. A program that is started on the port then has it alone.
func TestStopFreesPort(t *testing.T) {
	stop := func(t *testing.T, d *daemon) {
		l := d.host("live.example")
		client, backend := d.pair(l, "live.example")
		d.signal(syscall.SIGHUP)
		next := d.awaitFree()
		for range 50 {
			accepted := make(chan error)
			go func() {
				c, err := next.Accept()
				if err == nil {
					c.Close()
				}
				accepted <- err
			}()
			d.dial().Close()
			if err := <-accepted; err != nil {
				t.Error(err)
			}
		}
		ping(t, client, backend)
		ping(t, backend, client)
		client.Close()
		backend.Close()
		d.expectExit(0)
	}
	t.Run("0", func(t *testing.T) { stop(t, start(t)) })
	t.Run("0 1 2", func(t *testing.T) { stop(t, startInetd(t)) })
}

// startInetd starts a daemon as inetd does, with the listening socket on descriptors 0,
// 1 and 2. It does not wait, since there is nothing to be seen.
func startInetd(t *testing.T) *daemon {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return startOn(t, l, hostdirtest.Dir(t), output1(f), output2(f))
}

// output1 and output2 put a file in the place of the daemon's standard output and error.
func output1(f *os.File) setup { return func(cmd *exec.Cmd) { cmd.Stdout = f } }
func output2(f *os.File) setup { return func(cmd *exec.Cmd) { cmd.Stderr = f } }

// load keeps clients coming that ask for a host served by Greet, until stop is called. The
// test fails if one of them is not served.
func (d *daemon) load(name string) (served *atomic.Int64, stop func()) {
	served = new(atomic.Int64)
	var over atomic.Bool
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for !over.Load() {
				if err := d.greeted(name); err != nil {
					d.t.Errorf("after %d connections: %v", served.Load(), err)
					return
				}
				served.Add(1)
			}
		})
	}
	return served, func() {
		over.Store(true)
		clients.Wait()
	}
}

// awaitMore waits until n more of the clients of a load were served, or one was not.
func awaitMore(t testing.TB, served *atomic.Int64, n int64) {
	t.Helper()
	goal := served.Load() + n
	hostdirtest.Await(t, "clients to be served", func() bool { return served.Load() >= goal || t.Failed() })
}

// Goal: a second copy on the same socket takes over from the first without one failure among
// thousands of connections, several times in a row.
func TestStopReplace(t *testing.T) {
	rounds, perRound := 6, int64(500)
	if testing.Short() {
		rounds, perRound = 3, 100
	}
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts)
	served, stop := d.load("a.example")
	defer stop()
	for range rounds {
		next := startOn(t, l, hosts)
		awaitMore(t, served, perRound)
		d.signal(syscall.SIGHUP)
		d.expectExit(0)
		d = next
	}
	awaitMore(t, served, perRound)
}

// Goal: a restart on the same socket, where the second copy starts only after the first has ended,
// loses no connection: clients wait in the backlog.
func TestStopRestart(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts)
	served, stop := d.load("a.example")
	defer stop()
	for range 5 {
		awaitMore(t, served, 100)
		d.signal(syscall.SIGHUP)
		d.expectExit(0)
		d = startOn(t, l, hosts)
	}
	awaitMore(t, served, 100)
}

// Goal: the program stops gracefully even while it has no descriptor left.
func TestStopWithoutDescriptors(t *testing.T) {
	d := start(t, limitFiles(64))
	d.serve("hold.example", func(c *net.UnixConn) { io.Copy(io.Discard, c) })
	clients := d.crowd(100, snitest.Hello("hold.example"))
	clients = append(clients, d.awaitFull()...)
	d.signal(syscall.SIGHUP)
	d.out.Await(t, "shutting down")
	for _, c := range clients {
		c.Close()
	}
	d.expectExit(0)
}
