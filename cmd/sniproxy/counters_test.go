package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// counted is what a line of counters says.
type counted struct {
	accepted, open, waiting int
	refused                 string // how many with which alert, as in the line
	dropped                 int
	up, down                int
	descriptors, limit      int
	handed, empty           int
}

var countersLine = regexp.MustCompile(`^sniproxy: accepted (\d+), open (\d+), waiting (\d+), ` +
	`refused (\d+)(?: \(((?:\d+|none): \d+(?:, (?:\d+|none): \d+)*)\))?, dropped (\d+), ` +
	`bytes up (\d+), bytes down (\d+), descriptors (\d+) of (\d+), handed (\d+), empty (\d+)$`)

// parseCounters parses a line of counters. The test fails if it is not well-formed, or if what it
// says cannot be.
func parseCounters(t testing.TB, line string) (c counted) {
	t.Helper()
	m := countersLine.FindStringSubmatch(line)
	if m == nil {
		t.Fatalf("not a line of counters: %q", line)
	}
	var refused int
	for i, n := range map[int]*int{1: &c.accepted, 2: &c.open, 3: &c.waiting, 4: &refused, 6: &c.dropped,
		7: &c.up, 8: &c.down, 9: &c.descriptors, 10: &c.limit, 11: &c.handed, 12: &c.empty} {
		var err error
		if *n, err = strconv.Atoi(m[i]); err != nil {
			t.Errorf("%v in %q", err, line)
		}
	}
	c.refused = m[5]
	sum, last := 0, -1
	for alert, n := range c.alerts() {
		sum += n
		if alert <= last || n == 0 {
			t.Errorf("the alerts are in no order, or too many: %q", line)
		}
		last = alert
	}
	if sum != refused || c.waiting > c.open || c.open > c.accepted || refused > c.accepted || c.dropped > c.accepted || c.handed > c.accepted || c.empty > c.accepted || c.descriptors > c.limit {
		t.Errorf("the numbers do not fit each other: %q", line)
	}
	return c
}

// alerts yields the alerts, 256 for none, and how many clients were refused with each.
func (c counted) alerts() func(yield func(alert, n int) bool) {
	return func(yield func(alert, n int) bool) {
		for _, part := range strings.Split(c.refused, ", ") {
			var alert, n int
			if k, _ := fmt.Sscanf(strings.Replace(part, "none", "256", 1), "%d: %d", &alert, &n); k == 2 && !yield(alert, n) {
				return
			}
		}
	}
}

// told returns all lines of counters that the daemon has printed.
func (d *daemon) told() (told []string) {
	for line := range strings.Lines(d.err.String()) {
		if whole, ended := strings.CutSuffix(line, "\n"); ended && strings.HasPrefix(whole, "sniproxy: accepted ") {
			told = append(told, whole)
		}
	}
	return told
}

// counters asks the daemon for its counters.
func (d *daemon) counters() counted {
	d.t.Helper()
	before := len(d.told())
	d.signal(syscall.SIGUSR1)
	var told []string
	hostdirtest.Await(d.t, "a line of counters", func() bool {
		told = d.told()
		return len(told) > before
	})
	if n := len(told) - before; n != 1 {
		d.t.Errorf("%d lines for one signal", n)
	}
	return parseCounters(d.t, told[len(told)-1])
}

// awaitCounters waits for the counters to be as wanted, but for those of descriptors. What a peer
// has just received is counted a moment later.
func (d *daemon) awaitCounters(want counted) {
	d.t.Helper()
	hostdirtest.Await(d.t, fmt.Sprintf("the counters to be %+v", want), func() bool {
		got := d.counters()
		got.descriptors, got.limit = 0, 0
		return got == want
	})
}

// awaitCounted waits for the counters to be as ok wants them, and returns them. They are not
// counted at one moment.
func (d *daemon) awaitCounted(what string, ok func(counted) bool) (got counted) {
	d.t.Helper()
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		got = d.counters()
		return ok(got)
	}) {
		d.t.Fatalf("waited in vain for %s; the counters are %+v", what, got)
	}
	return got
}

// Goal: the daemon counts a connection when it accepts it, as waiting until it has a backend, and
// as open until it ends. It counts all bytes of the two peers, and no others.
func TestCountersConnections(t *testing.T) {
	d := start(t)
	var want counted
	d.awaitCounters(want)
	h := snitest.Hello("good.example")
	d.serve("good.example", hostdirtest.Greet)
	const answer = "this is good.example"
	for range 7 {
		hostdirtest.Must(t, d.greeted("good.example"))
		want.accepted++
		want.up += len(h)
		want.down += len(answer)
	}
	d.awaitCounters(want)

	// The header is not the client's.
	d.serve("headed.example", headed)
	hostdirtest.Touch(t, d.hostPath("headed.example", "send-proxy-v1"))
	hostdirtest.Must(t, d.greeted("headed.example"))
	want.accepted++
	want.up += len(snitest.Hello("headed.example"))
	want.down += len("this is headed.example")
	d.awaitCounters(want)

	// One that says nothing yet, one that has begun, and one whose backend has no room.
	silent, begun := d.dial(), d.dial()
	begun.Write(h[:40])
	l := d.shortBacklog("full.example")
	var room []*net.UnixConn
	for {
		c, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
		if err != nil {
			break
		}
		defer c.Close()
		room = append(room, c)
	}
	full := d.dial()
	fullHello := snitest.Hello("full.example")
	full.Write(fullHello)
	want.accepted += 3
	want.open, want.waiting = 3, 3
	d.awaitCounters(want)
	begun.Write(h[40:])
	if got, err := io.ReadAll(begun); err != nil || string(got) != answer {
		t.Fatalf("got %q, error %v", got, err)
	}
	begun.Close()
	want.open, want.waiting = 2, 2
	want.up += len(h)
	want.down += len(answer)
	d.awaitCounters(want)

	// It is a relay as soon as there is room, and one that has ended in the middle of nothing
	// was not refused.
	for _, c := range room {
		c.Close()
	}
	for got := make([]byte, len(fullHello)); ; {
		b, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(b, got); err == nil {
			defer b.Close()
			break
		}
		b.Close() // one of those that took the room
	}
	want.waiting = 1
	want.up += len(fullHello)
	d.awaitCounters(want)
	abort(silent)
	want.open, want.waiting = 1, 0
	want.empty = 1 // it has said nothing
	d.awaitCounters(want)
	abort(full)
	want.open = 0
	d.awaitCounters(want)
}

// Goal: each refused client is counted once, with its alert, and no longer as waiting. It is open
// until it goes.
func TestCountersRefused(t *testing.T) {
	t.Parallel() // it waits for the ten seconds of a client
	d := start(t)
	var want counted
	good := snitest.Named("a.example").Stream()
	for _, c := range []struct {
		sent    []byte
		times   int
		refused string
	}{
		{snitest.ClientHello{}.Build().Stream(), 3, "112: 3"},
		{snitest.Hello("unknown.example"), 2, "112: 5"},
		{[]byte("GET / HTTP/1.1\r\n\r\n"), 1, "10: 1, 112: 5"},
		{[]byte{22, 3, 1, 0xff, 0xff}, 1, "10: 1, 22: 1, 112: 5"},
		{good[:20], 4, "10: 1, 22: 1, 50: 4, 112: 5"},
		{hello64K(1), 2, "10: 1, 22: 1, 50: 4, 80: 2, 112: 5"},
	} {
		for range c.times {
			if got, err := d.tell(c.sent, len(c.sent), true); err != nil || alert(got) < 0 {
				t.Errorf("got %x, error %v, want an alert", got, err)
			}
			want.accepted++
		}
		want.refused = c.refused
		d.awaitCounters(want)
	}

	stays := d.dial()
	stays.Write(snitest.Hello("unknown.example"))
	if _, err := io.ReadFull(stays, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	want.accepted++
	want.refused = "10: 1, 22: 1, 50: 4, 80: 2, 112: 6"
	hostdirtest.Await(t, "the refused client to be open, but not to be waiting", func() bool {
		got := d.counters()
		return got.accepted == want.accepted && got.waiting == 0 && got.refused == want.refused
	})
	stays.Close()
	d.awaitCounters(want)

	if testing.Short() {
		return
	}
	silent := d.dial()
	want.accepted++
	want.open, want.waiting = 1, 1
	d.awaitCounters(want)
	if got, err := io.ReadAll(silent); err != nil || alert(got) != 90 {
		t.Errorf("got %x, error %v, want alert 90", got, err)
	}
	silent.Close()
	want.open, want.waiting = 0, 0
	want.refused = "10: 1, 22: 1, 50: 4, 80: 2, 90: 1, 112: 6"
	d.awaitCounters(want)
}

// Goal: each client that is dropped to make room is counted, and no other. The descriptors in use
// are those that the system shows, even when none are left.
func TestCountersDropped(t *testing.T) {
	const limit, silent = 64, 200
	d := start(t, limitFiles(limit))
	d.serve("echo.example", hostdirtest.Echo)
	relay := openEcho(t, d, "echo.example")
	clients := d.crowd(silent, nil)
	got := d.awaitCounted("all clients to be accepted, and some of them dropped", func(c counted) bool {
		return c.accepted == silent+1 && c.dropped > 0 && c.open == silent+1-c.dropped && c.waiting == c.open-1
	})
	if got.limit != limit || got.descriptors < limit/2 {
		t.Errorf("%d of %d descriptors are in use, want many of %d", got.descriptors, got.limit, limit)
	}
	d.expectDescriptors()
	relay.works()
	for _, c := range clients {
		c.Close()
	}
	// The last one that was accepted may have made room a moment later.
	least := got.dropped
	got = d.awaitCounted("all silent clients to be gone", func(c counted) bool { return c.open == 1 })
	if got.dropped < least {
		t.Errorf("%d were dropped, and then %d", least, got.dropped)
	}
	up := len(snitest.Hello("echo.example")) + 2*len("is anybody there?")
	d.awaitCounters(counted{
		accepted: silent + 1,
		open:     1,
		empty:    silent - got.dropped,
		dropped:  got.dropped,
		up:       up,
		down:     up - len(snitest.Hello("echo.example")),
	})
	d.expectDescriptors()
	hostdirtest.Await(t, "the log to tell of those that were dropped", func() bool {
		refused, leftOut, others := notices(d.err.String())
		lines := len(refused) + leftOut
		for _, line := range others {
			if strings.HasPrefix(line, "sniproxy: dropped ") {
				lines++
			}
		}
		return lines == got.dropped
	})

	// One that was refused already, and makes room, is not counted as dropped too.
	const refused = 40
	for _, c := range d.crowd(refused, []byte("GET / HTTP/1.1\r\n\r\n")) {
		if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
			t.Fatal(err)
		}
	}
	d.crowd(silent, nil)
	dropped := got.dropped
	d.awaitCounted("all clients to be accepted, and only silent ones dropped", func(c counted) bool {
		return c.accepted == 1+silent+refused+silent && c.dropped-dropped+c.waiting == silent && c.refused == fmt.Sprintf("10: %d", refused)
	})
}

// expectDescriptors waits for the daemon to say that it has as many descriptors as it has.
func (d *daemon) expectDescriptors() {
	d.t.Helper()
	hostdirtest.Await(d.t, "the counted descriptors to be those in use", func() bool {
		got := d.counters()
		return got.descriptors == d.fdsBelow(got.limit)
	})
}

// fdsBelow returns how many descriptors with a number below n the daemon has open. It may have
// inherited others.
func (d *daemon) fdsBelow(n int) (count int) {
	d.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd < n {
			count++
		}
	}
	return count
}

// Goal: a connection is open, and not waiting, until both directions have ended, however they end.
// What it moved until then is counted.
func TestCountersEnds(t *testing.T) {
	d := start(t)
	l := d.host("a.example")
	var want counted
	open := func() (client *net.TCPConn, backend *net.UnixConn) {
		t.Helper()
		client, backend = d.pair(l, "a.example")
		want.accepted++
		want.open++
		want.up += len(snitest.Hello("a.example"))
		d.awaitCounters(want)
		return client, backend
	}
	ended := func() {
		t.Helper()
		want.open--
		d.awaitCounters(want)
	}
	const word = len("are you there?") // that of ping

	client, backend := open()
	client.CloseWrite()
	if _, err := io.ReadAll(backend); err != nil {
		t.Fatal(err)
	}
	ping(t, backend, client)
	want.down += word
	d.awaitCounters(want)
	backend.Close()
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	client.Close()
	ended()

	client, backend = open()
	backend.CloseWrite()
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	ping(t, client, backend)
	want.up += word
	d.awaitCounters(want)
	client.Close()
	backend.Close()
	ended()

	client, backend = open()
	ping(t, client, backend)
	want.up += word
	d.awaitCounters(want)
	abort(client)
	ended()
	backend.Close()

	// What a backend does not read any more is not counted.
	client, backend = open()
	ping(t, backend, client)
	want.down += word
	backend.CloseRead()
	client.Write(make([]byte, 1000))
	ping(t, backend, client) // it may still say something
	want.down += word
	d.awaitCounters(want)
	backend.Close()
	if got, err := io.ReadAll(client); err != nil {
		t.Errorf("got %q, error %v, want the end", got, err)
	}
	client.Close()
	ended()
}

// Goal: bulk both ways at once is counted to the byte, also with a header in front. While the
// backend does not read, only what it was sent is counted.
func TestCountersBulk(t *testing.T) {
	const size = 24 << 20
	for _, marker := range []bool{false, true} {
		t.Run(fmt.Sprintf("header %v", marker), func(t *testing.T) {
			d := start(t)
			l := d.host("bulk.example")
			if marker {
				hostdirtest.Touch(t, d.hostPath("bulk.example", "send-proxy-v1"))
			}
			client := d.dial()
			sent := append(snitest.Hello("bulk.example"), randomBytes(size)...)
			var work sync.WaitGroup
			work.Go(func() {
				client.Write(sent)
				client.CloseWrite()
			})
			backend, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			defer backend.Close()
			var last counted
			hostdirtest.Await(t, "the flow to stand still", func() bool {
				before := last
				last = d.counters()
				return last.up > 0 && last == before
			})
			if last.up >= size || last.down != 0 {
				t.Errorf("the counters are %+v while the backend does not read", last)
			}

			answer := randomBytes(size + 1)
			work.Go(func() {
				backend.Write(answer)
				backend.CloseWrite()
			})
			work.Go(func() {
				if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, answer) {
					t.Errorf("the client got %d bytes, error %v, want %d", len(got), err, len(answer))
				}
			})
			got, err := io.ReadAll(backend)
			header := len(got) - len(sent)
			if err != nil || header < 0 || !bytes.Equal(got[header:], sent) || marker != bytes.HasPrefix(got, []byte("PROXY ")) {
				t.Errorf("the backend got %d bytes, error %v, want %d", len(got), err, len(sent))
			}
			work.Wait()
			client.Close()
			backend.Close()
			d.awaitCounters(counted{accepted: 1, up: len(sent), down: len(answer)})
		})
	}
}

// Goal: asking for counters under load costs no client anything, and no counter goes back. Asking
// too often does no harm.
func TestCountersLoad(t *testing.T) {
	d := start(t)
	d.serve("good.example", hostdirtest.Greet)
	served, stop := d.load("good.example")
	defer stop()
	var last counted
	for i := range 100 {
		if i%10 == 0 {
			d.expectAlert(snitest.Hello("unknown.example"), 112)
		}
		now := d.counters()
		if now.accepted < last.accepted || now.dropped < last.dropped || now.up < last.up || now.down < last.down {
			t.Fatalf("the counters went from %+v to %+v", last, now)
		}
		refused := map[int]int{}
		for alert, n := range now.alerts() {
			refused[alert] = n
		}
		for alert, n := range last.alerts() {
			if refused[alert] < n {
				t.Fatalf("the counters went from %+v to %+v", last, now)
			}
		}
		last = now
	}
	for range 10_000 {
		d.signal(syscall.SIGUSR1)
	}
	awaitMore(t, served, 20)
	stop()
	h := len(snitest.Hello("good.example"))
	n := int(served.Load())
	hostdirtest.Await(t, "the counters to be those of all clients", func() bool {
		// The answer to an earlier signal may be late.
		d.signal(syscall.SIGUSR1)
		told := d.told()
		got := parseCounters(t, told[len(told)-1])
		return got.accepted == n+10 && got.open == 0 && got.refused == "112: 10" && got.up == n*h && got.down == n*len("this is good.example")
	})
}

// Goal: the counters can be asked for at any time: before the program listens, while connections
// are open after a stop, and where the answer cannot be written. Asking never ends the program.
func TestCountersAnyTime(t *testing.T) {
	t.Run("start", func(t *testing.T) {
		for range 10 {
			f := socketFile(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"))
			d := launch(t, f, hostdirtest.Dir(t))
			hostdirtest.Await(t, "the daemon to take signals", func() bool { return d.catches(syscall.SIGUSR1) })
			hostdirtest.Await(t, "the daemon to listen", func() bool {
				d.signal(syscall.SIGUSR1)
				return strings.Contains(d.out.String(), "listening on ")
			})
			hostdirtest.Await(t, "a line of counters", func() bool { return len(d.told()) > 0 })
			d.signal(syscall.SIGHUP)
			d.expectExit(0)
		}
	})
	t.Run("stop", func(t *testing.T) {
		d := start(t)
		d.serve("echo.example", hostdirtest.Echo)
		relay := openEcho(t, d, "echo.example")
		waiting := d.dial()
		hostdirtest.Await(t, "the client to be accepted", func() bool { return d.counters().accepted == 2 })
		d.signal(syscall.SIGHUP)
		d.out.Await(t, "shutting down")
		for range 5 {
			if got := d.counters(); got.accepted != 2 || got.open != 2 || got.waiting != 1 {
				t.Errorf("the counters are %+v", got)
			}
			relay.works()
		}
		waiting.Close()
		hostdirtest.Await(t, "one connection to be left", func() bool { return d.counters().open == 1 })
		relay.works()
		relay.Close()
		// Until there is nobody to signal any more.
		for d.cmd.Process.Signal(syscall.SIGUSR1) == nil && d.running() {
		}
		d.expectExit(0)
	})
	t.Run("nowhere to write", func(t *testing.T) {
		_, w := openPipe(t)
		fill(t, w)
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		for _, d := range []*daemon{startInetd(t), startOn(t, l, hostdirtest.Dir(t), output2(w))} {
			d.serve("good.example", hostdirtest.Greet)
			hostdirtest.Must(t, d.greeted("good.example"))
			for range 1000 {
				d.signal(syscall.SIGUSR1)
			}
			if err := d.greeted("good.example"); err != nil {
				t.Error(err)
			}
			d.signal(syscall.SIGHUP)
			if status := d.wait(); status != 0 {
				t.Errorf("exit status %d, want 0", status)
			}
		}
	})
}

// catches tells whether the daemon, not the shell or the test that became it, handles a signal.
// Before that the system would end any program.
func (d *daemon) catches(s syscall.Signal) bool {
	d.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "SigCgt:"); ok {
			caught, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				d.t.Fatal(err)
			}
			return caught&(1<<(s-1)) != 0
		}
	}
	return false
}

// Goal: relays that loops move to each other all the time are counted once, at any moment, and
// so is each of their bytes.
func TestCountersShared(t *testing.T) {
	const relays, rounds = 30, 200
	d := start(t, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "SNIPROXY_TEST_SHARE=1", "GOMAXPROCS=3")
	})
	d.serve("echo.example", hostdirtest.Echo)
	h := snitest.Hello("echo.example")
	clients := d.crowd(relays, h)
	d.awaitCounters(counted{accepted: relays, open: relays, up: relays * len(h)})
	var load sync.WaitGroup
	sum := 0
	for i, c := range clients {
		want := randomBytes(100 + i*i*60) // some are bulk
		sum += rounds * len(want)
		got := make([]byte, len(want))
		load.Go(func() {
			for range rounds {
				go c.Write(want)
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
					t.Errorf("what came back is not what was sent, error %v", err)
					return
				}
			}
		})
	}
	over := make(chan struct{})
	go func() {
		load.Wait()
		close(over)
	}()
	var last counted
	for more := true; more; {
		select {
		case <-over:
			more = false
		default:
		}
		now := d.counters()
		if now.accepted != relays || now.open != relays || now.waiting != 0 || now.up < last.up || now.down < last.down {
			t.Fatalf("the counters went from %+v to %+v", last, now)
		}
		last = now
	}
	d.awaitCounters(counted{accepted: relays, open: relays, up: relays*len(h) + sum, down: sum})
	for _, c := range clients {
		c.Close()
	}
	d.awaitCounters(counted{accepted: relays, up: relays*len(h) + sum, down: sum})
}
