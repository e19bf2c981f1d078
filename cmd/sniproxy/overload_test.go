package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// rss returns how much memory of the daemon is resident, in bytes.
func (d *daemon) rss() int {
	d.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	d.t.Fatalf("no VmRSS in %q", status)
	return 0
}

// expectGrowth fails the test if the daemon's memory has grown by more than limit since it
// was base. The race detector takes several times the memory.
func (d *daemon) expectGrowth(base, limit int) {
	d.t.Helper()
	grown := d.rss() - base
	d.t.Logf("the daemon's memory has grown by %d KiB", grown>>10)
	limit += 4 << 20 // of the runtime's own
	if raceEnabled {
		limit *= 6
	}
	if grown > limit {
		d.t.Errorf("the daemon's memory has grown by %d KiB, want at most %d", grown>>10, limit>>10)
	}
}

// cpu returns the time that the daemon has spent on processors.
func (d *daemon) cpu() time.Duration {
	d.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	// proc(5): after the name in parentheses comes field 3. Times are in units of 1/100 s.
	fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))
	var user, system int
	fmt.Sscan(fields[14-3], &user)
	fmt.Sscan(fields[15-3], &system)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// inParallel calls do n times, width at a time.
func inParallel(n, width int, do func(i int)) {
	var next atomic.Int64
	var workers sync.WaitGroup
	for range width {
		workers.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				do(int(i - 1))
			}
		})
	}
	workers.Wait()
}

// crowd connects n clients at once, each of which sends b and stays.
func (d *daemon) crowd(n int, b []byte) (clients []*net.TCPConn) {
	d.t.Helper()
	for range n {
		c := d.dial()
		if _, err := c.Write(b); err != nil && !isReset(err) {
			d.t.Fatal(err)
		}
		clients = append(clients, c)
	}
	return clients
}

// awaitFull waits until a daemon that has limitFiles(64), and a crowd of clients, has used up
// its descriptors but for those that are free for a moment after it has made room. It returns the
// clients that come meanwhile: Go may close pipes that it has kept, and then there is room again.
func (d *daemon) awaitFull() (more []*net.TCPConn) {
	d.t.Helper()
	hostdirtest.Await(d.t, "the daemon to run out of descriptors", func() bool {
		if d.allFds() >= 50 {
			return true
		}
		more = append(more, d.crowd(1, nil)...)
		return false
	})
	return more
}

// exhaust makes a daemon that has limitFiles(64) run out of descriptors, then lets it have
// them back. Connections that are relayed before stay.
func (d *daemon) exhaust() {
	d.t.Helper()
	const name = "exhaust.example"
	os.Remove(d.hostPath(name, "tls-socket"))
	d.serve(name, func(c *net.UnixConn) { io.Copy(io.Discard, c) })
	base := d.fds()
	clients := d.crowd(100, snitest.Hello(name))
	for _, c := range append(clients, d.awaitFull()...) {
		c.Close()
	}
	d.awaitFds(base)
}

// expectRest fails the test if the daemon spins. It needs some time to see that.
func (d *daemon) expectRest() {
	d.t.Helper()
	begin, used := time.Now(), d.cpu()
	<-time.After(time.Second)
	passed := time.Since(begin)
	if used = d.cpu() - used; used > passed/4 {
		d.t.Errorf("the daemon took %v of processor time within %v while nothing happened", used, passed)
	}
}

// Goal: many more clients than descriptors neither end the daemon nor make it spin. It serves on
// those whom it has begun to serve, and everybody when the crowd has left.
func TestOverloadDescriptors(t *testing.T) {
	t.Parallel() // it waits to see whether the daemon spins
	d := start(t, limitFiles(64))
	d.serve("a.example", hostdirtest.Greet)
	d.serve("echo.example", hostdirtest.Echo)
	hostdirtest.Must(t, d.greeted("a.example"))
	base := d.fds()
	var relays []*net.TCPConn
	for range 10 {
		c := d.dial()
		c.Write(snitest.Hello("echo.example"))
		ping(t, c, c)
		relays = append(relays, c)
	}
	expectRelays := func() {
		t.Helper()
		for _, c := range relays {
			ping(t, c, c)
		}
	}
	clients := d.crowd(300, snitest.Hello("echo.example"))
	clients = append(clients, d.awaitFull()...)
	expectRelays()
	d.expectRest()
	expectRelays()
	for _, c := range clients {
		c.Close()
	}
	d.awaitFds(base + 2*len(relays))
	for range 50 {
		hostdirtest.Must(t, d.greeted("a.example"))
	}
	expectRelays()
	for _, c := range relays {
		c.Close()
	}
	d.awaitFds(base)
	if !d.running() {
		t.Error("the daemon has ended")
	}
}

// Goal: of a burst of clients, the daemon serves as many as it has descriptors for. Making room for
// one does not cost all others their place.
func TestOverloadBurst(t *testing.T) {
	d := start(t, limitFiles(64))
	for range 20 {
		d.exhaust()
	}
}

// Goal: silent clients that hold all descriptors do not lock out those who say what they want,
// since the oldest silent one makes room.
func TestOverloadSilentClients(t *testing.T) {
	d := start(t, limitFiles(64))
	d.serve("a.example", hostdirtest.Greet)
	d.serve("echo.example", hostdirtest.Echo)
	base := d.fds()
	relay := d.dial()
	relay.Write(snitest.Hello("echo.example"))
	ping(t, relay, relay)
	h := snitest.Hello("a.example")
	cut := bytes.Index(h, []byte("a.example")) // what follows the name is the backend's business
	var silent []*net.TCPConn
	for _, b := range [][]byte{nil, h[:1], h[:cut]} {
		silent = append(silent, d.crowd(100, b)...)
		silent = append(d.awaitFull(), silent...)
		for range 30 {
			hostdirtest.Must(t, d.greeted("a.example"))
		}
		ping(t, relay, relay)
	}
	// The last are among those that are still waiting.
	last := silent[len(silent)-1]
	last.Write(h[cut:])
	if got, err := io.ReadAll(last); err != nil || string(got) != "this is a.example" {
		t.Errorf("the answer is %q, error %v", got, err)
	}
	for _, c := range silent {
		c.Close()
	}
	relay.Close()
	d.awaitFds(base)
}

// shortBacklog makes a host whose socket has room for few connections that wait for
// accept.
func (d *daemon) shortBacklog(name string) *net.UnixListener {
	d.t.Helper()
	l := d.host(name)
	raw, err := l.SyscallConn()
	if err != nil {
		d.t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) }); failed != nil || err != nil {
		d.t.Fatal(failed, err)
	}
	return l
}

// Goal: a backend with a backlog of 1 that gets 200 clients at once, and accepts none for a while,
// in the end serves all.
func TestOverloadBacklog(t *testing.T) {
	const clients = 200
	d := start(t)
	base := d.fds()
	l := d.shortBacklog("short.example")
	var wait sync.WaitGroup
	for range clients {
		wait.Go(func() {
			if err := d.greeted("short.example"); err != nil {
				t.Error(err)
			}
		})
	}
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.fds() >= base+clients })
	var served sync.WaitGroup
	for range clients {
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		served.Go(func() {
			defer c.Close()
			hostdirtest.Greet(c)
		})
	}
	wait.Wait()
	served.Wait()
	d.awaitFds(base)
}

// Goal: 500 clients that send a byte now and then do not hinder 500 good ones.
func TestOverloadSlowClients(t *testing.T) {
	const slow, good = 500, 500
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	base := d.fds()
	h := snitest.Hello("a.example")
	clients := d.crowd(slow, h[:1])
	over := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for i := 1; ; i++ {
			for _, c := range clients {
				c.Write(h[i : i+1])
			}
			select {
			case <-tick.C:
			case <-over:
				return
			}
		}
	})
	inParallel(good, 50, func(int) {
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
	})
	close(over)
	sending.Wait()
	// Nor were the slow ones cut.
	if got := d.fds(); got < base+slow {
		t.Errorf("the daemon has %d descriptors, want at least %d for its slow clients", got, base+slow)
	}
	for _, c := range clients {
		c.Close()
	}
	d.awaitFds(base)
}

// Goal: thousands of connections that end at every stage, in every manner, leave no descriptor
// behind.
func TestOverloadAborted(t *testing.T) {
	t.Parallel() // it waits for the ten seconds of those whose backend does not accept
	each := 400
	if testing.Short() {
		each = 40
	}
	d := start(t)
	d.serve("echo.example", hostdirtest.Echo)
	d.serve("flood.example", func(c *net.UnixConn) {
		go io.Copy(io.Discard, c)
		io.Copy(c, zeros{})
	})
	d.serve("closes.example", func(c *net.UnixConn) { hostdirtest.ReadHello(c) })
	d.serve("resets.example", func(c *net.UnixConn) { c.Read(make([]byte, 1)) })
	d.serve("ends.example", func(c *net.UnixConn) {
		c.CloseWrite()
		io.Copy(io.Discard, c)
	})
	// Those in its backlog are relays, which for all the proxy knows wait for their answer.
	full := d.shortBacklog("full.example")
	for {
		c, err := net.Dial("unix", full.Addr().String())
		if err != nil {
			break
		}
		defer c.Close()
	}
	warm := d.dial()
	warm.Write(snitest.Hello("echo.example"))
	ping(t, warm, warm)
	base := d.fds()

	send := func(c *net.TCPConn, name string) { c.Write(snitest.Hello(name)) }
	receive := func(c *net.TCPConn, n int) { io.ReadFull(c, make([]byte, n)) }
	stages := []struct {
		name  string
		reach func(c *net.TCPConn)
	}{
		{"before the hello", func(*net.TCPConn) {}},
		{"in the hello", func(c *net.TCPConn) { c.Write(snitest.Hello("echo.example")[:100]) }},
		{"end in the hello", func(c *net.TCPConn) {
			c.Write(snitest.Hello("echo.example")[:100])
			c.CloseWrite()
		}},
		{"alert on its way", func(c *net.TCPConn) { send(c, "unknown.example") }},
		{"after the alert", func(c *net.TCPConn) {
			send(c, "unknown.example")
			receive(c, 7)
		}},
		{"after the hello", func(c *net.TCPConn) { send(c, "echo.example") }},
		{"dialling", func(c *net.TCPConn) { send(c, "full.example") }},
		{"relay, idle", func(c *net.TCPConn) {
			send(c, "echo.example")
			c.Write(make([]byte, 10))
			receive(c, 10)
		}},
		{"relay, client sends", func(c *net.TCPConn) {
			send(c, "echo.example")
			c.Write(make([]byte, 200_000))
		}},
		{"relay, backend sends", func(c *net.TCPConn) {
			send(c, "flood.example")
			receive(c, 100_000)
		}},
		{"client has ended", func(c *net.TCPConn) {
			send(c, "flood.example")
			c.CloseWrite()
			receive(c, 1)
		}},
		{"backend has ended", func(c *net.TCPConn) {
			send(c, "ends.example")
			receive(c, 1)
		}},
		{"backend closes", func(c *net.TCPConn) {
			send(c, "closes.example")
			c.Write(make([]byte, 1000))
		}},
		{"backend resets", func(c *net.TCPConn) { send(c, "resets.example") }},
	}
	inParallel(each*len(stages), 50, func(i int) {
		nc, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
		if err != nil {
			t.Error(err)
			return
		}
		c := nc.(*net.TCPConn)
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
		stages[i%len(stages)].reach(c)
		if i/len(stages)%2 == 0 {
			abort(c)
		} else {
			c.Close()
		}
	})
	d.awaitFds(base)
	ping(t, warm, warm)
}

// rounds calls do, which works and is told how much, first to warm up, then for what
// counts, and fails the test unless the daemon's memory stays flat.
func (d *daemon) rounds(n int, do func(n int)) {
	d.t.Helper()
	if testing.Short() || raceEnabled {
		n /= 10
	}
	base := d.fds()
	do(n / 5)
	d.awaitFds(base)
	warm := d.rss()
	do(n)
	d.awaitFds(base)
	d.expectGrowth(warm, 0)
}

// Goal: 10,000 different unknown names and 100,000 malformed hellos leave memory flat.
func TestOverloadRefused(t *testing.T) {
	// refused ends with a reset, so that no port is lost to TIME_WAIT.
	refused := func(d *daemon, b []byte, want int) {
		nc, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
		if err != nil {
			d.t.Error(err)
			return
		}
		c := nc.(*net.TCPConn)
		defer abort(c)
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
		if _, err := c.Write(b); err != nil {
			d.t.Error(err)
			return
		}
		got := make([]byte, 7)
		if _, err := io.ReadFull(c, got); err != nil || alert(got) != want {
			d.t.Errorf("got %x, error %v, want alert %d", got, err, want)
		}
	}
	t.Run("unknown names", func(t *testing.T) {
		d := start(t)
		var serial atomic.Int64
		d.rounds(10_000, func(n int) {
			inParallel(n, 20, func(int) {
				refused(d, snitest.Hello(fmt.Sprintf("%d.example", serial.Add(1))), 112)
			})
		})
	})
	t.Run("malformed hellos", func(t *testing.T) {
		d := start(t)
		h := snitest.Hello("a.example")
		malformed := [][]byte{
			[]byte("GET / HTTP/1.1\r\n"),
			bytes.Replace(h, []byte("a.example"), []byte("a example"), 1),
			append([]byte{22, 3, 1, 0, 4, 1, 0, 0, 0}, h...),
			{22, 3, 1, 255, 255},
			append(bytes.Clone(h[:5]), 2, 0, 0, 0),
		}
		wants := []int{10, 112, 50, 22, 10}
		d.rounds(100_000, func(n int) {
			inParallel(n, 20, func(i int) {
				refused(d, malformed[i%len(malformed)], wants[i%len(malformed)])
			})
		})
	})
}

// hugeHello returns the first size bytes of what claims to be a ClientHello of 16 MiB. All
// of them are needed to get to the name.
func hugeHello(size int) []byte {
	m := snitest.ClientHello{CipherSuites: 1<<16 - 4, Extensions: func(m *snitest.Message) {
		m.Extension(snitest.Padding, make([]byte, 1<<16-5))
	}}.Build()
	m.Set(m.Lengths[0], 1<<24-1)
	return m.Stream()[:size]
}

// Goal: a hello that claims to be 16 MiB long costs the daemon at most the 64 KiB within which the
// name must come. Then the client gets its alert.
func TestOverloadHugeHello(t *testing.T) {
	const conns, size = 200, 60 << 10
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	hostdirtest.Must(t, d.greeted("a.example"))
	fds, base := d.fds(), d.rss()
	h := hugeHello(100 << 10)
	clients := d.crowd(conns, h[:size])
	hostdirtest.Await(t, "all to be read", func() bool {
		n := 0
		for _, s := range d.sockets(nil) {
			if s.unread == 0 {
				n++
			}
		}
		return n == conns
	})
	d.expectGrowth(base, conns*2*(64<<10))
	if err := d.greeted("a.example"); err != nil {
		t.Error(err)
	}
	for _, c := range clients {
		if _, err := c.Write(h[size:]); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || alert(got) != 80 {
			t.Fatalf("got %x, error %v, want alert 80", got, err)
		}
		c.Close()
	}
	d.awaitFds(fds)
}

// Goal: a connection that has moved data and is idle now costs two descriptors and memory for its
// state, but no buffers.
func TestOverloadIdle(t *testing.T) {
	const conns = 1000
	d := start(t)
	d.serve("echo.example", hostdirtest.Echo)
	var clients []*net.TCPConn
	add := func(n int) {
		for _, c := range d.crowd(n, snitest.Hello("echo.example")) {
			go c.Write(make([]byte, 100_000))
			if _, err := io.ReadFull(c, make([]byte, 100_000)); err != nil {
				t.Fatal(err)
			}
			clients = append(clients, c)
		}
	}
	fds := d.fds()
	add(10)
	base := d.rss()
	for range 10 {
		add(conns / 10)
	}
	want := fds + 2*(10+conns)
	hostdirtest.Await(t, fmt.Sprintf("the daemon to have %d descriptors", want), func() bool { return d.fds() == want })
	d.expectGrowth(base, conns*32<<10)
	for _, c := range clients {
		ping(t, c, c)
	}
}
