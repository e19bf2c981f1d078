package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: a daemon that has just begun to listen takes less than 6 MiB of memory.
func TestCostStart(t *testing.T) {
	binary := build(t)
	r, w := openPipe(t)
	begin := time.Now()
	d := startOn(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hostdirtest.Dir(t), binary, output1(w))
	w.Close()
	r.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
	if line, err := bufio.NewReader(r).ReadString('\n'); !strings.HasPrefix(line, "listening on ") {
		t.Fatalf("the daemon says %q, error %v", line, err)
	}
	took, rss := time.Since(begin), d.rss()
	t.Logf("%v from the start to listening, %d KiB", took, rss>>10)
	if limit := 6 << 20; rss >= limit {
		t.Errorf("the daemon has %d KiB of memory, want less than %d", rss>>10, limit>>10)
	}
}

// Goal: a connection that has moved much and is idle now holds exactly two descriptors, and no
// pipe.
func TestCostIdleDescriptors(t *testing.T) {
	const size = 512 << 10
	d := start(t)
	conns := 1000
	if testing.Short() || raceEnabled {
		conns = 200
	}
	conns = descriptorsFor(t, conns)
	fds, pipes := d.fds(), d.pipes()
	for _, p := range d.pairs(conns) {
		p.move(t, size)
	}
	hostdirtest.Await(t, fmt.Sprintf("the daemon to have no pipes and %d descriptors more", 2*conns), func() bool {
		return d.pipes() == pipes && d.fds() == fds+2*conns
	})
}

// Goal: an idle connection costs the memory of its state, and no more.
func TestCostIdleMemory(t *testing.T) {
	limit := 512.0
	if isPortable(t) {
		limit = 13 << 10 // stacks of goroutines, above all
	}
	d := start(t, build(t))
	conns := descriptorsFor(t, 5000)
	unused, used := d.idleMemory(conns)
	t.Logf("memory for each of %d connections: %.0f bytes, and %.0f after use", conns, unused, used)
	if unused > limit || used > limit {
		t.Errorf("a connection takes %.0f bytes, and %.0f after use, want at most %.0f", unused, used, limit)
	}
}

// idleMemory returns how many bytes of memory the daemon takes for each of n idle connections,
// before they have moved anything and after they have moved 60 kB each way.
func (d *daemon) idleMemory(n int) (unused, used float64) {
	d.t.Helper()
	fds := d.fds()
	for _, p := range d.pairs(100) {
		p.move(d.t, 60_000)
		p.close()
	}
	d.awaitFds(fds)
	base := d.rss()
	each := func() float64 { return float64(d.rss()-base) / float64(n) }

	pairs := d.pairs(n)
	unused = each()
	for _, p := range pairs {
		p.move(d.t, 60_000)
	}
	d.awaitFds(fds + 2*n)
	used = each()
	for _, p := range pairs {
		p.close()
	}
	return unused, used
}

// A pair is both ends of a connection through the daemon.
type pair struct {
	client  *net.TCPConn
	backend *net.UnixConn
}

// pairs opens n connections.
func (d *daemon) pairs(n int) (pairs []pair) {
	d.t.Helper()
	const name = "pairs.example"
	os.Remove(d.hostPath(name, "tls-socket"))
	l := d.host(name)
	for range n {
		client, backend := d.pair(l, name)
		client.SetDeadline(time.Time{})
		backend.SetDeadline(time.Time{})
		pairs = append(pairs, pair{client, backend})
	}
	return pairs
}

// move moves n bytes through a connection, then n bytes back.
func (p pair) move(t testing.TB, n int) {
	t.Helper()
	for _, way := range [][2]net.Conn{{p.client, p.backend}, {p.backend, p.client}} {
		go way[0].Write(make([]byte, n))
		if m, err := io.ReadFull(way[1], make([]byte, n)); err != nil {
			t.Fatalf("after %d of %d bytes: %v", m, n, err)
		}
	}
}

func (p pair) close() {
	p.client.Close()
	p.backend.Close()
}

// pipes returns how many descriptors of the daemon are of pipes.
func (d *daemon) pipes() (n int) {
	d.t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// descriptorsFor returns n, or how many connections there can be, if that is less. The
// daemon and the test both need two descriptors for each.
func descriptorsFor(t testing.TB, n int) int {
	t.Helper()
	const others = 100
	var limit unix.Rlimit
	hostdirtest.Must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	if room := uint64(limit.Cur)/2 - others; room < uint64(n) {
		t.Logf("the limit of descriptors is %d, which is enough for %d connections, not %d", limit.Cur, room, n)
		n = int(room)
	}
	return n
}

// build builds the program, as it is installed but with the build tags of the test, and has
// the daemon be that. The test binary is larger, also in memory.
func build(t testing.TB) setup {
	t.Helper()
	if raceEnabled {
		t.Skip("the program that is installed is without race detector")
	}
	path := filepath.Join(t.TempDir(), "sniproxy")
	cmd := exec.Command(hostdirtest.Need(t, "go"), "build", "-buildvcs=false", "-tags", buildTags(t), "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return func(cmd *exec.Cmd) {
		cmd.Path = path
		cmd.Args = []string{path}
	}
}

// isPortable tells whether the goroutine engine was built.
func isPortable(t testing.TB) bool {
	t.Helper()
	return runtime.GOOS != "linux" || slices.Contains(strings.Split(buildTags(t), ","), "portable")
}

// buildTags returns the build tags of the test binary.
func buildTags(t testing.TB) string {
	t.Helper()
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Fatal("the test binary does not know how it was built")
	}
	for _, s := range info.Settings {
		if s.Key == "-tags" {
			return s.Value
		}
	}
	return ""
}
