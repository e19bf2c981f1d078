package main

import (
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// leastFiles and mostFiles are limits of descriptors (ulimit -n) between which all are tried. With
// the lowest the program is reached, since Go's runtime opens none of its own before the first
// timer is set; then it needs some, and ends the program without them.
const leastFiles, mostFiles = 4, 40

// Goal: with however few descriptors, the daemon either exits with 1 and one line that says how
// many it needs, or serves. With as many as the line says, it serves.
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
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := launch(t, f, hostdirtest.Dir(t), limitFiles(n), func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "GOMAXPROCS=2") // which decides how many it takes
	})
	d.addr = l.Addr().String()
	d.serve("a.example", hostdirtest.Greet)
	hostdirtest.AwaitFor(hostdirtest.Patience, func() bool { return !d.running() || strings.Contains(d.out.String(), "listening on ") })
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
		got, err := d.exchange(snitest.Hello("a.example"))
		if err != nil || string(got) != "this is a.example" {
			t.Errorf("client %d got %q, error %v", i, got, err)
			return d.err.String() + "listening, and does not serve"
		}
	}
	d.signal(syscall.SIGTERM)
	d.wait()
	return ""
}

// Goal: with however few descriptors, a daemon for a single connection either exits with 1 and a
// line that says how many it needs, or serves the client.
func TestScarceSingle(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	var served [mostFiles + 1]bool
	inParallel(mostFiles+1-leastFiles, 12, func(i int) {
		n := leastFiles + i
		d, client := startSingle(t, hosts, limitFiles(n))
		client.Write(snitest.Hello("a.example"))
		got, _ := io.ReadAll(client)
		client.Close()
		switch status, text := d.wait(), d.err.String(); {
		case string(got) == "this is a.example" && status == 0:
			served[n] = true
		case len(got) > 0 || status != 1 || !strings.Contains(text, "ulimit -n"):
			t.Errorf("with %d descriptors the client got %q, and the daemon ended with %d and said %.200q", n, got, status, text)
		}
	})
	if !served[mostFiles] {
		t.Errorf("with %d descriptors the client is not served", mostFiles)
	}
}

// Goal: a listening socket that is shut down while no descriptor is free ends the daemon, with a
// line that says so, and does not keep it busy.
func TestScarceShutDown(t *testing.T) {
	t.Parallel()
	const files = 48
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostdirtest.Dir(t), limitFiles(files), oneLoop)
	least := files - 2
	if isPortable(t) {
		least = files - 6 // it leaves some to look-ups
	}
	silent := d.crowd(2*files, nil)
	hostdirtest.Await(t, "the daemon to run out of descriptors", func() bool { return d.allFds() >= least })
	share(t, l).do(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
	d.err.Await(t, "was shut down by another process")
	for _, c := range silent {
		c.Close()
	}
	d.expectExit(1)
}
