package examples_test

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// limit is how long the commands of s6 wait, in milliseconds.
const limit = "20000"

// An s6Service is the example service directory, under a running s6-supervise.
type s6Service struct {
	t         *testing.T
	dir       string
	hosts     string
	addr      string
	supervise *exec.Cmd
}

// startS6 starts the service directory, and waits until it is ready.
func startS6(t *testing.T) *s6Service {
	t.Helper()
	hostdirtest.NeedRoot(t)
	for _, name := range []string{"s6-supervise", "s6-svc", "s6-svwait", "s6-svstat", "unshare"} {
		hostdirtest.Need(t, name)
	}
	root, hosts := chroot(t)
	port := freePort(t)
	s := &s6Service{t: t, dir: hostdirtest.Dir(t), hosts: hosts, addr: "127.0.0.1:" + port}
	example(t, "s6/run", s.dir,
		"\nroot=/srv/sniproxy\n", "\nroot="+root+"\n",
		"\nuser=sniproxy\n", "\nuser=nobody\n",
		"\naddress=:443\n", "\naddress=127.0.0.1:"+port+"\n",
		"\nexec /usr/local/bin/sniproxy-listen ", "\nexec "+build(t, "sniproxy-listen")+" ")
	example(t, "s6/notification-fd", s.dir)
	s.supervise = exec.Command("s6-supervise", s.dir)
	start(t, s.supervise)
	hostdirtest.Await(t, "s6-supervise", func() bool { return exec.Command("s6-svstat", s.dir).Run() == nil })
	command(t, "s6-svwait", "-U", "-t"+limit, s.dir)
	if !canConnect(s.addr) {
		t.Error("the service is not ready when s6 says so")
	}
	return s
}

// child returns the process that sniproxy is.
func (s *s6Service) child() int {
	s.t.Helper()
	return onlyChild(s.t, s.supervise.Process.Pid)
}

// stop stops the service, then its supervisor.
func (s *s6Service) stop() {
	s.t.Helper()
	command(s.t, "s6-svc", "-wD", "-T"+limit, "-d", s.dir)
	if got := command(s.t, "s6-svstat", "-o", "up,exitcode", s.dir); got != "false 0" {
		s.t.Errorf("up and exit code after the stop: %s, want false 0", got)
	}
	if !canListen(s.addr) {
		s.t.Error("the port is not free after the stop")
	}
	command(s.t, "s6-svc", "-x", s.dir)
	if err := s.supervise.Wait(); err != nil {
		s.t.Error(err)
	}
}

// Goal: the s6 service directory serves from its chroot as an unprivileged user, is ready when it
// says so, survives kill -9, and stops gracefully.
func TestS6(t *testing.T) {
	t.Parallel()
	s := startS6(t)
	serve(t, s.hosts, "a.example")
	hello := snitest.Hello("a.example")
	first := s.child()
	if got := visible(t, first, "/hosts"); got != "/bin /bin/sniproxy /hosts" {
		t.Errorf("sniproxy sees %s", got)
	}
	served := startLoad(t, s.addr, hello)
	served.more(500)
	served.end()

	command(t, "s6-svc", "-wR", "-T"+limit, "-k", s.dir)
	if err := exchange(s.addr, hello); err != nil {
		t.Error(err)
	}
	if second := s.child(); second == first {
		t.Errorf("process %d serves after kill -9", first)
	}
	s.stop()
}

// Goal: after s6-svc -r under load the service is there again, and every client that was accepted
// is served to its end, even one that stays. Each start binds the port anew, so other clients are
// lost: refused until the new program has bound it, or reset by the kernel if they waited in the
// old socket's backlog. Nobody gets a cut or wrong answer.
func TestS6Restart(t *testing.T) {
	t.Parallel()
	s := startS6(t)
	serve(t, s.hosts, "stays.example")
	reached := serve(t, s.hosts, "a.example")
	h := snitest.Hello("a.example")

	var over atomic.Bool
	var served, refused, reset atomic.Int64
	var clients sync.WaitGroup
	stop := sync.OnceFunc(func() {
		over.Store(true)
		clients.Wait()
	})
	defer stop()
	for range 8 {
		clients.Go(func() {
			again := time.NewTicker(10 * time.Millisecond)
			defer again.Stop()
			for !over.Load() {
				err := exchange(s.addr, h)
				switch {
				case err == nil:
					served.Add(1)
					continue
				case errors.Is(err, syscall.ECONNREFUSED):
					refused.Add(1)
				case errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN):
					reset.Add(1)
				default:
					t.Errorf("a client got: %v", err)
					return
				}
				<-again.C
			}
		})
	}
	more := func(n int64) {
		t.Helper()
		n += served.Load()
		hostdirtest.Await(t, fmt.Sprintf("%d clients served", n), func() bool { return served.Load() >= n || t.Failed() })
	}
	more(500)
	old := s.child()
	for range 2 {
		command(t, "s6-svc", "-wR", "-T"+limit, "-r", s.dir)
		more(500)
		child := s.child()
		if child == old {
			t.Errorf("process %d serves after the restart", old)
		}
		old = child
	}

	stays, err := connect(s.addr, snitest.Hello("stays.example"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stays, make([]byte, 1)); err != nil { // it has reached its backend
		t.Fatal(err)
	}
	restarting := exec.Command("s6-svc", "-wR", "-T"+limit, "-r", s.dir)
	start(t, restarting)
	hostdirtest.Await(t, "clients to be refused", func() bool { return !canConnect(s.addr) })
	if !executes(old, daemon(t)) {
		t.Error("the old program has ended before its client")
	}
	stays.hello = stays.hello[1:]
	if err := stays.finish(); err != nil {
		t.Errorf("the client that stayed: %v", err)
	}
	if err := restarting.Wait(); err != nil {
		t.Errorf("%s: %v", restarting, err)
	}
	more(500)
	stop()
	t.Logf("%d clients served, %d refused, %d reset before they were accepted", served.Load(), refused.Load(), reset.Load())
	// So nobody who has reached the backend was cut.
	if got := reached.Load(); got != served.Load() {
		t.Errorf("%d clients have reached the backend, %d were served", got, served.Load())
	}
	s.stop()
}
