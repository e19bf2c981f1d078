package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// serial is how many bytes of its own a client sends behind its hello.
const serial = 8

// confirm is a backend that answers with the server name and the client's own bytes.
func confirm(c *net.UnixConn) {
	name, rest, err := hostdirtest.ReadHello(c)
	if err != nil {
		return
	}
	own := make([]byte, serial)
	n := copy(own, rest)
	if _, err := io.ReadFull(c, own[n:]); err != nil {
		return
	}
	fmt.Fprintf(c, "%s has %s", name, own)
}

// confirmedLoad keeps clients coming that ask in turn for hosts served by confirm, until stop is
// called. The test fails if one of them is not served, with the answer to what it sent.
func (d *daemon) confirmedLoad(names ...string) (served *atomic.Int64, stop func()) {
	var hellos [][]byte
	for _, name := range names {
		hellos = append(hellos, snitest.Hello(name))
	}
	served = new(atomic.Int64)
	var number atomic.Int64
	var over atomic.Bool
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for !over.Load() {
				i := number.Add(1)
				host := int(i) % len(names)
				own := fmt.Sprintf("%0*d", serial, i)
				got, err := d.exchange(append(slices.Clip(hellos[host]), own...))
				if want := names[host] + " has " + own; err != nil || string(got) != want {
					d.t.Errorf("client %d: got %q, error %v, want %q", i, got, err, want)
					return
				}
				served.Add(1)
			}
		})
	}
	return served, sync.OnceFunc(func() {
		over.Store(true)
		clients.Wait()
	})
}

// awaitRelease waits until the daemon has let go of the listening socket.
func (d *daemon) awaitRelease(l *net.TCPListener) {
	d.t.Helper()
	var st unix.Stat_t
	share(d.t, l).do(func(fd int) error { return unix.Fstat(fd, &st) })
	socket := fmt.Sprintf("socket:[%d]", st.Ino)
	dir := fmt.Sprintf("/proc/%d/fd/", d.cmd.Process.Pid)
	hostdirtest.Await(d.t, "the old copy to let go of the socket", func() bool {
		entries, err := os.ReadDir(dir)
		if err != nil {
			d.t.Fatal(err)
		}
		return !slices.ContainsFunc(entries, func(e os.DirEntry) bool {
			to, _ := os.Readlink(dir + e.Name())
			return to == socket
		})
	})
}

// Goal: while clients come all the time, the copy on a socket is replaced ten times. Not one of
// 20,000 connections fails or gets another's answer. Each old copy lets go of the socket, keeps its
// one long connection, and ends when that ends.
func TestUpgrade(t *testing.T) {
	const replacements = 10
	clients := 20_000
	if testing.Short() || raceEnabled {
		clients = 2_000
		t.Logf("scaled down to %d connections", clients)
	}
	hosts := hostdirtest.Dir(t)
	names := []string{"a.example", "b.example", "c.example"}
	for _, name := range names {
		hostdirtest.Serve(t, hostDir(hosts, name), confirm)
	}
	live := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts)
	served, stop := d.confirmedLoad(names...)
	defer stop()
	portion := int64(clients / replacements / 2)
	for i := range replacements {
		// It is alone, so it has this connection.
		client, backend := d.pair(live, "live.example")
		next := startOn(t, l, hosts)
		awaitMore(t, served, portion)
		d.signal([]syscall.Signal{syscall.SIGHUP, syscall.SIGTERM}[i%2])
		d.awaitRelease(l)
		awaitMore(t, served, portion)
		if t.Failed() {
			return
		}
		ping(t, client, backend)
		ping(t, backend, client)
		pair{client, backend}.move(t, 1<<20)
		if !d.running() {
			t.Error("the old copy ended before its last connection")
		}
		client.Close()
		if got, err := io.ReadAll(backend); len(got) > 0 || err != nil {
			t.Errorf("the backend got %q, error %v, want the end", got, err)
		}
		backend.Close()
		d.expectExit(0)
		d = next
	}
	stop()
	t.Logf("%d replacements, %d connections served, none failed", replacements, served.Load())
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
}

// Goal: a client that comes while the copy that would accept it is told to stop is served all the
// same, by that copy or the next, although nobody comes after it. The kernel wakes only one of the
// copies that wait on a socket.
func TestUpgradeLastClient(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts)
	h := snitest.Hello("a.example")
	for i := range 100 {
		next := startOn(t, l, hosts)
		c := d.dial()
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
		if _, err := c.Write(h); err != nil {
			t.Fatal(err)
		}
		d.signal(syscall.SIGHUP)
		if got, err := io.ReadAll(c); err != nil || string(got) != "this is a.example" {
			t.Fatalf("after %d replacements: got %q, error %v", i, got, err)
		}
		c.Close()
		d.expectExit(0)
		d = next
	}
}
