package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

var (
	acceptedCall = regexp.MustCompile(`^\d+ +(<\.\.\. )?accept4[( ].* = \d+`)
	readCall     = regexp.MustCompile(`^\d+ +read\(`)
)

// readsAtAccepts returns how many reads a daemon had made at each connection that it accepted, from
// a log of strace.
func readsAtAccepts(t *testing.T, log string) (at []int) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	reads := 0
	for line := range strings.Lines(string(text)) {
		switch {
		case readCall.MatchString(line):
			reads++
		case acceptedCall.MatchString(line):
			at = append(at, reads)
		}
	}
	return at
}

// Goal: clients that wait to be accepted do not wait for all busy relays: a loop that comes back to
// its work handles at most two full batches of events between two accepts, however many relays
// there are.
func TestSaturatedAccept(t *testing.T) {
	const batch, waiting = 128, 20
	relays := descriptorsFor(t, 1000)
	log := filepath.Join(t.TempDir(), "strace")
	d := start(t, traced(hostdirtest.Need(t, "strace"), log, "-e", "trace=accept4,read"), oneLoop)
	d.serve("echo.example", hostdirtest.Echo)
	clients := d.crowd(relays, snitest.Hello("echo.example"))
	for _, c := range clients {
		ping(t, c, c)
	}
	before := len(readsAtAccepts(t, log))

	d.signal(syscall.SIGSTOP)
	hostdirtest.Await(t, "the daemon to stop", d.stopped)
	d.crowd(waiting, nil) // which is told of first
	for _, c := range clients {
		say(t, c, []byte("a"))
	}
	d.signal(syscall.SIGCONT)
	for _, c := range clients {
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	var at []int
	hostdirtest.Await(t, "all to be accepted", func() bool {
		at = readsAtAccepts(t, log)[before:]
		return len(at) >= waiting
	})
	most := 0
	for i := range waiting - 1 {
		most = max(most, at[i+1]-at[i])
	}
	t.Logf("up to %d reads between two clients that were accepted, beside %d relays", most, relays)
	// Each event is a read at most, and then one that finds that there is no more; and there are
	// the other sides of these relays.
	if limit := 3 * batch; most > limit {
		t.Errorf("%d reads between two clients that were accepted, beside %d relays, want at most %d", most, relays, limit)
	}
}

// stopped tells whether all threads of the daemon have stopped.
func (d *daemon) stopped() bool { return d.allInState("Tt") }
