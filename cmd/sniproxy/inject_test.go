//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// An injection is a system call, or some, and the errors that it fails with, one after the other.
type injection struct {
	calls string // names, with commas between them
	when  string // which calls of a thread fail: the first, and how many later the next, and so on

	harmless string // errors that no client may notice
	harmful  string // errors that may end a connection, with an alert or a reset
	ending   string // errors that may end it as if all was said

	share    bool // two loops, which move relays all the time
	loopOnly bool // not to fail in other threads than the loop's
}

// The errors are those that the manual page of the call has, and the pages that it refers to for
// sockets, TCP and paths; and EINTR. Not all calls can be made to fail:
//   - What is an answer rather than a failure: of readlinkat and statx, that there is no
//     marker, and of readlinkat that there is one (EINVAL).
//   - EAGAIN, of reads and writes: it promises an event, which does not come if it is not true.
//   - pipe2 is called once, at the start.
//   - shutdown and close have their effect unless the descriptor is wrong, which no caller can
//     mend; a call that fails here was not made at all.
var eventLoopInjections = []injection{
	{calls: "accept4", when: "3+9", harmless: acceptErrors + "EAGAIN", harmful: "EMFILE ENFILE"},
	{calls: "read", when: "3+7", harmless: "EINTR", harmful: readErrors},
	{calls: "socket", when: "2+3", harmful: socketErrors},
	{calls: "connect", when: "2+3", harmless: "EAGAIN", harmful: connectErrors},
	{calls: "openat,openat2", when: "2+5", harmful: pathErrors +
		"E2BIG EAGAIN EBADF EBUSY EDQUOT EEXIST EFBIG EINTR EINVAL EISDIR EMFILE ENFILE ENODEV ENOSPC ENOSYS ENXIO EOPNOTSUPP EOVERFLOW EPERM EROFS ETXTBSY EXDEV"},
	// For what a symlink leads to. If it fails another thread looks that up.
	{calls: "statx", when: "1+2", harmful: pathErrors + "EBADF EINTR EINVAL"},
	{calls: "statx,openat", when: "1+2", harmful: "EACCES EINTR EIO EMFILE ENOENT ENOMEM"},
	{calls: "fchdir", when: "2+3", harmful: "EACCES EBADF EIO ELOOP ENOENT ENOMEM ENOTDIR"},
	{calls: "readlinkat", when: "2+3", harmful: "EACCES EBADF EFAULT EINTR EIO ELOOP ENAMETOOLONG ENOMEM ENOTDIR"},
	{calls: "epoll_ctl", when: "3+7", harmful: "EBADF EEXIST EINVAL ELOOP ENOENT ENOMEM ENOSPC EPERM"},
	// After a failure of accept4 the loop does not wait for clients for a while.
	{calls: "epoll_ctl,accept4", when: "2+5", harmful: "ENOMEM ENOSPC"},
	{calls: "epoll_ctl", when: "2+3", share: true, harmful: "ENOMEM ENOSPC"},
	// In other threads it is Go's runtime that waits and writes, and ends the program if it cannot.
	{calls: "epoll_pwait", when: "2+3", harmless: "EINTR", loopOnly: true},
	{calls: "write", when: "3+7", harmless: "EINTR", harmful: writeErrors, ending: "EPIPE ECONNRESET", loopOnly: true},
	{calls: "splice", when: "3+7", harmless: "EINTR", harmful: "EBADF EINVAL ENOMEM ESPIPE", ending: "EPIPE ECONNRESET"},
	{calls: "fcntl", when: "2+3", harmless: "EACCES EAGAIN EBADF EBUSY EINTR EINVAL EMFILE ENOMEM EPERM"},
	{calls: "getpeername", when: "1+2", harmful: "EBADF EFAULT EINVAL ENOBUFS ENOTCONN ENOTSOCK"},
	{calls: "getsockname", when: "1+2", harmful: "EBADF EFAULT EINVAL ENOBUFS ENOTSOCK"},
	{calls: "recvfrom", when: "1+2", harmless: "EAGAIN EBADF ECONNREFUSED EFAULT EINTR EINVAL ENOMEM ENOTCONN ENOTSOCK"},
	{calls: "ioctl", when: "1+2", harmless: "EBADF EFAULT EINVAL ENOTTY"},
}

// Go's poller shares some calls with the portable engine. It ends the program if its own
// epoll_ctl, epoll_pwait or write fails, other than with EINTR, so these do not; nor with EINTR,
// since what strace was about to inject when it let go of the program becomes ENOSYS. And it is
// told of clients once, so EAGAIN of accept4 is a promise as well.
var goroutineInjections = []injection{
	{calls: "accept4", when: "3+9", harmless: acceptErrors, harmful: "EMFILE ENFILE"},
	{calls: "read", when: "2+5", harmless: "EINTR", harmful: readErrors},
	{calls: "socket", when: "1+2", harmful: socketErrors},
	{calls: "connect", when: "1+2", harmless: "EAGAIN", harmful: connectErrors},
	{calls: "statx", when: "2+7", harmful: "EACCES EBADF EFAULT EINTR EINVAL EIO ELOOP ENAMETOOLONG ENOMEM EOVERFLOW"},
	{calls: "fcntl", when: "2+5", harmful: "EACCES EBADF EBUSY EINTR EINVAL EMFILE ENOMEM EPERM"},
	{calls: "getsockname", when: "1+2", harmful: "EBADF EFAULT EINVAL ENOBUFS ENOTSOCK"},
}

const (
	acceptErrors = "EINTR ECONNABORTED EBADF EFAULT EINVAL ENOBUFS ENOMEM ENOTSOCK EOPNOTSUPP EPERM EPROTO " +
		"ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH ENETUNREACH ENOSR ESOCKTNOSUPPORT EPROTONOSUPPORT ETIMEDOUT "
	socketErrors  = "EACCES EAFNOSUPPORT EINVAL EMFILE ENFILE ENOBUFS ENOMEM EPROTONOSUPPORT EPROTOTYPE"
	pathErrors    = "EACCES EFAULT EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR "
	connectErrors = pathErrors + "EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT EALREADY EBADF ECONNREFUSED EINPROGRESS EINTR EINVAL EISCONN ENETUNREACH ENOTSOCK EPERM EPROTOTYPE ETIMEDOUT"
	readErrors    = "EBADF ECONNREFUSED ECONNRESET EFAULT EHOSTUNREACH EINVAL EIO EISDIR ENETUNREACH ENOBUFS ENOMEM ENOTCONN ENOTSOCK ETIMEDOUT"
	writeErrors   = "EBADF EDESTADDRREQ EDQUOT EFAULT EFBIG EHOSTUNREACH EINVAL EIO EISCONN EMSGSIZE ENETUNREACH ENOBUFS ENOMEM ENOSPC ENOTCONN ENOTSOCK EOPNOTSUPP EPERM ETIMEDOUT"
)

// A daemon that is started with this variable lets any process of its user trace it, which
// some systems allow only to a parent (Yama).
const traceable = "SNIPROXY_TEST_TRACEABLE"

func init() {
	if os.Getenv(impersonate) != "" && os.Getenv(traceable) != "" {
		unix.Prctl(unix.PR_SET_PTRACER, ^uintptr(0), 0, 0, 0) // PR_SET_PTRACER_ANY
	}
}

// Goal: whatever system call fails, with whatever error, the daemon goes on, gives nobody a wrong
// byte, lets nobody wait, and closes what it opened.
func TestInject(t *testing.T) {
	if raceEnabled {
		t.Skip("this is not about races, and a daemon with the race detector is too slow under strace")
	}
	if testing.Short() {
		t.Skip("it takes long")
	}
	strace := hostdirtest.Need(t, "strace")
	t.Parallel() // strace waits a lot
	injections := eventLoopInjections
	if isPortable(t) {
		injections = goroutineInjections
	}
	inParallel(len(injections), 4, func(i int) {
		in := injections[i]
		t.Run(in.calls, func(t *testing.T) { in.run(t, strace) })
	})
}

// Goal: after a failed accept, also if the listening socket cannot be watched again at the first
// try, clients are served.
func TestInjectListener(t *testing.T) {
	if isPortable(t) {
		t.Skip("Go's poller ends the program if its own epoll_ctl fails")
	}
	strace := hostdirtest.Need(t, "strace")
	d := start(t, oneLoop, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, traceable+"=1") })
	d.serve("greet.example", hostdirtest.Greet)
	// The loop takes the socket out of epoll, which succeeds, and then puts it there again.
	s := attach(t, strace, "-f", "-p", fmt.Sprint(d.cmd.Process.Pid), "-e", "trace=accept4,epoll_ctl",
		"-e", "inject=accept4:error=ENOMEM:when=1", "-e", "inject=epoll_ctl:error=ENOMEM:when=2")
	err := d.greeted("greet.example")
	if log := s.detach(); err != nil || strings.Count(log, "(INJECTED)") != 2 {
		t.Errorf("%v; the calls:\n%s", err, log)
	}
}

// Goal: a backend may reset its connection just while the daemon writes to it. What the backend
// said before arrives, and then a reset.
func TestInjectReset(t *testing.T) {
	if isPortable(t) {
		t.Skip("Go's poller ends the program if its own write fails")
	}
	strace := hostdirtest.Need(t, "strace")
	d := start(t, oneLoop, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, traceable+"=1") })
	d.serve("greet.example", hostdirtest.Greet)
	client, backend := d.pair(d.host("answer.example"), "answer.example")
	s := attach(t, strace, "-f", "-p", fmt.Sprint(d.cmd.Process.Pid), "-e", "trace=accept4")
	hostdirtest.Must(t, d.greeted("greet.example"))
	loop := strings.Fields(s.detach())[0]
	s = attach(t, strace, "-p", loop, "-e", "trace=write", "-e", "inject=write:error=ECONNRESET:when=1")
	io.WriteString(client, "more")
	if got, err := io.ReadAll(backend); len(got) > 0 || err != nil {
		t.Errorf("the backend got %q, error %v, want the end", got, err)
	}
	answer := randomBytes(10_000)
	backend.Write(answer)
	backend.Close()
	if got, err := io.ReadAll(client); !bytes.Equal(got, answer) || !isReset(err) {
		t.Errorf("the client got %d bytes, error %v, want the %d of the answer and a reset", len(got), err, len(answer))
	}
	if log := s.detach(); strings.Count(log, "(INJECTED)") != 1 {
		t.Errorf("the calls:\n%s", log)
	}
}

func (in injection) run(t *testing.T, strace string) {
	d := start(t, func(cmd *exec.Cmd) {
		// One loop, which makes all the calls.
		cmd.Env = append(cmd.Env, traceable+"=1", "GOMAXPROCS=1")
		if in.share {
			cmd.Env = append(cmd.Env, "SNIPROXY_TEST_SHARE=1", "GOMAXPROCS=2")
		}
	})
	// Pipes are kept for a while.
	sockets := func() int { return d.fds() - d.pipes() }
	base, baseSockets := d.fds(), sockets()
	visitors := newVisitors(t, d)
	if in.share {
		visitors.stay(6)
	}
	target := []string{"-f", "-p", fmt.Sprint(d.cmd.Process.Pid)}
	if in.loopOnly {
		s := attach(t, strace, append(target, "-e", "trace=accept4")...)
		visitors.come("that are watched", outcome{})
		target = []string{"-p", strings.Fields(s.detach())[0]}
	}
	for _, class := range []struct {
		errors string
		may    outcome
	}{
		{in.harmless, outcome{}},
		{in.harmful, outcome{fail: true}},
		{in.ending, outcome{fail: true, end: true}},
	} {
		for _, errno := range strings.Fields(class.errors) {
			s := attach(t, strace, append(target, "-e", "trace="+in.calls,
				"-e", fmt.Sprintf("inject=%s:error=%s:when=%s", in.calls, errno, in.when))...)
			visitors.come("with "+errno, class.may)
			log := s.detach()
			if !strings.Contains(log, "(INJECTED)") {
				t.Errorf("none of %d calls failed with %s", strings.Count(log, "\n"), errno)
			}
			visitors.come("after "+errno, outcome{})
			hostdirtest.Await(t, "the daemon to close what it opened with "+errno, func() bool { return sockets() <= baseSockets && d.directories() == 0 })
			if t.Failed() {
				t.Logf("the calls:\n%s", log)
				return
			}
		}
	}
	d.awaitFds(base)
	d.expectRest()
	d.signal(unix.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// directories returns how many directories the daemon has open other than that of all hosts.
func (d *daemon) directories() (n int) {
	d.t.Helper()
	hosts, err := os.Stat(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Stat(fd); err == nil && to.IsDir() && !os.SameFile(to, hosts) {
			n++
		}
	}
	return n
}

// A tracer is strace, attached to a running daemon.
type tracer struct {
	t   *testing.T
	cmd *exec.Cmd
	log string
}

func attach(t *testing.T, strace string, args ...string) *tracer {
	t.Helper()
	s := &tracer{t: t, log: filepath.Join(t.TempDir(), "strace")}
	s.cmd = exec.Command(strace, append(args, "-o", s.log)...)
	said := &hostdirtest.Lines{}
	s.cmd.Stderr = said
	hostdirtest.Must(t, s.cmd.Start())
	said.Await(t, "attached")
	return s
}

// detach ends it, and returns the calls that it saw.
func (s *tracer) detach() string {
	s.t.Helper()
	s.cmd.Process.Signal(unix.SIGTERM)
	s.cmd.Wait()
	log, err := os.ReadFile(s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(log)
}

// Visitors are clients of all kinds.
type visitors struct {
	t     *testing.T
	d     *daemon
	kinds []visitor
}

// A visitor is one client.
type visitor struct {
	name string
	send func(c *net.TCPConn) error
	want func(c *net.TCPConn) []byte // nil if it ends by itself and does not care
}

func newVisitors(t *testing.T, d *daemon) *visitors {
	data := randomBytes(1 << 20)
	d.serve("greet.example", hostdirtest.Greet)
	d.serve("echo.example", hostdirtest.Echo)
	d.serve("marked.example", func(c *net.UnixConn) {
		r := bufio.NewReader(c)
		header, _ := r.ReadString('\n')
		name, _, _ := hostdirtest.ReadHello(r)
		io.WriteString(c, header+name)
	})
	hostdirtest.Touch(t, d.hostPath("marked.example", "send-proxy-v1"))
	d.serve("count.example", func(c *net.UnixConn) {
		_, rest, _ := hostdirtest.ReadHello(c)
		sum := crc32.NewIEEE()
		n, _ := io.Copy(sum, io.MultiReader(bytes.NewReader(rest), c))
		fmt.Fprintf(c, "%d bytes, %08x", n, sum.Sum32())
	})
	d.serve("data.example", func(c *net.UnixConn) {
		hostdirtest.ReadHello(c)
		c.Write(data)
	})
	d.serve("rude.example", func(c *net.UnixConn) { hostdirtest.ReadHello(c) })
	// Somewhere else.
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "linked.example"), hostdirtest.Greet)
	hostdirtest.Must(t, os.Symlink(hostDir(elsewhere, "linked.example"), d.hostDir("linked.example")))

	greeting := snitest.Hello("greet.example")
	refused := sni.UnrecognizedName.Record()
	getsHeader := func(c *net.TCPConn) []byte {
		local, remote := localAddr(c), c.RemoteAddr().(*net.TCPAddr)
		return fmt.Appendf(nil, "PROXY TCP4 %s %s %d %d\r\nmarked.example", local.Addr(), remote.IP, local.Port(), remote.Port)
	}
	return &visitors{t, d, []visitor{
		{"short", says(greeting), gets("this is greet.example")},
		{"in two pieces", says(greeting[:100], greeting[100:]), gets("this is greet.example")},
		{"elsewhere", says(snitest.Hello("linked.example")), gets("this is linked.example")},
		{"elsewhere too", says(snitest.Hello("linked.example")), gets("this is linked.example")},
		{"marked", says(snitest.Hello("marked.example")), getsHeader},
		{"marked too", says(snitest.Hello("marked.example")), getsHeader},
		{"both ways", then((*net.TCPConn).CloseWrite, snitest.Hello("echo.example"), data), gets(string(data))},
		{"up", then((*net.TCPConn).CloseWrite, snitest.Hello("count.example"), data), gets(fmt.Sprintf("%d bytes, %08x", len(data), crc32.ChecksumIEEE(data)))},
		{"down", says(snitest.Hello("data.example")), gets(string(data))},
		{"down, after its end", then((*net.TCPConn).CloseWrite, snitest.Hello("data.example")), gets(string(data))},
		{"refused", says(snitest.Hello("absent.example")), gets(string(refused[:]))},
		{"without a word", then((*net.TCPConn).Close), nil},
		{"without a name", then((*net.TCPConn).Close, greeting[:100]), nil},
		{"without an answer", then((*net.TCPConn).Close, snitest.Hello("data.example")), nil},
		{"reset", then(cutOff, snitest.Hello("count.example"), data[:100_000]), nil},
		{"not wanted", then((*net.TCPConn).CloseWrite, snitest.Hello("rude.example"), data), nil},
	}}
}

// stay adds n whose connections are made use of for some time.
func (v *visitors) stay(n int) {
	parts, want := [][]byte{snitest.Hello("echo.example")}, []byte(nil)
	for i := range 64 {
		b := randomBytes(100 + i)
		parts, want = append(parts, b), append(want, b...)
	}
	for range n {
		v.kinds = append(v.kinds, visitor{"some time", then((*net.TCPConn).CloseWrite, parts...), gets(string(want))})
	}
}

// says returns what a visitor does that sends some parts, each on its own.
func says(parts ...[]byte) func(*net.TCPConn) error {
	return func(c *net.TCPConn) error {
		for i, b := range parts {
			if i > 0 {
				<-time.After(10 * time.Millisecond)
			}
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		return nil
	}
}

// then is like says, with what it does at last.
func then(last func(*net.TCPConn) error, parts ...[]byte) func(*net.TCPConn) error {
	return func(c *net.TCPConn) error {
		err := says(parts...)(c)
		last(c)
		return err
	}
}

func cutOff(c *net.TCPConn) error {
	c.SetLinger(0)
	return c.Close()
}

func gets(s string) func(*net.TCPConn) []byte {
	return func(*net.TCPConn) []byte { return []byte(s) }
}

// An outcome is what may become of a visitor that is not served well.
type outcome struct {
	fail bool // it may get an alert, or a part of what it wants and a reset
	end  bool // or a part of what it wants and an end
}

// come has one of each kind come at once. One more is there before, and is served at last.
func (v *visitors) come(when string, may outcome) {
	v.t.Helper()
	others := make(chan struct{})
	late := v.kinds[0]
	send := late.send
	late.name = "late"
	late.send = func(c *net.TCPConn) error {
		select {
		case <-others:
		case <-time.After(limits.Hello / 2):
		}
		return send(c)
	}
	var last, all sync.WaitGroup
	last.Go(func() { v.visit(late, when, may) })
	for _, kind := range v.kinds {
		all.Go(func() { v.visit(kind, when, may) })
	}
	all.Wait()
	close(others)
	last.Wait()
	select {
	case <-v.d.exited:
		v.t.Fatalf("the daemon ended when visitors came %s", when)
	default:
	}
}

func (v *visitors) visit(kind visitor, when string, may outcome) {
	c, err := net.DialTimeout("tcp", v.d.addr, hostdirtest.Patience)
	if err != nil {
		if !may.fail || !isReset(err) {
			v.t.Errorf("%s %s: %v", kind.name, when, err)
		}
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	var want []byte
	if kind.want != nil {
		want = kind.want(c.(*net.TCPConn))
	}
	var sender sync.WaitGroup
	var sendErr error
	sender.Go(func() { sendErr = kind.send(c.(*net.TCPConn)) })
	got, err := io.ReadAll(c)
	c.Close()
	sender.Wait()
	if err == nil && errors.Is(sendErr, syscall.ECONNRESET) {
		err = sendErr // the system tells of a reset once, and it was the sender whom it told
	}

	told := alert(got) >= 0 && alert(got) != int(sni.UserCanceled)
	why := ""
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		why = "it waited in vain"
	case kind.want == nil:
	case may.end && (bytes.HasPrefix(got, []byte("error: ")) || bytes.Contains(got, []byte(" bytes, "))): // so says the backend, which did not get all
	case !bytes.HasPrefix(want, got) && !(told && may.fail):
		why = "these are not the right bytes"
	case err == nil && len(got) == len(want):
	case !may.fail:
		why = "it was not served"
	case err == nil && len(got) > 0 && !told && !may.end:
		why = "it cannot tell that this is not all"
	}
	if why != "" {
		v.t.Errorf("%s %s: got %d of %d bytes, %.100q, error %v: %s", kind.name, when, len(got), len(want), got, err, why)
	}
}
