package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: a tenant with hundreds of hosts that take nothing of what they are handed has no more under
// way than he may, and clients of another tenant are all handed over; when his backends die, or
// take what they were handed, he can be handed connections again. Root is not refused what other
// users are.
func TestHandedShares(t *testing.T) {
	hostdirtest.NeedRoot(t)
	for name, test := range map[string]struct {
		setups []setup
		most   int
	}{
		"root":                      {nil, 256},
		"another user":              {[]setup{ordinaryUser(t), limitFiles(1100)}, 256},
		"with few descriptors":      {[]setup{ordinaryUser(t), limitFiles(400)}, 400 / 4},
		"with very few descriptors": {[]setup{ordinaryUser(t), limitFiles(160)}, 160 / 4},
	} {
		t.Run(name, func(t *testing.T) { testHandedShares(t, start(t, test.setups...), test.most) })
	}
}

func testHandedShares(t *testing.T, d *daemon, most int) {
	const hosts, clients = 100, 8
	var deaf []*net.UnixConn
	for i := range hosts {
		name := fmt.Sprintf("deaf%d.example", i)
		deaf = append(deaf, d.bindDatagram(name))
		d.give(name, greedy)
	}
	d.serveHanded("modest.example", greetHanded)
	d.give("modest.example", modest)
	var crowd []interface{ Close() error }
	for i := range hosts {
		for _, c := range d.crowd(clients, snitest.Hello(fmt.Sprintf("deaf%d.example", i))) {
			crowd = append(crowd, c)
		}
	}
	for range 100 {
		if err := d.greeted("modest.example"); err != nil {
			t.Error(err)
		}
	}
	// What the other tenant was handed is counted as well.
	if under := d.counters().handed - 100; under > most || under < most/8 {
		t.Errorf("of a tenant who takes nothing %d connections are under way, want at most %d", under, most)
	}
	for _, c := range crowd {
		c.Close()
	}
	for _, l := range deaf {
		l.Close() // with what it was handed
	}
	l := d.bindDatagram("deaf0.example")
	client := d.dial()
	client.SetDeadline(time.Now().Add(2 * hostdirtest.Patience))
	client.Write(snitest.Hello("deaf0.example"))
	c, _ := receive(t, l)
	for c.RemoteAddr().String() != client.LocalAddr().String() { // one of the crowd, who is gone
		c, _ = receive(t, l)
	}
	ping(t, client, c)
}

// Goal: clients in the queue of a backend that dies are gone with it, at once, and those behind
// them are handed over to the next one.
func TestHandedLost(t *testing.T) {
	d := start(t)
	l := d.bindDatagram("a.example")
	const clients = 30
	crowd := d.crowd(clients, snitest.Hello("a.example"))
	var c counted
	hostdirtest.Await(t, "a full queue", func() bool {
		c = d.counters()
		return c.handed > 0 && c.handed+c.waiting == clients &&
			!hostdirtest.AwaitFor(300*time.Millisecond, func() bool { return d.counters().handed > c.handed })
	})
	next, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: d.hostPath("a.example", "next"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	hostdirtest.Must(t, os.Chmod(d.hostPath("a.example", "next"), 0o777))
	hostdirtest.Must(t, os.Rename(d.hostPath("a.example", "next"), d.hostPath("a.example", "tls-socket")))
	l.Close()
	go func() {
		for {
			c, first, err := hostdirtest.Receive(next)
			if err != nil {
				return
			}
			greetHanded(c, first)
			c.Close()
		}
	}()
	lost := 0
	for _, client := range crowd {
		switch got, err := io.ReadAll(client); {
		case err == nil && string(got) == "this is a.example":
		case len(got) == 0 && (err == nil || isReset(err)): // the system has closed it
			lost++
		default:
			t.Errorf("a client got %q, error %v", got, err)
		}
	}
	if lost == 0 || lost > c.handed {
		t.Errorf("%d clients were lost, %d were in the queue of the backend that died", lost, c.handed)
	}
}

// Goal: each error of sendmsg(2) has its alert, or is tried again for ten seconds.
func TestHandedErrors(t *testing.T) {
	strace := hostdirtest.Need(t, "strace")
	t.Parallel()
	for errno, test := range map[string]struct {
		alert sni.Description
		again bool // it is tried again
	}{
		"EAGAIN":       {sni.InternalError, true},
		"ENOBUFS":      {sni.InternalError, true},
		"ETOOMANYREFS": {sni.InternalError, true},
		"ECONNREFUSED": {sni.UnrecognizedName, true},
		"EACCES":       {sni.UnrecognizedName, false},
		"EPERM":        {sni.UnrecognizedName, false},
		"EMSGSIZE":     {sni.InternalError, false},
		"EIO":          {sni.InternalError, false},
	} {
		t.Run(errno, func(t *testing.T) {
			t.Parallel()
			log := filepath.Join(t.TempDir(), "strace")
			d := start(t, traced(strace, log, "-e", "trace=sendmsg", "--inject=sendmsg:error="+errno), oneLoop)
			d.bindDatagram("a.example")
			begin := time.Now()
			d.expectAlert(snitest.Hello("a.example"), test.alert)
			took, calls := time.Since(begin), countCalls(t, log)["sendmsg"]
			if again := took > limits.Hello-time.Second; again != test.again || again != (calls > 100) {
				t.Errorf("after %d tries in %v the client was refused", calls, took)
			}
		})
		if !test.again {
			continue
		}
		t.Run(errno+" for a while", func(t *testing.T) {
			t.Parallel()
			log := filepath.Join(t.TempDir(), "strace")
			d := start(t, traced(strace, log, "-e", "trace=sendmsg", "--inject=sendmsg:error="+errno+":when=1..5"), oneLoop)
			l := d.bindDatagram("a.example")
			d.expectHanded(l, "a.example")
			if calls := countCalls(t, log)["sendmsg"]; calls < 6 {
				t.Errorf("%d tries, want more than 5", calls)
			}
		})
	}
}

// Goal: while one backend replaces another, again and again, every client is handed over, also if
// the first ends just before the daemon sends it the connection.
func TestHandedReplaced(t *testing.T) {
	strace := hostdirtest.Need(t, "strace")
	slow := "--inject=sendmsg:delay_enter=10000"
	d := start(t, traced(strace, filepath.Join(t.TempDir(), "strace"), "-e", "trace=sendmsg", slow), oneLoop)
	d.hostPath("a.example", "") // makes the directory
	listen := func() *backend.Listener {
		l, err := backend.Listen(d.hostDir("a.example"))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					name, _, _ := hostdirtest.ReadHello(c)
					io.WriteString(c, "this is "+name)
				}()
			}
		}()
		return l
	}
	l := listen()
	var served atomic.Int64
	var over atomic.Bool
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for !over.Load() {
				if err := d.greeted("a.example"); err != nil {
					t.Errorf("after %d clients: %v", served.Load(), err)
				}
				served.Add(1)
			}
		})
	}
	for range 50 {
		n := served.Load()
		hostdirtest.Await(t, "clients", func() bool { return served.Load() > n })
		next := listen()
		hostdirtest.Must(t, l.Close())
		l = next
	}
	over.Store(true)
	clients.Wait()
	l.Close()
}

// Goal: a client who is dropped in the middle of the hand-over is not handed over.
func TestHandedDroppedJustNow(t *testing.T) {
	if !isPortable(t) {
		t.Skip("a loop does nothing else in the middle of a hand-over")
	}
	strace := hostdirtest.Need(t, "strace")
	slow := "--inject=getsockname:delay_exit=50000" // for the header
	d := start(t, limitFiles(64), func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, traceable+"=1")
	})
	attach(t, strace, "-f", "-p", fmt.Sprint(d.cmd.Process.Pid), "-e", "trace=getsockname", slow)
	hostdirtest.Touch(t, d.hostPath("full.example", "send-proxy-v1"))
	testHandedDropped(t, d)
}

// Goal: a backend whose connection lingers at its end (SO_LINGER) keeps only that connection
// waiting, even if the daemon closes it last, and not the stop.
func TestHandedLingers(t *testing.T) {
	strace := hostdirtest.Need(t, "strace")
	// By the time that the daemon closes its descriptor the backend has closed its own.
	slow := "--inject=sendmsg:delay_exit=300000"
	d := start(t, traced(strace, filepath.Join(t.TempDir(), "strace"), "-e", "trace=sendmsg", slow), oneLoop, func(cmd *exec.Cmd) {
		// Otherwise a signal of Go's scheduler ends the wait.
		cmd.Env = append(cmd.Env, "GODEBUG=asyncpreemptoff=1")
	})
	l := d.bindDatagram("slow.example")
	d.serve("other.example", hostdirtest.Greet)
	client := d.dial() // which reads nothing
	client.Write(snitest.Hello("slow.example"))
	c, _ := receive(t, l)
	c.SetLinger(60)
	c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := c.Write(make([]byte, 64<<20)); err == nil {
		t.Fatal("the client's system has taken it all")
	}
	c.Close()
	for range 3 {
		if err := d.greeted("other.example"); err != nil {
			t.Error(err)
		}
	}
	d.signal(unix.SIGTERM)
	d.expectExit(0)
}

// Goal: whatever becomes of daemons under load, killed and started again on the same port,
// connections that were handed over go on, and so do those that come.
func TestHandedRestarted(t *testing.T) {
	const conns = 32
	listener := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, listener, hostdirtest.Dir(t))
	l := d.bindDatagram("stays.example")
	d.serveHanded("a.example", greetHanded)
	pairs := make([][2]net.Conn, conns)
	for i := range pairs {
		client := d.dial()
		client.Write(snitest.Hello("stays.example"))
		c, _ := receive(t, l)
		pairs[i] = [2]net.Conn{client, c}
	}
	var killing, over atomic.Bool
	var served atomic.Int64
	var load sync.WaitGroup
	for range 8 {
		load.Go(func() {
			for !over.Load() {
				before := killing.Load()
				switch err := d.greeted("a.example"); {
				case err == nil:
					served.Add(1)
				case !before && !killing.Load(): // nobody's hello was in a daemon that is no more
					t.Errorf("a client of the load: %v", err)
				}
			}
		})
	}
	for range 4 {
		n := served.Load() + 100
		hostdirtest.Await(t, "clients to be served", func() bool { return served.Load() > n })
		killing.Store(true)
		d.cmd.Process.Kill()
		<-d.exited
		for _, p := range pairs {
			ping(t, p[0], p[1])
			ping(t, p[1], p[0])
		}
		d2 := startOn(t, listener, d.dir)
		n = served.Load() + 100
		hostdirtest.Await(t, "clients to be served again", func() bool { return served.Load() > n })
		killing.Store(false)
		d.cmd, d.exited = d2.cmd, d2.exited
	}
	over.Store(true)
	load.Wait()
	for _, p := range pairs {
		ping(t, p[0], p[1])
	}
}

// Goal: connections that were handed over cost the daemon nothing, also if their hellos came in
// several segments, and go on when it is killed.
func TestHandedAlone(t *testing.T) {
	const conns = 64
	d := start(t, oneLoop)
	l := d.bindDatagram("a.example")
	pairs := make([][2]net.Conn, conns)
	for i := range pairs {
		client := d.dial()
		h := snitest.Hello("a.example")
		client.Write(h[:20])
		hostdirtest.Await(t, "the daemon to have read a part", func() bool { return d.counters().waiting == 1 })
		client.Write(h[20:])
		c, first := receive(t, l)
		if rest := make([]byte, len(h)-len(first)); len(rest) > 0 {
			io.ReadFull(c, rest)
		}
		pairs[i] = [2]net.Conn{client, c}
	}
	hostdirtest.Await(t, "the daemon to fall asleep", func() bool { return d.counters().descriptors < conns && d.asleep() })
	used, woken := d.cpu(), d.switches()
	const rounds = 50
	for range rounds {
		for _, p := range pairs {
			ping(t, p[0], p[1])
			ping(t, p[1], p[0])
		}
	}
	// Each thing that is told of one of them would wake the loop. Timers may, a few times.
	if woken = d.switches() - woken; woken > rounds*conns/10 {
		t.Errorf("the daemon was woken %d times by connections that it has handed over", woken)
	}
	// The clock of processor time ticks each hundredth of a second; the daemon's runtime may take
	// one.
	if used = d.cpu() - used; used > 20*time.Millisecond {
		t.Errorf("the daemon took %v of processor time for connections that it has handed over", used)
	}
	d.cmd.Process.Kill()
	<-d.exited
	for _, p := range pairs {
		ping(t, p[0], p[1])
	}
}

// switches returns how often threads of the daemon have gone to sleep, or were interrupted.
func (d *daemon) switches() (n int) {
	d.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.cmd.Process.Pid))
	if err != nil || len(files) == 0 {
		d.t.Fatalf("no threads of the daemon in /proc, error %v", err)
	}
	for _, name := range files {
		status, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(status)) {
			if _, count, ok := strings.Cut(line, "voluntary_ctxt_switches:"); ok {
				i, err := strconv.Atoi(strings.TrimSpace(count))
				hostdirtest.Must(d.t, err)
				n += i
			}
		}
	}
	return n
}

// Goal: a tenant who remembers the daemon to hand over, and then has stream sockets, takes no room
// that is kept for clients who wait; and idle senders make room before anybody is dropped.
func TestHandedRoom(t *testing.T) {
	hostdirtest.NeedRoot(t)
	const hosts = 60
	d := start(t, limitFiles(100), oneLoop)
	names := make([]string, hosts)
	for i := range names {
		names[i] = fmt.Sprintf("h%d.example", i)
		l := d.bindDatagram(names[i])
		d.give(names[i], greedy)
		d.expectHanded(l, names[i])
		l.Close()
	}
	for _, name := range names {
		os.Remove(d.hostPath(name, "tls-socket"))
		d.serve(name, hostdirtest.Echo)
	}
	for _, name := range names {
		d.crowd(1, snitest.Hello(name))
	}
	hostdirtest.Await(t, "clients to wait for room", func() bool { c := d.counters(); return c.open-c.waiting > 20 && c.waiting > 0 })
	most := 36
	if isPortable(t) {
		most = 45 // clients that come at once may all find room there
	}
	if c := d.counters(); c.open-c.waiting > most {
		t.Errorf("%d relays with 100 descriptors: they have taken what is kept for clients who wait", c.open-c.waiting)
	}
}

// Goal: sockets to send with, which have nothing to do, are closed before anybody loses a
// connection to make room, and count among what relays leave to those who wait.
func TestHandedIdle(t *testing.T) {
	const limit, reserve = 100, 16
	d := start(t, limitFiles(limit), oneLoop)
	d.serve("rich.example", hostdirtest.Echo)
	d.serve("poor.example", hostdirtest.Echo)
	var names []string
	for i := range limit {
		names = append(names, fmt.Sprintf("h%d.example", i)) // each is a tenant by itself
		d.serveHanded(names[i], greetHanded)
	}
	d.crowd(20, snitest.Hello("rich.example"))
	hostdirtest.Await(t, "relays", func() bool { c := d.counters(); return c.open == 20 && c.waiting == 0 })
	for _, name := range names {
		if d.fds() >= limit-reserve-8 {
			break
		}
		if err := d.greeted(name); err != nil {
			t.Error(err)
		}
	}
	for range 5 {
		client := d.dial()
		client.Write(append(snitest.Hello("poor.example"), '!'))
		if b := make([]byte, 1); readFull(client, b) != "!" {
			t.Errorf("a client got %q", b)
		}
		if c := d.counters(); c.descriptors > limit-reserve {
			t.Errorf("the counters are %+v: a relay has taken what is kept for clients who wait", c)
		}
	}
	if c := d.counters(); c.dropped > 0 || c.open != 25 {
		t.Errorf("the counters are %+v: somebody has lost a connection to sockets that do nothing", c)
	}
}

// Goal: a look-up that hangs after its thread has handed connections over ends no more than itself.
func TestHandedThenStuck(t *testing.T) {
	strace := hostdirtest.Need(t, "strace")
	// Four clients who are handed over take at most eight calls. Those after them take long, and
	// are to find the entries of names that have none.
	slow := "--inject=openat2:delay_exit=400000:when=9+"
	d := start(t, traced(strace, filepath.Join(t.TempDir(), "strace"), "-e", "trace=openat2", slow), oneLoop)
	d.serveHanded("a.example", greetHanded)
	for range 4 {
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
	}
	for i := range 5 {
		d.expectAlert(snitest.Hello(fmt.Sprintf("absent%d.example", i)), sni.UnrecognizedName)
	}
}

// Goal: while clients wait for a place in a queue, those who come after them do not try, but wait
// behind them: each try in vain costs as much as a hand-over.
func TestHandedInLine(t *testing.T) {
	if isPortable(t) || !anyName {
		t.Skip("where other threads make the look-ups, each client tries once")
	}
	if raceEnabled {
		t.Skip("it counts calls; under strace with the race detector not all come in time")
	}
	strace := hostdirtest.Need(t, "strace")
	log := filepath.Join(t.TempDir(), "strace")
	d := start(t, traced(strace, log, "--seccomp-bpf", "-e", "trace=sendmsg"), oneLoop)
	d.bindDatagram("deaf.example")
	const clients = 500
	begin := time.Now()
	d.crowd(clients, snitest.Hello("deaf.example"))
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.counters().accepted == clients })
	n := countCalls(t, log)["sendmsg"]
	// Those that the queue takes, those of a pause that doubles, and then one in each
	// limits.Redial.
	if most := 50 + int(time.Since(begin)/limits.Redial); n > most {
		t.Errorf("%d clients made %d tries, want at most %d", clients, n, most)
	}
}
