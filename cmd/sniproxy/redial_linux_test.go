package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// deafHost makes a host whose backend accepts nothing, and has no room for more connections.
// They are those that it returns.
func (d *daemon) deafHost(name string) (l *net.UnixListener, filling []net.Conn) {
	d.t.Helper()
	l = d.shortBacklog(name)
	l.SetUnlinkOnClose(false)
	for {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			return l, filling
		}
		d.t.Cleanup(func() { c.Close() })
		filling = append(filling, c)
	}
}

// Goal: all clients that wait for a backend whose backlog is full cost as many tries as one client,
// whatever names below a wildcard they ask for. When the backend accepts again, all are served.
func TestRedialNames(t *testing.T) {
	if raceEnabled {
		t.Skip("it counts calls; under strace with the race detector not all come in time")
	}
	t.Parallel()        // it waits
	const clients = 100 // more may take strace longer than they wait
	strace := hostdirtest.Need(t, "strace")
	log := filepath.Join(t.TempDir(), "strace")
	d := start(t, traced(strace, log, "--seccomp-bpf", "-e", "trace=connect"), oneLoop)
	l, filling := d.deafHost("*.deaf.example")
	base := d.fds()
	first := time.Now()
	told := d.askEach(clients, func(i int) string { return fmt.Sprintf("n%d.deaf.example", i) })
	tries := func() int { return countCalls(t, log)["connect"] }
	// Each may try for itself once, while the others go on.
	mostFirst := func() int { return 2*clients + 2*int(time.Since(first)/limits.Redial) }
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.fds() >= base+clients || tries() > mostFirst() })
	<-time.After(time.Second)
	before, begin := tries(), time.Now()
	if most := mostFirst(); before > most {
		t.Fatalf("%d clients made %d tries at first, want at most %d", clients, before, most)
	}
	<-time.After(time.Second)
	n := tries() - before
	// At most two tries in limits.Redial: the engines need not agree on when the time begins.
	most := 2 * int(time.Since(begin)/limits.Redial+1)
	if n > most {
		t.Fatalf("%d clients made %d tries, and then %d, want at most %d", clients, before, n, most)
	}
	t.Logf("%d clients made %d tries, and then %d, of up to %d", clients, before, n, most)
	for _, c := range filling {
		c.Close()
	}
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1024) })
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				hostdirtest.Greet(c)
			}()
		}
	}()
	for range clients {
		if got := <-told; !strings.HasPrefix(got, `"this is n`) {
			t.Errorf("a client got %s", got)
		}
	}
	d.awaitFds(base)
}

// Goal: when a backend dies for which hundreds of clients wait, all get their alert. A loop tries
// for so few of them at once that others do not wait.
func TestRedialDies(t *testing.T) {
	if isPortable(t) {
		t.Skip("the portable engine has no loops, and one client at a time tries")
	}
	if raceEnabled {
		t.Skip("it counts calls; under strace with the race detector not all come in time")
	}
	t.Parallel()
	const most = 100 // tries between two waits of a loop
	clients := 500   // more take strace longer than they wait
	if denied("unshare") {
		clients = 100 // each tries on a thread of its own at first, which takes strace long
	}
	strace := hostdirtest.Need(t, "strace")
	log := filepath.Join(t.TempDir(), "strace")
	d := start(t, traced(strace, log, "--seccomp-bpf", "-e", "trace=connect,epoll_pwait"), oneLoop)
	l, _ := d.deafHost("deaf.example")
	base := d.fds()
	h := snitest.Hello("deaf.example")
	var waiting []*net.TCPConn
	for range clients {
		waiting = append(waiting, d.crowd(1, h)...)
	}
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.counters().accepted == clients })
	// What strace has written until now are the first tries of clients that were accepted.
	before, err := os.Stat(log)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	alerts := make(map[int]int)
	for _, c := range waiting {
		got, err := io.ReadAll(c)
		c.Close()
		if err != nil {
			t.Error(err)
		}
		alerts[alert(got)]++
	}
	// On a slow machine the ten seconds of the first may be over before the last have come.
	if n := alerts[112]; n == 0 || n+alerts[80] != clients {
		t.Errorf("%d clients got these alerts: %v, want 112, or 80 before the backend died", clients, alerts)
	}
	d.awaitFds(base)
	// Where unshare(2) is denied it is not the loop that tries.
	if n := callsAtOnce(t, log, before.Size(), "connect", "epoll_pwait"); n > most && !denied("unshare") {
		t.Errorf("%d tries between two waits of a loop, want at most %d", n, most)
	}
}

// callsAtOnce returns how many calls a thread has made at most without one of another kind in
// between, from what a log of strace has behind a place.
func callsAtOnce(t *testing.T, log string, from int64, call, between string) (most int) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	made := make(map[string]int)
	for _, m := range callEntry.FindAllSubmatch(text[from:], -1) {
		thread, _, _ := bytes.Cut(m[0], []byte(" "))
		switch string(m[1]) {
		case call:
			made[string(thread)]++
			most = max(most, made[string(thread)])
		case between:
			made[string(thread)] = 0
		}
	}
	return most
}
