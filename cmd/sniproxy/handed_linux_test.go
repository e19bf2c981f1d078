package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: a tenant with hundreds of hosts that take nothing of what they are handed has no more under way
// than he may, and clients of another tenant are all handed over; when his backends die, or take what
// they were handed, he can be handed connections again.
func TestHandedShares(t *testing.T) {
	hostdirtest.NeedRoot(t)
	const hosts, clients = 100, 8
	d := start(t)
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
	most := 0
	for range 100 {
		if err := d.greeted("modest.example"); err != nil {
			t.Error(err)
		}
		if c := d.counters(); c.handed > most {
			most = c.handed
		}
	}
	// What the other tenant was handed is counted as well.
	if under := most - 100; under > 256 || under < 32 {
		t.Errorf("of a tenant who takes nothing %d connections are under way", under)
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
	ping(t, client, c)
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
	used := d.cpu()
	for range 50 {
		for _, p := range pairs {
			ping(t, p[0], p[1])
			ping(t, p[1], p[0])
		}
	}
	// The clock of processor time ticks each hundredth of a second; the daemon's runtime may take one.
	if used = d.cpu() - used; used > 20*time.Millisecond {
		t.Errorf("the daemon took %v of processor time for connections that it has handed over", used)
	}
	d.cmd.Process.Kill()
	<-d.exited
	for _, p := range pairs {
		ping(t, p[0], p[1])
	}
}

// Goal: a tenant who remembers the daemon to hand over, and then has stream sockets, takes no room that
// is kept for clients who wait; and idle senders make room before anybody is dropped.
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

// Goal: a look-up that hangs after its thread has handed connections over ends no more than itself.
func TestHandedThenStuck(t *testing.T) {
	strace := hostdirtest.Need(t, "strace")
	// Four clients who are handed over take at most eight calls. Those after them take long, and are to
	// find the entries of names that have none.
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

// Goal: while clients wait for a place in a queue, those who come after them do not try, but wait behind
// them: each try in vain costs as much as a hand-over.
func TestHandedInLine(t *testing.T) {
	if isPortable(t) {
		t.Skip("each client of the portable engine tries once")
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
	// Those that the queue takes, those of a pause that doubles, and then one in each limits.Redial.
	if most := 50 + int(time.Since(begin)/limits.Redial); n > most {
		t.Errorf("%d clients made %d tries, want at most %d", clients, n, most)
	}
}
