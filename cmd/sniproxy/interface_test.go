package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: any argument but -h gives the usage on standard error and status 2, even if the socket is
// right. -h gives it on standard output, and status 0. Both have the version.
func TestArguments(t *testing.T) {
	for _, args := range [][]string{{"-h"}, {"-h", "x"}, {"--help"}, {"-version"}, {"8443"}, {""}, {"--"}, {"a", "b"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			f := socketFile(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"))
			d := launch(t, f, hostdirtest.Dir(t), func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, args...) })
			want, text, other := 2, d.err, d.out
			if args[0] == "-h" {
				want, text, other = 0, d.out, d.err
			}
			if status := d.wait(); status != want {
				t.Errorf("status %d, want %d", status, want)
			}
			if got := text.String(); !strings.HasPrefix(got, "usage: sniproxy") || !strings.Contains(got, "\nThis is version ") {
				t.Errorf("no usage: %q", got)
			}
			if got := other.String(); got != "" {
				t.Errorf("besides it says %q", got)
			}
		})
	}
}

// Goal: standard input that is neither a listening TCP socket nor a connection is refused with one
// line, which says what was found and what to do.
func TestWrongStdin(t *testing.T) {
	for _, c := range []struct {
		name  string
		found string // a part of the line
		open  func(t *testing.T) *os.File
	}{
		{"null device", "/dev/null", func(t *testing.T) *os.File { return openFile(t, os.DevNull) }},
		{"file", "a file", func(t *testing.T) *os.File {
			path := filepath.Join(t.TempDir(), "file")
			hostdirtest.Must(t, os.WriteFile(path, nil, 0o644))
			return openFile(t, path)
		}},
		{"directory", "a directory", func(t *testing.T) *os.File { return openFile(t, t.TempDir()) }},
		{"pipe", "a pipe", func(t *testing.T) *os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { r.Close(); w.Close() })
			return r
		}},
		{"UDP", "UDP", func(t *testing.T) *os.File {
			c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			return socketFile(t, c)
		}},
		{"listening Unix socket", "Unix socket", func(t *testing.T) *os.File {
			return socketFile(t, hostdirtest.Listen(t, hostDir(hostdirtest.Dir(t), "a.example")))
		}},
		{"Unix datagram socket", "Unix socket", func(t *testing.T) *os.File {
			return socketFD(t, unix.AF_UNIX, unix.SOCK_DGRAM, nil)
		}},
		{"bound TCP socket", "does not listen", func(t *testing.T) *os.File {
			return socketFD(t, unix.AF_INET, unix.SOCK_STREAM, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		}},
		{"fresh TCP socket", "does not listen", func(t *testing.T) *os.File {
			return socketFD(t, unix.AF_INET, unix.SOCK_STREAM, nil)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			launch(t, c.open(t), hostdirtest.Dir(t)).expectRefusal(c.found)
		})
	}
	t.Run("closed", func(t *testing.T) {
		launch(t, nil, hostdirtest.Dir(t), func(cmd *exec.Cmd) {
			cmd.Args = []string{"sh", "-c", `exec "$0" <&-`, cmd.Path}
			cmd.Path = "/bin/sh"
		}).expectRefusal("closed")
	})
}

// expectRefusal fails the test unless the daemon ends with one line about its standard
// input, in which found is part of what was found.
func (d *daemon) expectRefusal(found string) {
	d.t.Helper()
	if status := d.wait(); status != 1 {
		d.t.Errorf("status %d, want 1", status)
	}
	got := d.err.String()
	line, rest, _ := strings.Cut(got, "\n")
	if !strings.HasPrefix(line, "sniproxy: ") || rest != "" || !strings.HasSuffix(got, "\n") {
		d.t.Errorf("standard error is not one line that begins with the program's name: %q", got)
	}
	if !strings.Contains(line, found) {
		d.t.Errorf("%q does not say what was found, %q", line, found)
	}
	if !strings.Contains(line, "must be a listening TCP socket") {
		d.t.Errorf("%q does not say what to do", line)
	}
	if got := d.out.String(); got != "" {
		d.t.Errorf("standard output has %q", got)
	}
}

func openFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// socketFile returns a file for the socket of something from package net.
func socketFile(t *testing.T, s interface{ File() (*os.File, error) }) *os.File {
	t.Helper()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// socketFD returns a new socket, bound to addr if that is not nil.
func socketFD(t *testing.T, domain, kind int, addr unix.Sockaddr) *os.File {
	t.Helper()
	fd, err := unix.Socket(domain, kind, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	t.Cleanup(func() { f.Close() })
	if addr != nil {
		hostdirtest.Must(t, unix.Bind(fd, addr))
	}
	return f
}

// Goal: IPv4, IPv6, dual-stack and MPTCP listeners are served. The only line on standard output has
// the address.
func TestListening(t *testing.T) {
	for _, c := range []struct {
		network, addr string
		clients       []string
	}{
		{"tcp4", "127.0.0.1:0", []string{"127.0.0.1"}},
		{"tcp4", "0.0.0.0:0", []string{"127.0.0.1"}},
		{"tcp6", "[::1]:0", []string{"::1"}},
		{"tcp6", "[::]:0", []string{"::1"}},
		{"tcp", "[::]:0", []string{"127.0.0.1", "::1"}},
		{"mptcp", "127.0.0.1:0", []string{"127.0.0.1"}},
	} {
		t.Run(c.network+" "+c.addr, func(t *testing.T) {
			var l *net.TCPListener
			switch c.network {
			case "mptcp": // as Go gives it by default
				m, err := net.Listen("tcp", c.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				l = m.(*net.TCPListener)
			case "tcp4":
				l = hostdirtest.ListenTCP(t, c.network, c.addr)
			default:
				hostdirtest.NeedIPv6(t)
				l = hostdirtest.ListenTCP(t, c.network, c.addr)
			}
			d := startOn(t, l, hostdirtest.Dir(t))
			d.serve("a.example", hostdirtest.Greet)
			port := fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
			for _, client := range c.clients {
				d.addr = net.JoinHostPort(client, port)
				if err := d.greeted("a.example"); err != nil {
					t.Errorf("client %s: %v", client, err)
				}
			}
			if got, want := d.out.String(), fmt.Sprintf("listening on %v\n", l.Addr()); got != want {
				t.Errorf("standard output is %q, want %q", got, want)
			}
			if got := d.err.String(); got != "" {
				t.Errorf("standard error has %q", got)
			}
		})
	}
}

// The signals that stop a daemon, those with the ten seconds first.
var stopSignals = []syscall.Signal{syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT}

// Goal: each of the four signals stops an idle daemon with status 0 and one line, and the port is
// free.
func TestStopSignals(t *testing.T) {
	for _, s := range stopSignals {
		t.Run(unix.SignalName(s), func(t *testing.T) {
			d := start(t)
			d.serve("a.example", hostdirtest.Greet)
			hostdirtest.Must(t, d.greeted("a.example"))
			d.signal(s)
			if status := d.wait(); status != 0 {
				t.Errorf("status %d, want 0", status)
			}
			want := fmt.Sprintf("listening on %s\ngot %s, shutting down\n", d.addr, unix.SignalName(s))
			if got := d.out.String(); got != want {
				t.Errorf("standard output is %q, want %q", got, want)
			}
			if got := d.err.String(); got != "" {
				t.Errorf("standard error has %q", got)
			}
			hostdirtest.ListenTCP(t, "tcp4", d.addr)
		})
	}
}

// An openRelay is a client of a backend that echoes.
type openRelay struct {
	*net.TCPConn
	t *testing.T
}

func openEcho(t *testing.T, d *daemon, name string) openRelay {
	t.Helper()
	c := openRelay{d.dial(), t}
	if _, err := c.Write(snitest.Hello(name)); err != nil {
		t.Fatal(err)
	}
	c.works()
	return c
}

// works fails the test unless what the client sends comes back.
func (c openRelay) works() {
	c.t.Helper()
	const word = "is anybody there?"
	got := make([]byte, len(word))
	if _, err := io.WriteString(c, word); err != nil {
		c.t.Fatal(err)
	}
	if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
		c.t.Fatalf("got %q, error %v", got, err)
	}
}

// Goal: after a signal the port can be bound at once, an open connection goes on, the daemon exits
// when it ends, and no line speaks of cut connections.
func TestStopGraceful(t *testing.T) {
	for _, s := range stopSignals {
		t.Run(unix.SignalName(s), func(t *testing.T) {
			d := start(t)
			d.serve("a.example", hostdirtest.Echo)
			c := openEcho(t, d, "a.example")
			d.signal(s)
			d.out.Await(t, "shutting down")
			hostdirtest.Await(t, "the port to be free", func() bool {
				l, err := net.Listen("tcp4", d.addr)
				if err == nil {
					l.Close()
				}
				return err == nil
			})
			c.works()
			select {
			case <-d.exited:
				t.Fatal("the daemon has ended before its last connection")
			default:
			}
			c.Close()
			if status := d.wait(); status != 0 {
				t.Errorf("status %d, want 0", status)
			}
			if got := d.err.String(); got != "" {
				t.Errorf("standard error has %q", got)
			}
		})
	}
}

// Goal: while a connection is open, a second signal, the same or the other, ends the daemon at once
// with status 0. A line says that the connection was cut.
func TestSecondSignal(t *testing.T) {
	for _, s := range [][2]syscall.Signal{
		{syscall.SIGHUP, syscall.SIGHUP},
		{syscall.SIGHUP, syscall.SIGTERM},
		{syscall.SIGTERM, syscall.SIGHUP},
		{syscall.SIGTERM, syscall.SIGTERM},
		{syscall.SIGTERM, syscall.SIGINT},
		{syscall.SIGINT, syscall.SIGINT},
	} {
		t.Run(unix.SignalName(s[0])+" "+unix.SignalName(s[1]), func(t *testing.T) {
			d := start(t)
			d.serve("a.example", hostdirtest.Echo)
			c := openEcho(t, d, "a.example")
			d.signal(s[0])
			d.out.Await(t, "shutting down")
			c.works()
			d.signal(s[1])
			if status := d.wait(); status != 0 {
				t.Errorf("status %d, want 0", status)
			}
			// Not the line that ends the ten seconds, but that of the second signal.
			expectComplaint(t, d, "got "+unix.SignalName(s[1])+" again", "1 connection")
		})
	}
}

// Goal: ten seconds after the signal, not before, the daemon cuts the connections that are still
// open, says how many, and ends with status 0. SIGQUIT does not take the ten seconds back.
func TestStopCutsAfterTenSeconds(t *testing.T) {
	t.Parallel()
	d := start(t)
	d.serve("a.example", hostdirtest.Echo)
	openEcho(t, d, "a.example")
	c := openEcho(t, d, "a.example")
	begin := time.Now()
	d.signal(syscall.SIGHUP)
	d.out.Await(t, "got SIGHUP, shutting down")
	d.signal(syscall.SIGQUIT)
	c.works()
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Errorf("read %d bytes", n)
	}
	if status := d.wait(); status != 0 {
		t.Errorf("status %d, want 0", status)
	}
	if waited := time.Since(begin); waited < 10*time.Second {
		t.Errorf("cut after %v", waited)
	}
	expectComplaint(t, d, "2 connections")
}

// Goal: after SIGQUIT the daemon does not cut what is open, however long that takes and whoever
// sends it again, and prints no stacks. Another of the signals begins the ten seconds, and one more
// ends it at once.
func TestStopQuit(t *testing.T) {
	t.Parallel()
	quit := func() (*daemon, openRelay) {
		d := start(t)
		d.serve("a.example", hostdirtest.Echo)
		c := openEcho(t, d, "a.example")
		d.signal(syscall.SIGQUIT)
		d.out.Await(t, "got SIGQUIT, shutting down")
		d.awaitRefused()
		return d, c
	}
	waits, waiting := quit()
	late, cut := quit()
	<-time.After(limits.Drain + time.Second)
	waits.signal(syscall.SIGQUIT)
	waiting.works()
	waiting.Close()
	waits.expectExit(0)
	if got := waits.err.String(); got != "" {
		t.Errorf("standard error has %q", got)
	}

	begin := time.Now()
	late.signal(syscall.SIGTERM)
	late.out.Await(t, "got SIGTERM, shutting down")
	cut.works()
	if n, err := cut.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Errorf("read %d bytes", n)
	}
	if status := late.wait(); status != 0 {
		t.Errorf("status %d, want 0", status)
	}
	if waited := time.Since(begin); waited < limits.Drain {
		t.Errorf("cut %v after the second signal", waited)
	}
	expectComplaint(t, late, "cut what was still open", "1 connection")

	again, c := quit()
	again.signal(syscall.SIGINT)
	again.out.Await(t, "got SIGINT, shutting down")
	c.works()
	again.signal(syscall.SIGHUP)
	if status := again.wait(); status != 0 {
		t.Errorf("status %d, want 0", status)
	}
	expectComplaint(t, again, "got SIGHUP again", "1 connection")
}

// expectComplaint fails the test unless standard error is one line, which has all parts.
func expectComplaint(t *testing.T, d *daemon, parts ...string) {
	t.Helper()
	got := d.err.String()
	if !strings.HasPrefix(got, "sniproxy: ") || strings.Index(got, "\n") != len(got)-1 {
		t.Errorf("standard error is not one line that begins with the program's name: %q", got)
	}
	for _, part := range parts {
		if !strings.Contains(got, part) {
			t.Errorf("standard error has no %q: %q", part, got)
		}
	}
}

// Goal: when somebody who shares the listening socket shuts it down, the daemon says so and ends
// with status 1, after the open connections.
func TestCannotGoOn(t *testing.T) {
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hostdirtest.Dir(t))
	d.serve("a.example", hostdirtest.Echo)
	c := openEcho(t, d, "a.example")
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if err != nil {
		t.Skipf("this system does not shut listening sockets down: %v", err)
	}
	d.err.Await(t, "shut down")
	c.works()
	c.Close()
	if status := d.wait(); status != 1 {
		t.Errorf("status %d, want 1", status)
	}
	expectComplaint(t, d, "listening socket")
}

// Goal: the daemon links only small packages of the standard library, golang.org/x/sys and, in
// hashed builds, the hash.
func TestDependencies(t *testing.T) {
	program := hostdirtest.Need(t, "go")
	for _, tags := range []string{"", "hashed", "portable"} {
		out, err := exec.Command(program, "list", "-deps", "-tags", tags, "sniproxy/cmd/sniproxy").Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		deps := strings.Fields(string(out))
		if len(deps) < 10 {
			t.Fatalf("go list prints %q", out)
		}
		for _, dep := range deps {
			switch {
			case dep == "net/http", dep == "crypto/tls", dep == "golang.org/x/net",
				strings.HasPrefix(dep, "golang.org/x/net/"):
				t.Errorf("tags %q: the daemon depends on %s", tags, dep)
			}
		}
	}
}
