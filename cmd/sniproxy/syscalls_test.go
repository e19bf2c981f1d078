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
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// A bound is how many system calls of a kind a connection makes, at least and at most.
type bound struct {
	min, max int
	late     int // how many more, or less, if the answer is acknowledged late
	opened   int // how many more each time that the loop enters the host's directory anew
	relied   int // how many more at the second look-up after that
	left     int // by how many more or less they may differ in all, as the loop may be in it or not
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
// What is in that directory is known from the connections before, since its inode and ctime are the
// same.
//
// For another host than that of the connection before there are an openat2 and an fchdir in place
// of the statx of the entry, a statx of the directory, an openat2 that fails, and so tells that to
// look tls-socket up does not wait, three readlinkat for the markers, and a close of the directory
// before. The next connection for that host makes the openat2 that fails and the readlinkat once
// more, with a clock_gettime, a readlinkat and a statx that tell whether to rely on what they find.
// A loop that has nothing to do for a while leaves the directory as well, by a close and an fchdir,
// and waits anew. How often that happens between two of these calls hangs on how quick the others
// are, so it is counted: what else there is of these calls is exact.
//
// On a busy machine it happens that the acknowledgement is not there yet. Then the end of the
// backend is passed on, by a shutdown in place of the recvfrom, and the end of the client waited
// for, and read.
//
// Once a second goroutines of no loop look for .accept-proxy, for .ech and for the log-connections
// of all hosts: a write and a read of Go's poller, and some statx.
//
// Only the number of waits has a range: an end that is seen later than what comes before it takes
// one more.
var eventLoopCalls = map[string]bound{
	"accept4":     {min: 1, max: 1},
	"close":       {min: 2, max: 2, opened: 1, left: 1},
	"connect":     {min: 1, max: 1},
	"epoll_ctl":   {min: 2, max: 2},
	"epoll_pwait": {min: 2, max: 6, late: +1},
	"fchdir":      {opened: 2, left: 1},
	"fcntl":       {min: 1, max: 1},
	"ioctl":       {min: 1, max: 1},
	"openat2":     {opened: 2, relied: 1},
	"read":        {min: 3, max: 3, late: +1, left: 10},
	"readlinkat":  {opened: 3, relied: 4},
	"recvfrom":    {min: 1, max: 1, late: -1},
	"setsockopt":  {min: 1, max: 1},
	"shutdown":    {late: +1},
	"socket":      {min: 1, max: 1},
	"statx":       {min: 1, max: 1, relied: 1, left: 10},
	"write":       {min: 2, max: 2, left: 10},
}

// The goroutine engine is not made for the fewest calls. Go's poller, which is woken up
// through an eventfd, has its part in them, and tries to read before it waits. Once, when another
// thread allocates memory, glibc opens a file that tells how many processors there are.
var goroutineCalls = map[string]bound{
	"accept4":     {min: 1, max: 3},
	"close":       {min: 3, max: 3, left: 1},
	"connect":     {min: 1, max: 1},
	"epoll_ctl":   {min: 4, max: 4},
	"epoll_pwait": {min: 2, max: 24},
	"fchdir":      {min: 2, max: 2}, // a thread for look-ups leaves after each
	"fcntl":       {min: 2, max: 8},
	"getsockopt":  {min: 0, max: 2},
	"openat":      {left: 1},
	"openat2":     {min: 1, max: 1},
	"poll":        {min: 0, max: 1}, // or ppoll, by the architecture
	"ppoll":       {min: 0, max: 1},
	"read":        {min: 4, max: 10},
	"readlinkat":  {min: 3, max: 3},
	"setsockopt":  {min: 1, max: 1},
	"shutdown":    {min: 2, max: 2},
	"socket":      {min: 1, max: 1},
	"statx":       {min: 2, max: 6}, // more when the log of all hosts is looked for, once a second
	"write":       {min: 2, max: 4},
}

// Calls of Go's runtime, for its threads, memory, signals and timers.
var runtimeCalls = strings.Fields(`
	arch_prctl brk clock_gettime clock_nanosleep clone clone3 exit futex getpid getrandom gettid
	madvise mincore mmap mprotect munmap nanosleep prctl restart_syscall rseq rt_sigaction
	rt_sigprocmask rt_sigreturn sched_getaffinity sched_yield set_robust_list setitimer
	sigaltstack tgkill timer_create timer_delete timer_settime`)

// The system calls of a connection that is handed over, which is one that has a socket to send
// with:
//
//	epoll_pwait   a client came
//	fcntl         sets O_NONBLOCK of the listener
//	accept4
//	read          the hello
//	statx         the directory of the host
//	connect       the sender to tls-socket
//	fcntl         makes the client's socket blocking again
//	setsockopt    and takes the time limit away that it has from the listener
//	sendmsg       hands it over
//	getsockopt    closing it does not wait: the backend has not set SO_LINGER
//	close
//
// Now and then a timer has the sender looked at, and closed if it has nothing to do: a write and a
// read of Go's poller, an ioctl and a close, and then another socket and setsockopt.
var handedCalls = map[string]bound{
	"accept4":     {min: 1, max: 1},
	"close":       {min: 1, max: 1, opened: 1, left: 10},
	"connect":     {min: 1, max: 1},
	"epoll_pwait": {min: 1, max: 4},
	"fchdir":      {opened: 2, left: 1},
	"fcntl":       {min: 2, max: 2},
	"getsockopt":  {min: 1, max: 1},
	"ioctl":       {left: 10},
	"openat2":     {opened: 2, relied: 1},
	"read":        {min: 1, max: 1, left: 10},
	"readlinkat":  {opened: 3, relied: 4},
	"sendmsg":     {min: 1, max: 1},
	"setsockopt":  {min: 1, max: 1, left: 10},
	"socket":      {left: 10},
	"statx":       {min: 1, max: 1, relied: 1, left: 10},
	"write":       {left: 10},
}

// Goal: one short connection makes exactly the system calls of the table, in the engine that was
// built, and so does one that is handed over. Whoever adds or saves one changes the table.
func TestSystemCalls(t *testing.T) {
	first := append(snitest.Hello("short.example"), make([]byte, 16)...)
	answer := bytes.Repeat([]byte("answer.."), 8)
	table := eventLoopCalls
	if isPortable(t) {
		table = goroutineCalls
	}
	t.Run("relayed", func(t *testing.T) {
		checkCalls(t, table, first, answer, func(d *daemon) {
			d.serve("short.example", func(c *net.UnixConn) {
				if _, err := io.ReadFull(c, make([]byte, len(first))); err != nil {
					t.Error(err)
				}
				c.Write(answer)
			})
		})
	})
	if isPortable(t) {
		return // it makes a socket for each connection that it hands over
	}
	t.Run("handed over", func(t *testing.T) {
		checkCalls(t, handedCalls, first, answer, func(d *daemon) {
			d.serveHanded("short.example", func(c *net.TCPConn, got []byte) {
				if !bytes.Equal(got, first) {
					t.Errorf("the backend was handed %d bytes, want %d", len(got), len(first))
				}
				c.Write(answer)
			})
		})
	})
}

// checkCalls counts the calls that connections make to the host that prepare makes.
func checkCalls(t *testing.T, table map[string]bound, first, answer []byte, prepare func(*daemon)) {
	const conns = 50
	strace := hostdirtest.Need(t, "strace")
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	// A client is not to be accepted before its hello is there. Otherwise it sometimes
	// would be, and the hello cost a read in vain and a wait.
	share(t, l).do(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10)
	})
	log := filepath.Join(t.TempDir(), "strace")
	// One loop: of several, a client may wake up more than one.
	d := startOn(t, l, hostdirtest.Dir(t), traced(strace, log), oneLoop)
	prepare(d)
	// Markers are looked for again while the directory has changed within the last clock tick.
	<-time.After(50 * time.Millisecond)
	base := d.fds()
	// One connection after the other: the next one begins when the last is forgotten and
	// the loop waits.
	var text []byte
	serve := func(n int) (calls map[string]int, relied int) {
		for range n {
			got, err := d.exchange(first)
			if err != nil || !bytes.Equal(got, answer) {
				t.Fatalf("got %q, error %v, want %q", got, err, answer)
			}
			// A sender may be there as well.
			hostdirtest.Await(t, "the daemon to have nothing to do", func() bool { return d.fds() <= base+1 && d.asleep() })
		}
		var err error
		if text, err = os.ReadFile(log); err != nil {
			t.Fatal(err)
		}
		// Look-ups that find out what the next ones rely on ask for a name that is too long.
		return callsIn(text), bytes.Count(text, []byte("ENAMETOOLONG"))
	}
	before, reliedBefore := serve(5)
	after, relied := serve(conns)
	relied -= reliedBefore

	late := after["shutdown"] - before["shutdown"]
	opened := (after["openat2"] - before["openat2"] - relied) / 2
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
		more := want.late*late + want.opened*opened + want.relied*relied
		least, most := want.min*conns+more-want.left, want.max*conns+more+want.left
		if n > 0 {
			t.Logf("%-12s %.2f", name, float64(n)/conns)
		}
		if n < least || n > most {
			t.Errorf("%d calls of %s in %d connections, want %d to %d", n, name, conns, least, most)
			if n < conns { // whose they are is not to be seen from their number
				for line := range bytes.Lines(text) {
					if bytes.Contains(line, []byte(" "+name+"(")) {
						t.Logf("%s", line)
					}
				}
			}
		}
	}
}

// traced runs the daemon under strace, which writes to log. With -D the daemon, not strace, is the
// child.
func traced(strace, log string, options ...string) setup {
	return func(cmd *exec.Cmd) {
		cmd.Args = slices.Concat([]string{strace, "-D", "-f", "-o", log}, options, []string{cmd.Path})
		cmd.Path = strace
	}
}

var callEntry = regexp.MustCompile(`(?m)^\d+ +(\w+)\((.*)$`)

// countCalls counts the calls in a log of strace: see callsIn.
func countCalls(t *testing.T, log string) map[string]int {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return callsIn(text)
}

// callsIn counts the calls in what strace has written, but for those that ask for .accept-proxy,
// which a goroutine makes once a second.
func callsIn(text []byte) map[string]int {
	count := make(map[string]int)
	for _, m := range callEntry.FindAllSubmatch(text, -1) {
		if bytes.Contains(m[2], []byte(acceptProxy)) {
			continue
		}
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
