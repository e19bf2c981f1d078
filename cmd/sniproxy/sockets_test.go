package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// pass hands sockets over as systemd does, on descriptors from 3 on. The variables are for the
// process that the shell becomes.
func pass(sockets ...*os.File) setup {
	return passAs("LISTEN_PID=$$", fmt.Sprintf("LISTEN_FDS=%d", len(sockets)), sockets...)
}

func passAs(pid, fds string, sockets ...*os.File) setup {
	return func(cmd *exec.Cmd) {
		cmd.ExtraFiles = sockets
		if cmd.Path != "/bin/sh" {
			cmd.Args = []string{"sh", "-c", `exec "$0"`, cmd.Path}
			cmd.Path = "/bin/sh"
		}
		cmd.Args[2] = strings.Join([]string{"unset LISTEN_PID LISTEN_FDS; export", pid, fds, ";", cmd.Args[2]}, " ")
	}
}

// socketFiles returns files for the sockets of listeners.
func socketFiles(t *testing.T, ls []*net.TCPListener) (files []*os.File) {
	t.Helper()
	for _, l := range ls {
		files = append(files, socketFile(t, l))
	}
	return files
}

// launchPassed starts a daemon with sockets as systemd passes them, and waits until it listens
// on all.
func launchPassed(t *testing.T, ls []*net.TCPListener, hosts string, setups ...setup) *daemon {
	t.Helper()
	files := socketFiles(t, ls)
	d := launch(t, nil, hosts, append(slices.Clone(setups), pass(files...))...)
	d.addr = ls[0].Addr().String()
	for _, l := range ls {
		if d.out != nil {
			d.out.Await(t, fmt.Sprintf("listening on %v", l.Addr()))
		}
	}
	for _, f := range files {
		f.Close()
	}
	return d
}

// listenSeveral returns three listeners, one of them on IPv6 if there is that.
func listenSeveral(t *testing.T) []*net.TCPListener {
	t.Helper()
	ls := []*net.TCPListener{hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")}
	if l, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		l.Close()
		return append(ls, hostdirtest.ListenTCP(t, "tcp6", "[::1]:0"))
	}
	return append(ls, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.2:0"))
}

// at returns the daemon for clients of another of its sockets.
func (d *daemon) at(l *net.TCPListener) *daemon {
	other := *d
	other.addr = l.Addr().String()
	return &other
}

// Goal: the daemon serves all sockets that systemd passes, with a line for each in their order, and
// tells the backend which of them a client came to. A stop frees all ports at once, and the daemon
// ends with the last connection.
func TestSockets(t *testing.T) {
	ls := listenSeveral(t)
	d := launchPassed(t, ls, hostdirtest.Dir(t))
	d.serve("a.example", hostdirtest.Greet)
	d.serve("header.example", headerOf)
	hostdirtest.Must(t, os.WriteFile(d.hostPath("header.example", "send-proxy-v1"), nil, 0o644))
	host := d.host("live.example")
	want := ""
	type pair struct {
		client  *net.TCPConn
		backend *net.UnixConn
	}
	var pairs []pair
	for _, l := range ls {
		want += fmt.Sprintf("listening on %v\n", l.Addr())
		at := d.at(l)
		for range 20 {
			if err := at.greeted("a.example"); err != nil {
				t.Error(err)
			}
		}
		client, backend := at.pair(host, "live.example")
		pairs = append(pairs, pair{client, backend})
		got, err := at.exchange(snitest.Hello("header.example"))
		if port := fmt.Sprintf(" %d\r\n", l.Addr().(*net.TCPAddr).Port); err != nil || !strings.HasSuffix(string(got), port) {
			t.Errorf("the backend got the header %q, error %v, want one that ends in %q", got, err, port)
		}
		l.Close()
	}
	if got := d.out.String(); got != want {
		t.Errorf("standard output is %q, want %q", got, want)
	}
	d.signal(syscall.SIGHUP)
	for _, l := range ls {
		d.at(l).awaitFree()
	}
	for _, p := range pairs {
		ping(t, p.client, p.backend)
		ping(t, p.backend, p.client)
		p.client.Close()
		p.backend.Close()
	}
	d.expectExit(0)
	if got := d.err.String(); got != "" {
		t.Errorf("standard error has %q", got)
	}
}

// headerOf is a backend that sends back the line before the ClientHello.
func headerOf(c *net.UnixConn) {
	r := bufio.NewReader(c)
	header, err := r.ReadString('\n')
	if err != nil {
		return
	}
	if _, _, err := hostdirtest.ReadHello(r); err == nil {
		io.WriteString(c, header)
	}
}

// Goal: when sockets are passed, standard input is left alone: what was there stays there, and the
// daemon does not accept from a listening socket there.
func TestSocketsStdin(t *testing.T) {
	l, other := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	r, _ := openPipe(t)
	for name, stdin := range map[string]*os.File{
		"pipe":             r,
		"null device":      nil,
		"listening socket": socketFile(t, other),
	} {
		t.Run(name, func(t *testing.T) {
			d := launch(t, stdin, hostdirtest.Dir(t), pass(socketFile(t, l)))
			d.addr = l.Addr().String()
			d.serve("a.example", hostdirtest.Greet)
			d.out.Await(t, "listening on "+d.addr)
			if name == "listening socket" {
				d.at(other).mustNotAccept(other)
			}
			if err := d.greeted("a.example"); err != nil {
				t.Error(err)
			}
			if stdin != nil {
				d.expectDescriptor(0, stdin)
			}
			d.signal(syscall.SIGHUP)
			d.expectExit(0)
		})
	}
}

// mustNotAccept fails the test if the daemon accepts from a socket that the test has, too.
func (d *daemon) mustNotAccept(l *net.TCPListener) {
	d.t.Helper()
	for range 20 {
		client := d.dial()
		l.SetDeadline(time.Now().Add(hostdirtest.Patience))
		c, err := l.Accept()
		if err != nil {
			d.t.Fatalf("a client was taken away: %v", err)
		}
		c.Close()
		client.Close()
	}
}

// expectDescriptor fails the test unless a descriptor of the daemon is that of the file.
func (d *daemon) expectDescriptor(fd int, want *os.File) {
	d.t.Helper()
	got, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", d.cmd.Process.Pid, fd))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	info, err := want.Stat()
	if err != nil {
		d.t.Fatal(err)
	}
	if !os.SameFile(got, info) {
		d.t.Errorf("descriptor %d is %v now, want what it was, %v", fd, got, info)
	}
}

// Goal: without sockets, or with variables for another process, standard input is served as ever.
func TestSocketsNone(t *testing.T) {
	for _, tt := range []struct{ pid, fds string }{
		{"LISTEN_PID=$$", "LISTEN_FDS=0"},
		{"LISTEN_PID=$$", ""},
		{"", "LISTEN_FDS=1"},
		{"LISTEN_PID=$PPID", "LISTEN_FDS=1"},
		{"LISTEN_PID=", "LISTEN_FDS=1"},
		{"LISTEN_PID=1", "LISTEN_FDS=nonsense"},
	} {
		t.Run(tt.pid+" "+tt.fds, func(t *testing.T) {
			other := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
			l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
			d := startOn(t, l, hostdirtest.Dir(t), passAs(tt.pid, tt.fds, socketFile(t, other)))
			d.serve("a.example", hostdirtest.Greet)
			if err := d.greeted("a.example"); err != nil {
				t.Error(err)
			}
			d.at(other).mustNotAccept(other)
			if got, want := d.out.String(), fmt.Sprintf("listening on %v\n", l.Addr()); got != want {
				t.Errorf("standard output is %q, want %q", got, want)
			}
		})
	}
}

// Goal: the daemon checks each passed socket and their number. Its one line says which descriptor
// is wrong, and why.
func TestSocketsWrong(t *testing.T) {
	good := func(t *testing.T) *os.File { return socketFile(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")) }
	udp := func(t *testing.T) *os.File {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return socketFile(t, c)
	}
	unixSocket := func(t *testing.T) *os.File {
		return socketFile(t, hostdirtest.Listen(t, hostDir(hostdirtest.Dir(t), "a.example")))
	}
	null := func(t *testing.T) *os.File { return openFile(t, os.DevNull) }
	bound := func(t *testing.T) *os.File {
		return socketFD(t, unix.AF_INET, unix.SOCK_STREAM, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}
	connection := func(t *testing.T) *os.File {
		_, server := connect(t)
		return server
	}
	for _, tt := range []struct {
		sockets []func(*testing.T) *os.File
		found   string
	}{
		{[]func(*testing.T) *os.File{udp}, "descriptor 3 (LISTEN_FDS) is a UDP"},
		{[]func(*testing.T) *os.File{good, udp}, "descriptor 4 (LISTEN_FDS) is a UDP"},
		{[]func(*testing.T) *os.File{good, good, unixSocket, good}, "descriptor 5 (LISTEN_FDS) is a Unix socket"},
		{[]func(*testing.T) *os.File{null, good}, "descriptor 3 (LISTEN_FDS) is a terminal or another character device"},
		{[]func(*testing.T) *os.File{good, bound}, "descriptor 4 (LISTEN_FDS) is a TCP socket that does not listen"},
		{[]func(*testing.T) *os.File{good, connection}, "descriptor 4 (LISTEN_FDS) is a TCP connection"},
		{[]func(*testing.T) *os.File{connection, connection}, "descriptor 3 (LISTEN_FDS) is a TCP connection"},
	} {
		t.Run(tt.found, func(t *testing.T) {
			var files []*os.File
			for _, open := range tt.sockets {
				files = append(files, open(t))
			}
			launch(t, good(t), hostdirtest.Dir(t), pass(files...)).expectRefusal(tt.found)
		})
	}
	for fds, found := range map[string]string{
		"LISTEN_FDS=3":                    "descriptor 5 (LISTEN_FDS) is ",
		"LISTEN_FDS=1000000000":           "descriptor 5 (LISTEN_FDS) is ",
		"LISTEN_FDS=2000000000":           `LISTEN_FDS is "2000000000"`,
		"LISTEN_FDS=18446744073709551617": `LISTEN_FDS is "18446744073709551617"`,
		"LISTEN_FDS=-1":                   `LISTEN_FDS is "-1"`,
		"LISTEN_FDS=two":                  `LISTEN_FDS is "two"`,
		"LISTEN_FDS=":                     `LISTEN_FDS is ""`,
		`LISTEN_FDS='1
'`: `LISTEN_FDS is "1\n"`,
	} {
		t.Run(fds, func(t *testing.T) {
			d := launch(t, good(t), hostdirtest.Dir(t), passAs("LISTEN_PID=$$", fds, good(t), good(t)))
			if status := d.wait(); status != 1 {
				t.Errorf("status %d, want 1", status)
			}
			expectComplaint(t, d, found)
			if got := d.out.String(); got != "" {
				t.Errorf("standard output has %q", got)
			}
		})
	}
}

// Goal: if descriptors 0, 1 and 2 are among the sockets, nobody gets a line of the log, and a stop
// lets go of them all.
func TestSocketsOnAll(t *testing.T) {
	ls := listenSeveral(t)
	files := socketFiles(t, ls)
	d := launch(t, files[0], hostdirtest.Dir(t), output1(files[1]), output2(files[2]), pass(files...))
	for _, f := range files {
		f.Close()
	}
	d.serve("a.example", hostdirtest.Greet)
	host := d.host("live.example")
	d.addr = ls[1].Addr().String()
	client, backend := d.pair(host, "live.example")
	for _, l := range ls {
		at := d.at(l)
		for range 20 {
			if err := at.greeted("a.example"); err != nil {
				t.Error(err)
			}
			at.expectAlert(snitest.Hello("unknown.example"), 112)
		}
		l.Close()
	}
	d.signal(syscall.SIGHUP)
	for _, l := range ls {
		d.at(l).awaitFree()
	}
	ping(t, client, backend)
	ping(t, backend, client)
	client.Close()
	backend.Close()
	d.expectExit(0)
}

// Goal: two copies on the same sockets, which somebody makes blocking all the time, serve the
// clients of each socket under load. Each copy stops when it is told to.
func TestSocketsMadeBlocking(t *testing.T) {
	ls := listenSeveral(t)
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "a.example"), hostdirtest.Greet)
	for _, l := range ls {
		defer share(t, l).keepBlocking()()
	}
	several := func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=3") }
	first, second := launchPassed(t, ls, hosts, several), launchPassed(t, ls, hosts, several)
	var served []*atomic.Int64
	var stops []func()
	for _, l := range ls {
		n, stop := first.at(l).load("a.example") // or of the second
		served, stops = append(served, n), append(stops, stop)
		defer stop()
	}
	all := func(n int64) {
		t.Helper()
		for _, s := range served {
			awaitMore(t, s, n)
		}
	}
	all(200)
	first.signal(syscall.SIGHUP)
	first.expectExit(0)
	all(200)
	for _, stop := range stops {
		stop()
	}
	second.signal(syscall.SIGHUP)
	second.expectExit(0)
}

// Goal: when descriptors run out, clients of all sockets wait, and are served when there are some
// again.
func TestSocketsOverload(t *testing.T) {
	ls := listenSeveral(t)
	d := launchPassed(t, ls, hostdirtest.Dir(t), limitFiles(64))
	d.serve("a.example", hostdirtest.Greet)
	for _, l := range ls {
		d.at(l).exhaust()
		for _, l := range ls {
			for range 5 {
				if err := d.at(l).greeted("a.example"); err != nil {
					t.Error(err)
				}
			}
		}
	}
	d.signal(syscall.SIGHUP)
	d.expectExit(0)
}

// Goal: when somebody who shares one of several listening sockets shuts it down, the daemon says
// which, lets go of the others, and ends with status 1 after the open connections.
func TestSocketsCannotGoOn(t *testing.T) {
	ls := listenSeveral(t)
	d := launchPassed(t, ls, hostdirtest.Dir(t))
	d.serve("a.example", hostdirtest.Echo)
	c := openEcho(t, d, "a.example")
	raw, err := ls[1].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if err != nil {
		t.Skipf("this system does not shut listening sockets down: %v", err)
	}
	d.err.Await(t, "shut down")
	for _, l := range ls {
		l.Close()
	}
	for _, l := range ls {
		d.at(l).awaitFree()
	}
	c.works()
	c.Close()
	if status := d.wait(); status != 1 {
		t.Errorf("status %d, want 1", status)
	}
	expectComplaint(t, d, fmt.Sprintf("the listening socket %v was shut down", ls[1].Addr()))
}

// Goal: clients of one socket that come all the time do not keep clients of the others waiting.
func TestSocketsFair(t *testing.T) {
	ls := listenSeveral(t)
	d := launchPassed(t, ls, hostdirtest.Dir(t), func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=1") })
	d.serve("a.example", hostdirtest.Greet)
	served, stop := d.load("a.example")
	defer stop()
	for range 10 {
		awaitMore(t, served, 50)
		for _, l := range ls[1:] {
			if err := d.at(l).greeted("a.example"); err != nil {
				t.Error(err)
			}
		}
	}
	stop()
	d.signal(syscall.SIGHUP)
	d.expectExit(0)
}

// connect returns both ends of a TCP connection, that of the server as a file. The test holds no
// other descriptor of it.
func connect(t testing.TB) (client *net.TCPConn, server *os.File) {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	defer l.Close()
	return connectTo(t, l)
}

func connectTo(t testing.TB, l *net.TCPListener) (client *net.TCPConn, server *os.File) {
	t.Helper()
	c, err := net.DialTimeout("tcp", l.Addr().String(), hostdirtest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	l.SetDeadline(time.Now().Add(hostdirtest.Patience))
	s, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	// Without the options that Go sets.
	s.SetKeepAlive(false)
	s.SetNoDelay(false)
	server, err = s.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return c.(*net.TCPConn), server
}

// readAll reads until the end.
func readAll(t testing.TB, c net.Conn) string {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("after %q: %v", got, err)
	}
	return string(got)
}
