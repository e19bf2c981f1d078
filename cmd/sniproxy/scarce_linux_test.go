package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// leastFiles and mostFiles are limits of descriptors (ulimit -n) between which all are tried. With the
// lowest the program is reached, since Go's runtime opens none of its own before the first timer is
// set; then it needs some, and ends the program without them.
const leastFiles, mostFiles = 4, 40

// needsFiles is what the daemon says when it cannot work with the limit.
var needsFiles = regexp.MustCompile(`^sniproxy: .*\b(\d+)\b.*ulimit -n.*\n$`)

// Goal: with however few descriptors, the daemon either exits with 1 and one line that says how many it
// takes, or it serves; with as many as the line says, it serves.
func TestScarceDescriptors(t *testing.T) {
	t.Parallel()
	type result struct {
		serves bool
		takes  int
	}
	var results [mostFiles + 1]result
	inParallel(mostFiles+1-leastFiles, 12, func(i int) {
		t.Run(fmt.Sprint(leastFiles+i), func(t *testing.T) {
			r := &results[leastFiles+i]
			r.serves, r.takes = tryScarce(t, leastFiles+i)
		})
	})
	enough, said := 0, 0
	for n := leastFiles; n <= mostFiles; n++ {
		serves, takes := results[n].serves, results[n].takes
		switch {
		case serves && enough == 0:
			enough = n
		case !serves && enough > 0:
			t.Errorf("it serves with %d descriptors, but not with %d", enough, n)
		case !serves && takes == 0:
			t.Errorf("with %d descriptors it neither serves nor says how many it takes", n)
		case !serves && said > 0 && takes != said:
			t.Errorf("with %d descriptors it says that it takes %d, not %d as before", n, takes, said)
		}
		if takes > 0 {
			said = takes
		}
	}
	t.Logf("it serves with %d descriptors, and says that it takes %d", enough, said)
	if said > 0 && said != enough {
		t.Errorf("it says that it takes %d descriptors, and serves with %d", said, enough)
	}
}

// tryScarce tells whether the daemon serves with few descriptors; if not, how many it says that it
// takes, 0 if it does not say that as it must.
func tryScarce(t *testing.T, n int) (serves bool, takes int) {
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
		m := needsFiles.FindStringSubmatch(text)
		if m == nil || strings.Count(text, "\n") != 1 || d.wait() != 1 {
			first, _, _ := strings.Cut(text, "\n")
			t.Errorf("with %d descriptors: exit status %d, standard error has %d lines: %.200q", n, d.wait(), strings.Count(text, "\n"), first)
			return false, 0
		}
		takes, _ = strconv.Atoi(m[1])
		return false, takes
	}
	// Two in a row, and one beside a silent one.
	for i := range 3 {
		if i == 2 {
			c := d.dial()
			defer c.Close()
		}
		got, err := d.exchangeWithin(hello("a.example"), 2*time.Second)
		if err != nil || string(got) != "this is a.example" {
			t.Errorf("with %d descriptors: client %d got %q, error %v", n, i, got, err)
			return false, 0
		}
	}
	d.signal(syscall.SIGTERM)
	if !awaitFor(drainTimeout+2*time.Second, func() bool { return !d.running() }) {
		t.Errorf("with %d descriptors it does not stop: %s", n, fmt.Sprint(d.err))
	}
	return true, 0
}
