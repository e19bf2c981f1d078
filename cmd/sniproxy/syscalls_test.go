//go:build linux

package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A bound is how many system calls of a kind a connection makes, at least and at most.
type bound struct {
	min, max int
	late     int // how many more, or less, if the answer is acknowledged late
}

// The system calls of the shortest connection: the hello is there at accept, the backend
// answers and closes, then the client closes. It is the smallest sequence that keeps what
// is promised:
//
//	epoll_pwait   a client came
//	fcntl         sets O_NONBLOCK of the listener, which others may have cleared
//	accept4
//	read          the hello, and what the client has sent with it
//	statx         the directory of the host, which is that of the connection before
//	openat2       fails, and so tells that to look tls-socket up does not wait
//	socket
//	setsockopt    what the backend passes is refused; before Linux 6.16 it keeps urgent data in its place instead
//	connect       to tls-socket
//	epoll_ctl     for the answer of the backend, and its end
//	write         the hello
//	epoll_ctl     for what else the client says, and its end
//	epoll_pwait   the answer came
//	read          the answer
//	write         the answer
//	read          the end of the backend: it is never read with what comes before it
//	ioctl         the client has acknowledged the answer,
//	recvfrom      and has sent nothing: it can be closed without a reset
//	close         the client, which takes it out of epoll as well
//	close         the backend
//
// For another host than that of the connection before, or if its directory has changed, there are three readlinkat as well:
// for send-proxy-v2, send-proxy-v1 and log-connections. For another host there are an openat2 and an
// fchdir before the first statx, so that socket and markers are of one directory, and a close of the one before. A
// loop that has nothing to do for a while leaves the directory as well, by a close and an
// fchdir, and waits anew. Whether that is so between two of these calls hangs on how quick
// the others are; and an end of the backend that is seen later than its answer takes a wait
// more. Hence the ranges.
//
// On a busy machine it happens that the acknowledgement is not there yet. Then the end of
// the backend is passed on, by a shutdown in place of the recvfrom, and the end of the client
// waited for, and read.
var eventLoopCalls = map[string]bound{
	"accept4":     {1, 1, 0},
	"close":       {2, 3, 0},
	"connect":     {1, 1, 0},
	"epoll_ctl":   {2, 2, 0},
	"epoll_pwait": {2, 6, +1},
	"fchdir":      {0, 2, 0},
	"fcntl":       {1, 1, 0},
	"ioctl":       {1, 1, 0},
	"openat2":     {1, 2, 0},
	"read":        {3, 3, +1},
	"readlinkat":  {0, 3, 0},
	"recvfrom":    {1, 1, -1},
	"setsockopt":  {0, 1, 0},
	"shutdown":    {0, 0, +1},
	"socket":      {1, 1, 0},
	"statx":       {1, 2, 0},
	"write":       {2, 2, 0},
}

// The goroutine engine is not made for the fewest calls. Go's poller, which is woken up
// through an eventfd, has its part in them, and tries to read before it waits.
var goroutineCalls = map[string]bound{
	"accept4":     {1, 3, 0},
	"close":       {3, 3, 0},
	"connect":     {1, 1, 0},
	"epoll_ctl":   {4, 4, 0},
	"epoll_pwait": {2, 12, 0},
	"fchdir":      {2, 2, 0}, // a thread for look-ups leaves after each
	"fcntl":       {2, 8, 0},
	"getsockopt":  {0, 2, 0},
	"openat2":     {1, 1, 0},
	"poll":        {0, 1, 0}, // or ppoll, by the architecture
	"ppoll":       {0, 1, 0},
	"read":        {4, 10, 0},
	"readlinkat":  {3, 3, 0},
	"setsockopt":  {1, 1, 0},
	"shutdown":    {2, 2, 0},
	"socket":      {1, 1, 0},
	"statx":       {2, 6, 0}, // more when the log of all hosts is looked for, once a second
	"write":       {2, 4, 0},
}

// Calls of Go's runtime, for its threads, memory, signals and timers.
var runtimeCalls = strings.Fields(`
	arch_prctl brk clock_gettime clock_nanosleep clone clone3 exit futex getpid getrandom gettid
	madvise mincore mmap mprotect munmap nanosleep prctl restart_syscall rseq rt_sigaction
	rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield set_robust_list setitimer
	sigaltstack tgkill timer_create timer_delete timer_settime`)

// Goal: one short connection makes exactly the system calls of the table, in the engine that
// was built. Who adds one, or saves one, changes the table.
func TestSystemCalls(t *testing.T) {
	const conns = 50
	strace := need(t, "strace")
	table := eventLoopCalls
	if isPortable(t) {
		table = goroutineCalls
	}

	l := listen(t, "tcp4", "127.0.0.1:0")
	// A client is not to be accepted before its hello is there. Otherwise it sometimes
	// would be, and the hello cost a read in vain and a wait.
	share(t, l).do(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10)
	})
	log := filepath.Join(t.TempDir(), "strace")
	// One loop: of several, a client may wake up more than one.
	d := startOn(t, l, hostsDir(t), traced(strace, log), oneLoop)

	first := append(hello("short.example"), make([]byte, 16)...)
	answer := bytes.Repeat([]byte("answer.."), 8)
	d.serve("short.example", func(c *net.UnixConn) {
		if _, err := io.ReadFull(c, make([]byte, len(first))); err != nil {
			t.Error(err)
		}
		c.Write(answer)
	})
	base := d.fds()
	// One connection after the other: the next one begins when the last is forgotten and
	// the loop waits.
	serve := func(n int) map[string]int {
		for range n {
			got, err := d.exchange(first)
			if err != nil || !bytes.Equal(got, answer) {
				t.Fatalf("got %q, error %v, want %q", got, err, answer)
			}
			await(t, "the daemon to have nothing to do", func() bool { return d.fds() == base && d.asleep() })
		}
		return countCalls(t, log)
	}
	before, after := serve(5), serve(conns)

	late := after["shutdown"] - before["shutdown"]
	if !isPortable(t) && late > conns/2 {
		t.Errorf("%d of %d connections were ended the long way, want few", late, conns)
	}
	for name := range table {
		after[name] += 0 // so that a call which was not made is looked at, too
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if slices.Contains(runtimeCalls, name) {
			continue
		}
		n := after[name] - before[name]
		want := table[name]
		least, most := want.min*conns+want.late*late, want.max*conns+want.late*late
		if n > 0 {
			t.Logf("%-12s %.2f", name, float64(n)/conns)
		}
		if n < least || n > most {
			t.Errorf("%d calls of %s in %d connections, want %d to %d", n, name, conns, least, most)
		}
	}
}

// traced runs the daemon under strace, which writes to log. With -D the daemon, not strace, is the child.
func traced(strace, log string, options ...string) setup {
	return func(cmd *exec.Cmd) {
		cmd.Args = slices.Concat([]string{strace, "-D", "-f", "-o", log}, options, []string{cmd.Path})
		cmd.Path = strace
	}
}

var callEntry = regexp.MustCompile(`(?m)^\d+ +(\w+)\(`)

// countCalls counts the calls in a log of strace.
func countCalls(t *testing.T, log string) map[string]int {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	count := make(map[string]int)
	for _, m := range callEntry.FindAllSubmatch(text, -1) {
		count[string(m[1])]++
	}
	return count
}

// asleep tells whether all threads of the daemon wait for something.
func (d *daemon) asleep() bool { return d.allInState("S") }

// allInState tells whether the states of all threads of the daemon are among some.
func (d *daemon) allInState(states string) bool {
	d.t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.cmd.Process.Pid))
	if err != nil || len(stats) == 0 {
		d.t.Fatalf("no threads of the daemon in /proc, error %v", err)
	}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		// proc(5): after the name in parentheses comes the state.
		if _, state, ok := bytes.Cut(stat, []byte(") ")); err != nil || !ok || !strings.Contains(states, string(state[:1])) {
			return false
		}
	}
	return true
}
