package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// startSingle starts a daemon with a connection on standard input. It has the only descriptors of
// it, and is not waited for.
func startSingle(t testing.TB, hosts string, setups ...setup) (*daemon, *net.TCPConn) {
	t.Helper()
	client, server := connect(t)
	d := launch(t, server, hosts, setups...)
	server.Close()
	return d, client
}

// onAll has the connection on descriptors 0, 1 and 2, as inetd does.
func onAll(cmd *exec.Cmd) { cmd.Stdout, cmd.Stderr = cmd.Stdin.(*os.File), cmd.Stdin.(*os.File) }

// say sends b to the daemon.
func say(t testing.TB, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Error(err)
	}
}

// Goal: the daemon serves a connection on standard input, prints nothing, and ends with it, with
// status 0. The hello may be there before the daemon, or come byte by byte.
func TestSingle(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	h := snitest.Hello("a.example")
	for name, begin := range map[string]func(*net.TCPConn){
		"at once":       func(c *net.TCPConn) { say(t, c, h) },
		"byte by byte":  func(c *net.TCPConn) { sendSlowly(t, c, h) },
		"and half-ends": func(c *net.TCPConn) { say(t, c, h); c.CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			d, client := startSingle(t, hosts)
			begin(client)
			if got := readAll(t, client); got != "this is a.example" {
				t.Errorf("the answer is %q", got)
			}
			client.Close()
			d.expectExit(0)
			if out, err := d.out.String(), d.err.String(); out != "" || err != "" {
				t.Errorf("standard output has %q, standard error %q", out, err)
			}
		})
	}
	t.Run("before", func(t *testing.T) {
		client, server := connect(t)
		say(t, client, h)
		d := launch(t, server, hosts)
		server.Close()
		if got := readAll(t, client); got != "this is a.example" {
			t.Errorf("the answer is %q", got)
		}
		client.Close()
		d.expectExit(0)
	})
}

func sendSlowly(t testing.TB, c net.Conn, b []byte) {
	t.Helper()
	for i := range b {
		say(t, c, b[i:i+1])
	}
}

// Goal: bulk flows both ways through a single connection, unchanged, and goes on after the client
// has ended its side.
func TestSingleBulk(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "echo.example"), hostdirtest.Echo)
	d, client := startSingle(t, hosts)
	say(t, client, snitest.Hello("echo.example"))
	ping(t, client, client)
	want := randomBytes(20 << 20)
	go func() {
		client.Write(want)
		client.CloseWrite()
	}()
	if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d came back, or others, error %v", len(got), len(want), err)
	}
	client.Close()
	d.expectExit(0)
}

// Goal: the PROXY protocol header has the addresses of the connection, of either family.
func TestSingleHeader(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), headerOf)
	hostdirtest.Must(t, os.WriteFile(hostPath(t, hosts, "a.example", "send-proxy-v1"), nil, 0o644))
	for _, tt := range []struct{ network, listen, family string }{
		{"tcp4", "127.0.0.1:0", "TCP4 127.0.0.1 127.0.0.1"},
		{"tcp6", "[::1]:0", "TCP6 ::1 ::1"},
	} {
		t.Run(tt.network, func(t *testing.T) {
			if tt.network == "tcp6" {
				hostdirtest.NeedIPv6(t)
			}
			l := hostdirtest.ListenTCP(t, tt.network, tt.listen)
			client, server := connectTo(t, l)
			d := launch(t, server, hosts)
			server.Close()
			say(t, client, snitest.Hello("a.example"))
			want := fmt.Sprintf("PROXY %s %d %d\r\n", tt.family, localAddr(client).Port(), l.Addr().(*net.TCPAddr).Port)
			if got := readAll(t, client); got != want {
				t.Errorf("the header is %q, want %q", got, want)
			}
			client.Close()
			d.expectExit(0)
		})
	}
}

// Goal: a refused client gets its alert and the end. The daemon ends with status 0, with a line on
// standard error.
func TestSingleRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		hello []byte
		want  int
	}{
		"unknown host": {snitest.Hello("unknown.example"), 112},
		"no TLS":       {[]byte("GET / HTTP/1.1\r\n\r\n"), 10},
		"end":          {snitest.Hello("")[:9], 50},
		"end at once":  {nil, 50},
	} {
		t.Run(name, func(t *testing.T) {
			d, client := startSingle(t, hostdirtest.Dir(t))
			say(t, client, tt.hello)
			if strings.HasPrefix(name, "end") {
				client.CloseWrite()
			}
			if got := readAll(t, client); alert([]byte(got)) != tt.want {
				t.Errorf("got %x, want alert %d", got, tt.want)
			}
			client.Close()
			d.expectExit(0)
			if tt.hello == nil { // a health check
				if got := d.err.String(); got != "" {
					t.Errorf("standard error has %q", got)
				}
				return
			}
			expectComplaint(t, d, "refused "+client.LocalAddr().String(), fmt.Sprintf("(alert %d,", tt.want))
			if got := d.out.String(); got != "" {
				t.Errorf("standard output has %q", got)
			}
		})
	}
}

// Goal: a silent client gets its alert after its ten seconds, and the daemon ends with status 0.
func TestSingleSilent(t *testing.T) {
	t.Parallel()
	d, client := startSingle(t, hostdirtest.Dir(t))
	if got := readAll(t, client); alert([]byte(got)) != 90 {
		t.Errorf("got %x, want alert 90", got)
	}
	client.Close()
	d.expectExit(0)
}

// Goal: a client that left before the daemon began, with an end or a reset, with or without a
// hello, is no failure.
func TestSingleGone(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	for _, reset := range []bool{false, true} {
		for _, said := range [][]byte{nil, snitest.Hello("a.example")} {
			t.Run(fmt.Sprintf("reset %v, %d bytes", reset, len(said)), func(t *testing.T) {
				client, server := connect(t)
				say(t, client, said)
				if reset {
					client.SetLinger(0)
				}
				client.Close()
				if reset {
					hostdirtest.Await(t, "the reset", func() bool {
						gone := false
						sharer{t, server}.do(func(fd int) error {
							_, err := unix.Getpeername(fd)
							gone = err != nil
							return nil
						})
						return gone
					})
				}
				d := launch(t, server, hosts)
				server.Close()
				d.expectExit(0)
				if got := d.out.String(); got != "" {
					t.Errorf("standard output has %q", got)
				}
			})
		}
	}
}

// Goal: with the connection on 0, 1 and 2, as inetd has it, the client gets what the backend says,
// or its alert, and not a byte of the daemon's own lines: about the client, about signals, or the
// usage.
func TestSingleOnAll(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	t.Run("served", func(t *testing.T) {
		d, client := startSingle(t, hosts, onAll)
		say(t, client, snitest.Hello("a.example"))
		if got := readAll(t, client); got != "this is a.example" {
			t.Errorf("the client got %q", got)
		}
		client.Close()
		d.expectExit(0)
	})
	t.Run("refused", func(t *testing.T) {
		d, client := startSingle(t, hosts, onAll)
		say(t, client, snitest.Hello("unknown.example"))
		if got := readAll(t, client); alert([]byte(got)) != 112 {
			t.Errorf("the client got %q", got)
		}
		client.Close()
		d.expectExit(0)
	})
	t.Run("signals", func(t *testing.T) {
		l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
		d, client := startSingle(t, hosts, onAll)
		backend := pairSingle(t, l, client, "live.example")
		d.signal(syscall.SIGHUP)
		ping(t, client, backend)
		ping(t, backend, client)
		d.signal(syscall.SIGTERM) // a second SIGHUP might come before the first is taken
		if status := d.wait(); status != 0 {
			t.Errorf("status %d, want 0", status)
		}
		if got, _ := io.ReadAll(client); len(got) > 0 {
			t.Errorf("the client got %q", got)
		}
	})
	for arg, want := range map[string]int{"-h": 0, "-v": 2} {
		t.Run("usage "+arg, func(t *testing.T) {
			d, client := startSingle(t, hosts, onAll, func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, arg) })
			if status := d.wait(); status != want {
				t.Errorf("status %d, want %d", status, want)
			}
			if got := readAll(t, client); got != "" {
				t.Errorf("the client got %q", got)
			}
		})
	}
	t.Run("no engine", func(t *testing.T) {
		d, client := startSingle(t, hosts, onAll, limitFiles(8))
		if status := d.wait(); status <= 0 { // Go's runtime may end it, with a message of its own
			t.Errorf("status %d", status)
		}
		if got := readAll(t, client); got != "" {
			t.Errorf("the client got %q", got)
		}
	})
}

// pairSingle opens the connection of a single client to a backend.
func pairSingle(t testing.TB, l *net.UnixListener, client net.Conn, name string) *net.UnixConn {
	t.Helper()
	say(t, client, snitest.Hello(name))
	l.SetDeadline(time.Now().Add(hostdirtest.Patience))
	backend, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { backend.Close() })
	backend.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	if _, _, err := hostdirtest.ReadHello(backend); err != nil {
		t.Fatal(err)
	}
	return backend
}

// Goal: after a signal the connection goes on, even if its hello comes only then, and the daemon
// ends with it. A second signal ends it at once.
func TestSingleStop(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	for _, s := range stopSignals[:3] {
		told := "got " + unix.SignalName(s) + ", shutting down"
		t.Run(unix.SignalName(s), func(t *testing.T) {
			d, client := startSingle(t, hosts)
			backend := pairSingle(t, l, client, "live.example")
			d.signal(s)
			d.out.Await(t, told)
			ping(t, client, backend)
			ping(t, backend, client)
			backend.Close()
			if got := readAll(t, client); got != "" {
				t.Errorf("the client got %q", got)
			}
			client.Close()
			d.expectExit(0)
		})
		t.Run(unix.SignalName(s)+" before the hello", func(t *testing.T) {
			client, server := connect(t)
			d := launch(t, server, hosts)
			h := snitest.Hello("a.example")
			say(t, client, h[:10])
			awaitTaken(t, server)
			server.Close()
			d.signal(s)
			d.out.Await(t, told)
			say(t, client, h[10:])
			if got := readAll(t, client); got != "this is a.example" {
				t.Errorf("the client got %q", got)
			}
			client.Close()
			d.expectExit(0)
		})
		t.Run("second "+unix.SignalName(s), func(t *testing.T) {
			d, client := startSingle(t, hosts)
			backend := pairSingle(t, l, client, "live.example")
			d.signal(s)
			d.out.Await(t, told)
			ping(t, client, backend)
			d.signal(s)
			if status := d.wait(); status != 0 {
				t.Errorf("status %d, want 0", status)
			}
			expectComplaint(t, d, "got "+unix.SignalName(s)+" again", "1 connection")
		})
	}
}

// awaitTaken waits until what has come on a connection was read.
func awaitTaken(t testing.TB, server *os.File) {
	t.Helper()
	hostdirtest.Await(t, "the daemon to read what there is", func() bool {
		taken := false
		sharer{t, server}.do(func(fd int) error {
			_, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			taken = err == unix.EAGAIN
			return nil
		})
		return taken
	})
}

// Goal: a connection that stays open is cut ten seconds after the signal, with status 0.
func TestSingleCut(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	d, client := startSingle(t, hosts)
	backend := pairSingle(t, l, client, "live.example")
	begin := time.Now()
	d.signal(syscall.SIGTERM)
	d.out.Await(t, "got SIGTERM, shutting down")
	ping(t, client, backend)
	if status := d.wait(); status != 0 {
		t.Errorf("status %d, want 0", status)
	}
	if waited := time.Since(begin); waited < 10*time.Second {
		t.Errorf("cut after %v", waited)
	}
	expectComplaint(t, d, "1 connection")
}

// Goal: whoever shares the connection, such as the script that started the daemon, may make it
// blocking at any time. One side's bytes flow even if the other side says nothing, or does not
// read.
func TestSingleMadeBlocking(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	client, server := connect(t)
	s := sharer{t, server}
	s.block()
	client.SetReadBuffer(64 << 10)
	s.do(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10) })
	d := launch(t, server, hosts)
	var over atomic.Bool
	var blocking sync.WaitGroup
	blocking.Go(func() {
		for !over.Load() {
			s.block()
		}
	})
	defer blocking.Wait()
	defer over.Store(true)
	backend := pairSingle(t, l, client, "live.example")
	for range 20 {
		ping(t, client, backend)
		ping(t, backend, client)
		ping(t, backend, client)
	}
	// The client reads nothing until the backend has all that it says, and then the other way.
	const size = 4 << 20 // more than all buffers on the way
	for _, way := range [][2]net.Conn{{client, backend}, {backend, client}} {
		stuck := make(chan error)
		go func() {
			_, err := way[1].Write(make([]byte, size))
			stuck <- err
		}()
		go way[0].Write(make([]byte, size))
		if n, err := io.ReadFull(way[1], make([]byte, size)); err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		if n, err := io.ReadFull(way[0], make([]byte, size)); err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		if err := <-stuck; err != nil {
			t.Error(err)
		}
	}
	backend.CloseWrite()
	if got := readAll(t, client); got != "" {
		t.Errorf("the client got %q", got)
	}
	client.Close()
	d.expectExit(0)
}

// Goal: a single connection has the same options as connections that the daemon accepts.
func TestSingleOptions(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	client, server := connect(t)
	d := launch(t, server, hosts)
	backend := pairSingle(t, l, client, "live.example")
	sharer{t, server}.do(func(fd int) error {
		for name, option := range map[string][2]int{
			"TCP_NODELAY":  {unix.IPPROTO_TCP, unix.TCP_NODELAY},
			"SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE},
		} {
			if value, err := unix.GetsockoptInt(fd, option[0], option[1]); err != nil || value == 0 {
				t.Errorf("%s is %d, error %v", name, value, err)
			}
		}
		return nil
	})
	client.Close()
	backend.Close()
	d.expectExit(0)
}

// Goal: a connection that systemd passes as the only socket is served as on standard input.
// Standard input is left alone.
func TestSinglePassed(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	client, server := connect(t)
	d := launch(t, nil, hosts, pass(server))
	server.Close()
	say(t, client, snitest.Hello("a.example"))
	if got := readAll(t, client); got != "this is a.example" {
		t.Errorf("the answer is %q", got)
	}
	client.Close()
	d.expectExit(0)
	if got := d.out.String(); got != "" {
		t.Errorf("standard output has %q", got)
	}
}

// Goal: a daemon for one connection is small: one loop, however many processors there are, and
// less than 6 MiB of memory.
func TestSingleCost(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	l := hostdirtest.Listen(t, hostDir(hosts, "live.example"))
	binary := build(t)
	client, server := connect(t)
	begin := time.Now()
	d := launch(t, server, hosts, binary, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=8") })
	server.Close()
	pairSingle(t, l, client, "live.example")
	took, rss := time.Since(begin), d.rss()
	t.Logf("%v from the start to the hello at the backend, %d KiB", took, rss>>10)
	if limit := 6 << 20; rss >= limit {
		t.Errorf("the daemon has %d KiB of memory, want less than %d", rss>>10, limit>>10)
	}
	pollers, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range pollers {
		if to, _ := os.Readlink(fd); strings.Contains(to, "eventpoll") {
			n++
		}
	}
	if n > 2 { // that of Go's runtime, and that of the loop
		t.Errorf("%d pollers, want 2 at most", n)
	}
}
