package main

import (
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// A sharer is another process that has a descriptor of the daemon's: this one.
type sharer struct {
	t    testing.TB
	file *os.File
}

func share(t testing.TB, l *net.TCPListener) sharer {
	t.Helper()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return sharer{t, f}
}

// do calls a function with the descriptor.
func (s sharer) do(call func(fd int) error) {
	s.t.Helper()
	raw, err := s.file.SyscallConn()
	if err != nil {
		s.t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { err = call(int(fd)) }); failed != nil || err != nil {
		s.t.Fatal(failed, err)
	}
}

// block clears O_NONBLOCK, for all who share the socket.
func (s sharer) block() {
	s.t.Helper()
	s.do(func(fd int) error { return unix.SetNonblock(fd, false) })
}

// keepBlocking clears O_NONBLOCK over and over until stop is called.
func (s sharer) keepBlocking() (stop func()) {
	over := make(chan struct{})
	var blocking sync.WaitGroup
	blocking.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.block()
			case <-over:
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(over)
		blocking.Wait()
	})
}

// Goal: a listening socket that is handed over blocking is served like any other. The stop works
// although somebody else still has the socket.
func TestListenerBlocking(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	s := share(t, l)
	d := startOn(t, l, hostdirtest.Dir(t), func(*exec.Cmd) { s.block() })
	d.serve("a.example", hostdirtest.Greet)
	host := d.host("live.example")
	client, backend := d.pair(host, "live.example")
	for range 20 {
		hostdirtest.Must(t, d.greeted("a.example"))
		s.block()
		ping(t, client, backend) // with accept at rest
	}
	s.block()
	client.Close()
	backend.Close()
	d.signal(syscall.SIGHUP)
	d.expectExit(0)
}

// Goal: a listening socket that somebody makes blocking over and over stalls neither new
// connections nor old ones, nor the stop.
func TestListenerMadeBlocking(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostdirtest.Dir(t))
	d.serve("a.example", hostdirtest.Greet)
	host := d.host("live.example")
	client, backend := d.pair(host, "live.example")
	stop := share(t, l).keepBlocking()
	defer stop()
	served, stopLoad := d.load("a.example")
	defer stopLoad()
	for range 20 {
		awaitMore(t, served, 50)
		ping(t, client, backend)
		ping(t, backend, client)
	}
	stopLoad()
	d.signal(syscall.SIGHUP)
	// The end of the last connection is the end of the daemon, so it has noticed the stop
	// by then, although no client comes that could wake a blocked accept.
	ping(t, client, backend)
	client.Close()
	backend.Close()
	d.expectExit(0)
}

// Goal: another process that accepts from the same socket, and takes clients away for which the
// daemon woke up, stalls neither clients nor the stop.
func TestListenerShared(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostdirtest.Dir(t))
	d.serve("a.example", hostdirtest.Greet)
	host := d.host("live.example")
	client, backend := d.pair(host, "live.example")

	// The other process is one of the simplest kind: accept blocks.
	s := share(t, l)
	var over atomic.Bool
	var taken atomic.Int64
	var thief sync.WaitGroup
	thief.Go(func() {
		for !over.Load() {
			s.block()
			var fd int
			var err error
			s.do(func(listener int) error {
				fd, _, err = unix.Accept(listener)
				return nil
			})
			if err != nil {
				continue // as when the daemon has set a time limit, or the flag
			}
			taken.Add(1)
			unix.Write(fd, []byte("taken"))
			unix.Close(fd)
		}
	})
	stopThief := sync.OnceFunc(func() {
		over.Store(true)
		if c, err := net.Dial("tcp", d.addr); err == nil { // it may be in accept
			defer c.Close()
		}
		thief.Wait()
	})
	defer stopThief()

	var served atomic.Int64
	var stopLoad atomic.Bool
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for !stopLoad.Load() {
				c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(hostdirtest.Patience))
				c.Write(snitest.Hello("a.example"))
				got, err := io.ReadAll(c)
				c.Close()
				switch {
				case string(got) == "this is a.example":
					served.Add(1)
				case string(got) == "taken" || len(got) == 0 && isReset(err): // by the other, who leaves the hello unread
				default:
					t.Errorf("got %q, error %v", got, err)
					return
				}
			}
		})
	}
	for range 20 {
		before := taken.Load()
		awaitMore(t, &served, 20)
		hostdirtest.Await(t, "clients to be taken away", func() bool { return taken.Load() >= before+20 || t.Failed() })
		ping(t, client, backend)
		ping(t, backend, client)
	}
	stopLoad.Store(true)
	clients.Wait()
	d.signal(syscall.SIGHUP)
	client.Close()
	backend.Close()
	d.expectExit(0)
}

// Goal: two daemons on one socket, which somebody makes blocking all the time, take clients from
// each other without a stall. Each stops when it is told to.
func TestListenerTwoCopies(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	hostdirtest.Serve(t, hostDir(hosts, "echo.example"), hostdirtest.Echo)
	stop := share(t, l).keepBlocking()
	defer stop()
	first := startOn(t, l, hosts)
	second := startOn(t, l, hosts)
	// It is not known which of the two has which connection.
	var conns []net.Conn
	for range 20 {
		c := first.dial()
		c.Write(snitest.Hello("echo.example"))
		ping(t, c, c)
		conns = append(conns, c)
	}
	served, stopLoad := first.load("a.example")
	defer stopLoad()
	for range 10 {
		awaitMore(t, served, 50)
		for _, c := range conns {
			ping(t, c, c)
		}
	}
	first.signal(syscall.SIGHUP)
	first.out.Await(t, "shutting down")
	awaitMore(t, served, 200)
	for _, c := range conns {
		ping(t, c, c)
		c.Close()
	}
	first.expectExit(0)
	awaitMore(t, served, 200)
	stopLoad()
	second.signal(syscall.SIGHUP)
	second.expectExit(0)
}

// Goal: with the listening socket on 0, 1 and 2, where nothing can be written, the daemon serves
// and stops cleanly, and no client ever gets a line of the log.
func TestListenerOnAll(t *testing.T) {
	d := startInetd(t)
	d.serve("a.example", hostdirtest.Greet)
	l := d.host("live.example")
	var clients []*net.TCPConn
	var backends []*net.UnixConn
	for range 10 {
		client, backend := d.pair(l, "live.example")
		clients, backends = append(clients, client), append(backends, backend)
	}
	for range 50 {
		hostdirtest.Must(t, d.greeted("a.example"))
		d.expectAlert(snitest.Hello("unknown.example"), 112)
	}
	silent := d.dial()
	d.signal(syscall.SIGHUP)
	d.awaitFree()
	for i, client := range clients {
		ping(t, backends[i], client)
		backends[i].CloseWrite()
		if got, err := io.ReadAll(client); len(got) > 0 || err != nil {
			t.Errorf("a client got %q, error %v, want the end", got, err)
		}
		client.Close()
	}
	silent.CloseWrite()
	// If it came in before the stop, it gets an alert, and if not, a reset.
	if got, err := io.ReadAll(silent); !isReset(err) && alert(got) != 50 {
		t.Errorf("a client got %q, error %v", got, err)
	}
	silent.Close()
	d.expectExit(0)
}

// Goal: whatever is wrong with standard output and error, the daemon serves on, also when it has
// something to say, and stops properly.
func TestOutputBroken(t *testing.T) {
	use := func(t *testing.T, d *daemon) {
		d.serve("a.example", hostdirtest.Greet)
		host := d.host("live.example")
		client, backend := d.pair(host, "live.example")
		for range 2 {
			for range 20 {
				hostdirtest.Must(t, d.greeted("a.example"))
				d.expectAlert(snitest.Hello("unknown.example"), 112)
			}
			ping(t, client, backend)
			d.exhaust()
		}
		d.signal(syscall.SIGHUP)
		d.awaitFree()
		ping(t, backend, client)
		client.Close()
		backend.Close()
		d.expectExit(0)
	}
	run := func(t *testing.T, output *os.File, setups ...setup) *daemon {
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		defer l.Close()
		return startOn(t, l, hostdirtest.Dir(t), append([]setup{output1(output), output2(output)}, setups...)...)
	}
	t.Run("reader gone", func(t *testing.T) {
		r, w := openPipe(t)
		r.Close()
		use(t, run(t, w, limitFiles(64)))
	})
	t.Run("full", func(t *testing.T) {
		_, w := openPipe(t)
		fill(t, w)
		use(t, run(t, w, limitFiles(64)))
	})
	t.Run("full and non-blocking", func(t *testing.T) {
		_, w := openPipe(t)
		fill(t, w)
		d := run(t, w, limitFiles(64)) // which makes it blocking
		sharer{t, w}.do(func(fd int) error { return unix.SetNonblock(fd, true) })
		use(t, d)
	})
	t.Run("closed", func(t *testing.T) {
		_, w := openPipe(t)
		use(t, run(t, w, func(cmd *exec.Cmd) {
			cmd.Args = []string{"sh", "-c", `ulimit -n 64; exec "$0" >&- 2>&-`, cmd.Path}
			cmd.Path = "/bin/sh"
		}))
	})
}

func openPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

// fill writes to a pipe until it is full.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	sharer{t, w}.do(func(fd int) error {
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		for _, size := range []int{4096, 1} { // single bytes at the end
			var err error
			for b := make([]byte, size); err == nil; {
				_, err = unix.Write(fd, b)
			}
			if err != unix.EAGAIN {
				return err
			}
		}
		return nil
	})
}

// Goal: two copies on one socket that somebody makes blocking all the time serve thousands of
// clients without a failure, and each stops when it is told to.
func TestListenerManyClients(t *testing.T) {
	clients := 20_000
	if testing.Short() || raceEnabled {
		clients = 4_000
	}
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	stop := share(t, l).keepBlocking()
	defer stop()
	several := func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=3") }
	first := startOn(t, l, hosts, several)
	second := startOn(t, l, hosts, several)
	inParallel(clients, 16, func(int) {
		if err := first.greeted("a.example"); err != nil { // or the second, on the same address
			t.Error(err)
		}
	})
	for _, d := range []*daemon{first, second} {
		d.signal(syscall.SIGHUP)
		d.expectExit(0)
	}
}
