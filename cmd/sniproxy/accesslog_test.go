package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/report"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// logAll makes the daemon log the connections of all hosts.
func (d *daemon) logAll() { hostdirtest.Touch(d.t.(*testing.T), d.hostPath("*", "log-connections")) }

// served waits for the line about the client with an address, and returns what is behind that.
func (d *daemon) served(addr net.Addr) string {
	d.t.Helper()
	line := d.err.Await(d.t, "served "+addr.String()+" ")
	_, rest, _ := strings.Cut(line, addr.String())
	return rest
}

var servedPattern = regexp.MustCompile(`^( for [a-z.]+| without a name): bytes up (\d+), bytes down (\d+), \d+\.\d{3} s, (.*)$`)

// expectServed fails the test unless the line about a client says these things.
func (d *daemon) expectServed(addr net.Addr, name string, sentUp, sentDown int, how string) {
	d.t.Helper()
	got := d.served(addr)
	m := servedPattern.FindStringSubmatch(got)
	want := []string{name, fmt.Sprint(sentUp), fmt.Sprint(sentDown), how}
	if m == nil || strings.Join(m[1:], "|") != strings.Join(want, "|") {
		d.t.Errorf("the line says %q, want %q", got, want)
	}
}

// Goal: a connection to a host with the marker has a log line when it ends: all bytes each way,
// without the backend's header, and how it ended. Other connections have none.
func TestAccessLog(t *testing.T) {
	t.Parallel() // it waits for connections to be ended
	const halfClosed = "800ms"
	for _, all := range []bool{false, true} {
		t.Run(fmt.Sprintf("of all hosts %v", all), func(t *testing.T) {
			d := start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "SNIPROXY_TEST_HALFCLOSED="+halfClosed) })
			l := d.host("logged.example")
			if all {
				d.logAll()
			} else {
				hostdirtest.Touch(t, d.hostPath("logged.example", "log-connections"))
			}
			hostdirtest.Touch(t, d.hostPath("logged.example", "send-proxy-v2"))
			d.serve("silent.example", hostdirtest.Greet)
			hi := snitest.Hello("logged.example")
			base := d.fds()
			// begin returns both ends of a connection that has moved 3 bytes up and 5 down.
			begin := func() (*net.TCPConn, *net.UnixConn) {
				t.Helper()
				client := d.dial()
				client.Write(append(hi[:len(hi):len(hi)], "abc"...))
				b, err := l.AcceptUnix()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { b.Close() })
				header := make([]byte, 16)
				if _, err := io.ReadFull(b, header); err != nil {
					t.Fatal(err)
				}
				rest := make([]byte, int(header[14])<<8+int(header[15])+len(hi)+3)
				if _, err := io.ReadFull(b, rest); err != nil {
					t.Fatal(err)
				}
				b.Write([]byte("12345"))
				if _, err := io.ReadFull(client, make([]byte, 5)); err != nil {
					t.Fatal(err)
				}
				return client, b
			}
			sent := len(hi) + 3
			for _, end := range []struct {
				how string
				do  func(client *net.TCPConn, b *net.UnixConn)
			}{
				{report.ClosedByBoth, func(client *net.TCPConn, b *net.UnixConn) {
					client.CloseWrite()
					io.Copy(io.Discard, b)
					b.Close()
				}},
				{report.ClosedByBoth, func(client *net.TCPConn, b *net.UnixConn) {
					b.CloseWrite()
					io.Copy(io.Discard, client)
					client.Close()
				}},
				{report.ResetByClient, func(client *net.TCPConn, b *net.UnixConn) {
					client.SetLinger(0)
					client.Close()
				}},
				{report.SilentHalfClosed, func(client *net.TCPConn, b *net.UnixConn) { client.CloseWrite() }},
				{report.SilentHalfClosed, func(client *net.TCPConn, b *net.UnixConn) { b.CloseWrite() }},
			} {
				client, b := begin()
				end.do(client, b)
				d.expectServed(client.LocalAddr(), " for logged.example", sent, 5, end.how)
			}
			// A Unix socket is reset by closing it with something unread.
			client, b := begin()
			client.Write([]byte("unread"))
			awaitInput(t, b)
			b.Close()
			d.expectServed(client.LocalAddr(), " for logged.example", sent+6, 5, report.ResetByBackend)

			before := strings.Count(d.err.String(), "served")
			hostdirtest.Must(t, d.greeted("silent.example"))
			client, b = begin()
			client.Close()
			b.Close()
			d.served(client.LocalAddr())
			want := before + 1
			if all {
				want++
			}
			hostdirtest.Await(t, "all lines", func() bool { return strings.Count(d.err.String(), "served") >= want })
			if got := strings.Count(d.err.String(), "served"); got != want {
				t.Errorf("%d lines, want %d:\n%s", got, want, d.err)
			}
			d.awaitFds(base)

			// What is cut at the stop has a line as well.
			client, _ = begin()
			d.signal(syscall.SIGTERM)
			d.out.Await(t, "shutting down")
			d.signal(syscall.SIGTERM)
			if status := d.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
			d.expectServed(client.LocalAddr(), " for logged.example", sent, 5, report.CutAtStop)
		})
	}
}

// Goal: a tenant can turn on logging neither for its own host nor for all hosts.
func TestAccessLogOwner(t *testing.T) {
	t.Parallel() // it waits for the marker in * to be noticed
	hostdirtest.NeedRoot(t)
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	for _, name := range []string{"a.example", "*"} {
		marker := d.hostPath(name, "log-connections")
		hostdirtest.Touch(t, marker)
		hostdirtest.Must(t, os.Lchown(marker, 65534, 65534))
	}
	base, refused := d.fds(), 0
	// lines returns how many lines there are about a connection.
	lines := func() int {
		t.Helper()
		before := strings.Count(d.err.String(), "served")
		hostdirtest.Must(t, d.greeted("a.example"))
		d.awaitFds(base)
		// A refused client's line comes behind it.
		d.expectAlert(snitest.Hello("x..y"), 112)
		refused++
		hostdirtest.Await(t, "the line of the refused client", func() bool {
			return strings.Count(d.err.String(), "refused") == refused
		})
		return strings.Count(d.err.String(), "served") - before
	}
	expect := func(what string, want int) {
		t.Helper()
		if got := lines(); got != want {
			t.Errorf("%s: %d lines, want %d", what, got, want)
		}
	}
	// What is in * is noticed a second later. Not so often that lines are left out.
	eventually := func(what string, want int) {
		t.Helper()
		for range 40 {
			if lines() == want {
				return
			}
			<-time.After(report.LogAllPeriod / 5)
		}
		t.Fatalf("waited in vain for %s", what)
	}
	expect("markers of a tenant", 0)
	marker := d.hostPath("*", "log-connections")
	hostdirtest.Must(t, os.Lchown(marker, 0, 0))
	eventually("a line, by the administrator's marker in *", 1)
	hostdirtest.Must(t, os.Lchown(d.hostPath("*", "."), 65534, 65534))
	eventually("no line, by a tenant's directory *", 0)
	hostdirtest.Must(t, os.Lchown(d.hostPath("a.example", "log-connections"), 0, 0))
	expect("the administrator's marker", 1)
	// So is one of the owner of the hosts directory.
	for _, path := range []string{d.dir, d.hostPath("a.example", "log-connections")} {
		hostdirtest.Must(t, os.Lchown(path, 1, 1))
	}
	expect("a marker of the owner of the hosts directory", 1)
}

// Goal: while nobody reads the log, the daemon serves as ever. It drops lines and counts them: in
// the end each connection has a line or is counted as dropped.
func TestAccessLogFull(t *testing.T) {
	t.Parallel() // it waits for the marker in * to be noticed
	const conns, before = 3000, 20
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	d := start(t, output2(w))
	w.Close()
	d.serve("a.example", hostdirtest.Greet)
	d.logAll()
	base := d.fds()
	// The first ones may come before it is known that they are logged.
	for range before {
		hostdirtest.Must(t, d.greeted("a.example"))
		<-time.After(report.LogAllPeriod / before)
	}
	inParallel(conns, 20, func(int) {
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
	})
	d.awaitFds(base)
	var log hostdirtest.Lines
	var reading sync.WaitGroup
	reading.Go(func() { io.Copy(&log, r) })
	log.Await(t, "were dropped")
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	reading.Wait()
	told, dropped := 0, 0
	for line := range strings.Lines(log.String()) {
		n := 0
		switch {
		case strings.HasPrefix(line, "sniproxy: served "):
			told++
		case strings.Contains(line, "unshare"): // where that is denied
		case sscan(line, "sniproxy: %d lines about connections were dropped", &n):
			dropped += n
		default:
			t.Errorf("the log has %q", line)
		}
	}
	if n := told + dropped; n < conns || n > conns+before || dropped == 0 {
		t.Errorf("%d lines and %d dropped, want %d in all, and up to %d for those before", told, dropped, conns, before)
	}
}

func sscan(line, format string, n *int) bool {
	_, err := fmt.Sscanf(line, format, n)
	return err == nil
}
