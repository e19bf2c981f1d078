package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
)

// leastFiles and mostFiles are limits of descriptors (ulimit -n) between which all are tried. With the
// lowest the program is reached, since Go's runtime opens none of its own before the first timer is
// set; then it needs some, and ends the program without them.
const leastFiles, mostFiles = 4, 40

// Goal: with however few descriptors, the daemon either exits with 1 and one line that says how many it
// takes, or it serves; with as many as the line says, it serves.
func TestScarceDescriptors(t *testing.T) {
	t.Parallel()
	var lines [mostFiles + 1]string // what it said when it did not serve
	inParallel(mostFiles+1-leastFiles, 12, func(i int) {
		t.Run(fmt.Sprint(leastFiles+i), func(t *testing.T) { lines[leastFiles+i] = tryScarce(t, leastFiles+i) })
	})
	enough := mostFiles + 1 // or more
	for enough > leastFiles && lines[enough-1] == "" {
		enough--
	}
	t.Logf("it serves with %d descriptors", enough)
	for n, line := range lines {
		if n < 16 && line != "" && !strings.Contains(line, "listening") {
			continue // some of what Go's runtime has open otherwise is not, and so not counted
		}
		if line != "" && !regexp.MustCompile(fmt.Sprintf(`^sniproxy: .*\b%d\b.*\n$`, enough)).MatchString(line) {
			t.Fatalf("it serves with %d descriptors, and with %d it says %.300q", enough, n, line)
		}
	}
}

// tryScarce returns what the daemon says when it does not serve with few descriptors.
func tryScarce(t *testing.T, n int) string {
	t.Helper()
	l := listen(t, "tcp4", "127.0.0.1:0")
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := launch(t, f, hostsDir(t), limitFiles(n), func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "GOMAXPROCS=2") // which decides how many it takes
	})
	d.addr = l.Addr().String()
	d.serve("a.example", greet)
	awaitFor(patience, func() bool { return !d.running() || strings.Contains(d.out.String(), "listening on ") })
	if !d.running() {
		text := d.err.String()
		if strings.Count(text, "\n") != 1 || !strings.Contains(text, "ulimit -n") || d.wait() != 1 {
			first, _, _ := strings.Cut(text, "\n")
			t.Errorf("exit status %d, standard error has %d lines: %.200q", d.wait(), strings.Count(text, "\n"), first)
		}
		return text
	}
	// Two in a row, and one beside a silent one.
	for i := range 3 {
		if i == 2 {
			c := d.dial()
			defer c.Close()
		}
		got, err := d.exchangeWithin(hello("a.example"), 2*time.Second)
		if err != nil || string(got) != "this is a.example" {
			t.Errorf("client %d got %q, error %v", i, got, err)
			return d.err.String() + "listening, and does not serve"
		}
	}
	d.signal(syscall.SIGTERM)
	if !awaitFor(limits.Drain+2*time.Second, func() bool { return !d.running() }) {
		t.Errorf("it does not stop: %s", d.err)
	}
	return ""
}
