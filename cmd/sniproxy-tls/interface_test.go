package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: wrong usage has exit status 2 and says what is wrong; -h prints the usage.
func TestUsage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	long := "unix:///" + strings.Repeat("x", 200)
	for _, test := range []struct {
		args   []string
		status int
		want   string
	}{
		{nil, 2, "usage: sniproxy-tls BACKEND [NAME...]"},
		{[]string{"--help"}, 2, "usage: sniproxy-tls BACKEND [NAME...]"},
		{[]string{"127.0.0.1:8080", "a.example"}, 2, "it is not a URL such as http://127.0.0.1:8080"},
		{[]string{"https://127.0.0.1:8080", "a.example"}, 2, "the service must speak plain HTTP"},
		{[]string{"ftp://127.0.0.1", "a.example"}, 2, `unknown scheme "ftp"`},
		{[]string{"tcp://127.0.0.1", "a.example"}, 2, "write tcp://HOST:PORT"},
		{[]string{"tcp://127.0.0.1:0", "a.example"}, 2, "a port is a number from 1 to 65535"},
		{[]string{"tcp://:80", "a.example"}, 2, "write tcp://HOST:PORT"},
		{[]string{"http://127.0.0.1:80/path", "a.example"}, 2, "requests keep their own path"},
		{[]string{"http://127.0.0.1:80?", "a.example"}, 2, "requests keep their own path"},
		{[]string{"http://user@127.0.0.1:80", "a.example"}, 2, "it must end with the port"},
		{[]string{"unix://run/x", "a.example"}, 2, "the path of the socket must be absolute, as in unix:///run/x.sock"},
		{[]string{long, "a.example"}, 2, "make it shorter, or make a symlink"},
		{[]string{"tcp://127.0.0.1:80", "a..example"}, 2, `"a..example" is no NAME: `},
		{[]string{"tcp://127.0.0.1:80"}, 2, map[bool]string{true: "give the NAME of the host", false: "a wildcard's"}[hostdir.Hashed]},
		{[]string{"tcp://127.0.0.1:80", "*.example"}, 1, "an ACME server gives no certificate for *.example"},
	} {
		cmd := s.command(t, "*.example", test.args...)
		stdout, stderr, status := hostdirtest.Run(t, cmd)
		if stdout != "" || status != test.status || !strings.Contains(stderr, test.want) {
			t.Errorf("%q: exit status %d, %q, %q, want %d, %q", test.args, status, stdout, stderr, test.status, test.want)
		}
	}
	stdout, stderr, status := hostdirtest.Run(t, s.command(t, "a.example", "-h"))
	if !strings.HasPrefix(stdout, "usage: sniproxy-tls BACKEND [NAME...]") || !strings.Contains(stdout, "This is version ") || stderr != "" || status != 0 {
		t.Errorf("-h: exit status %d, %q, %q", status, stdout, stderr)
	}
	if !hostdir.Hashed {
		cmd := s.command(t, "a.example", "tcp://127.0.0.1:80")
		cmd.Dir = "/"
		if _, stderr, status := hostdirtest.Run(t, cmd); status != 2 || !strings.Contains(stderr, "go to the host's directory, or give the NAME of the host") {
			t.Errorf("in /: exit status %d, %q", status, stderr)
		}
	}
}

// Goal: files that are no good at the start have exit status 1 and a line with the reason; whoever
// served the host before goes on.
func TestBadFiles(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "a.example", "a.example")
	s.serve(t, "a.example", "tcp://"+echo(t))
	cert, key := s.ca.issue(t, time.Hour, "a.example")
	dir := s.dir(t, "a.example")
	for _, test := range []struct {
		prepare func()
		want    string
	}{
		{func() { os.Remove(filepath.Join(dir, keyFile)) }, "there is no key.pem: cert.pem and key.pem must both be there, or neither"},
		{func() { put(t, filepath.Join(dir, keyFile), key) }, "cert.pem and key.pem are no good: private key does not match public key"},
		{func() { put(t, filepath.Join(dir, certFile), []byte("x")) }, "failed to find any PEM data in certificate input"},
		{func() {
			put(t, filepath.Join(dir, certFile), cert)
			put(t, filepath.Join(dir, clientCAFile), []byte("x"))
		}, "client-ca.pem is no good: there is no certificate in PEM in it"},
		{func() {
			os.Remove(filepath.Join(dir, clientCAFile))
			hostdirtest.Must(t, unix.Mkfifo(filepath.Join(dir, clientCAFile), 0o600))
		}, "cannot read client-ca.pem: not a regular file"},
		{func() {
			os.Remove(filepath.Join(dir, clientCAFile))
			hostdirtest.Must(t, os.Symlink("nowhere", filepath.Join(dir, clientCAFile)))
		}, "cannot read client-ca.pem: the symlink leads nowhere"},
	} {
		test.prepare()
		stdout, stderr, status := hostdirtest.Run(t, s.command(t, "a.example", "tcp://127.0.0.1:1", "a.example"))
		if stdout != "" || status != 1 || !strings.Contains(stderr, test.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("exit status %d, %q, %q, want %q", status, stdout, stderr, test.want)
		}
		if got, err := talk(s.dial(t, s.config("a.example")), "x"); got != "x" || err != nil {
			t.Errorf("after %q: %q, %v", test.want, got, err)
		}
	}
}

// Goal: the state directory is where the environment says; without a good place for it the program
// does not start, and says what to set.
func TestStateDirectory(t *testing.T) {
	for _, test := range []struct{ state, xdg, home, want string }{
		{"/var/lib/x", "/xdg", "/home/a", "/var/lib/x"},
		{"/var/lib/x:/var/lib/y", "", "", "/var/lib/x"},
		{"", "/xdg", "/home/a", "/xdg/sniproxy-tls"},
		{"", "relative", "/home/a", "/home/a/.local/state/sniproxy-tls"},
		{"", "", "/home/a", "/home/a/.local/state/sniproxy-tls"},
		{"", "", "", ""},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Setenv("STATE_DIRECTORY", test.state)
			t.Setenv("XDG_STATE_HOME", test.xdg)
			t.Setenv("HOME", test.home)
			got, err := stateDirectory()
			if got != test.want || (err == nil) != (test.want != "") {
				t.Errorf("%+v: %q, %v", test, got, err)
			}
		})
	}
	s := newSite(t)
	cmd := s.command(t, "a.example", "tcp://127.0.0.1:1", "a.example")
	cmd.Env = append(cmd.Env, "STATE_DIRECTORY=/proc/none")
	if _, stderr, status := hostdirtest.Run(t, cmd); status != 1 || !strings.Contains(stderr, "cannot make the directory for the account and the certificates") {
		t.Errorf("exit status %d, %q", status, stderr)
	}
	cmd = s.command(t, "a.example", "tcp://127.0.0.1:1", "a.example")
	cmd.Env = append(cmd.Env, "ACME_DIRECTORY=http://127.0.0.1/")
	if _, stderr, status := hostdirtest.Run(t, cmd); status != 1 || !strings.Contains(stderr, "it must be the URL of an ACME server's directory, with https") {
		t.Errorf("exit status %d, %q", status, stderr)
	}
}

// Goal: the program does not start where it cannot make the socket, and says who can; a state
// directory that has something else in it keeps its mode, and what is made in it is for nobody
// else.
func TestPermissions(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "a.example", "a.example")
	if os.Geteuid() == 0 {
		for _, file := range []string{certFile, keyFile} {
			hostdirtest.Must(t, os.Chmod(filepath.Join(s.dir(t, "a.example"), file), 0o644))
		}
		cmd := s.command(t, "a.example", "tcp://127.0.0.1:1", "a.example")
		self := filepath.Join(hostdirtest.Dir(t), "program")
		hostdirtest.CopyProgram(t, cmd.Path, self)
		cmd.Path = self
		_, stderr, status := hostdirtest.Run(t, unprivileged(t, cmd))
		if status != 1 || !strings.Contains(stderr, "permission denied: run it as the owner of the directory") {
			t.Errorf("exit status %d, %q", status, stderr)
		}
	}
	for _, test := range []struct {
		name, file string
		want       os.FileMode
	}{{"fresh", "", 0o700}, {"shared", "of somebody", 0o755}} {
		dir := filepath.Join(t.TempDir(), test.name)
		hostdirtest.Must(t, os.Mkdir(dir, 0o755))
		if test.file != "" {
			put(t, filepath.Join(dir, test.file), nil)
		}
		kept, err := openState(dir, "https://ca.example/dir")
		hostdirtest.Must(t, err)
		for path, want := range map[string]os.FileMode{dir: test.want, kept.dir: 0o700} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, want)
			}
		}
		if filepath.Base(kept.dir) != "ca.example_dir" {
			t.Errorf("%s", kept.dir)
		}
	}
}

// Goal: each of the signals stops the program: the socket is away at once, an open connection goes
// on, and the exit status is 0 when it has ended.
func TestStop(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	for sig, name := range map[syscall.Signal]string{syscall.SIGTERM: "SIGTERM", syscall.SIGHUP: "SIGHUP", syscall.SIGINT: "SIGINT"} {
		p := s.serve(t, "one.example", "tcp://"+echo(t))
		c := s.dial(t, s.config("one.example"))
		hostdirtest.Must(t, p.Process.Signal(sig))
		p.lines.Await(t, "got "+name+", shutting down")
		hostdirtest.Await(t, "the end of the socket", func() bool {
			_, err := os.Lstat(filepath.Join(s.dir(t, "one.example"), "tls-socket"))
			return errors.Is(err, os.ErrNotExist)
		})
		if got, err := talk(c, "after the signal"); got != "after the signal" || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if status := p.wait(t); status != 0 {
			t.Errorf("%s: exit status %d", name, status)
		}
	}
}

// Goal: at the stop no request is lost: neither one that is being answered, nor one whose head is
// coming, nor one of a client in the handshake. Idle connections end at once.
func TestStopHTTP(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	entered, leave := make(chan struct{}), make(chan struct{})
	backend := handler(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			entered <- struct{}{}
			<-leave
		}
		io.WriteString(w, "answer")
	})
	p := s.serve(t, "one.example", backend)
	for _, http2 := range []bool{false, true} { // idle from now on
		answer, err := s.client(t, http2).Get("https://one.example/")
		hostdirtest.Must(t, err)
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
	}
	answers := make(chan error, 2)
	for _, http2 := range []bool{false, true} {
		go func() {
			answer, err := s.client(t, http2).Get("https://one.example/slow")
			if err == nil {
				var text []byte
				if text, err = io.ReadAll(answer.Body); string(text) != "answer" {
					err = errors.New(string(text))
				}
			}
			answers <- err
		}()
		<-entered
	}
	half := s.dial(t, s.config("one.example"))
	io.WriteString(half, "GET / HTTP/1.1\r\n")
	kept := s.dial(t, s.config("one.example"))
	io.WriteString(kept, "GET / HTTP/1.1\r\nHost: one.example\r\n\r\n")
	answer, err := http.ReadResponse(bufio.NewReader(kept), nil)
	hostdirtest.Must(t, err)
	io.Copy(io.Discard, answer.Body)
	io.WriteString(kept, "GET / HTTP/1.1\r\n")
	early, err := net.Dial("tcp", s.addr)
	hostdirtest.Must(t, err)
	defer early.Close()

	hostdirtest.Must(t, p.Process.Signal(syscall.SIGTERM))
	p.lines.Await(t, "got SIGTERM, shutting down")
	for _, c := range []io.ReadWriter{half, kept} {
		io.WriteString(c, "Host: one.example\r\n\r\n")
		if text, err := io.ReadAll(c); err != nil || !strings.Contains(string(text), "answer") || !strings.Contains(string(text), "Connection: close") {
			t.Errorf("%q, %v", text, err)
		}
	}
	close(leave)
	for range 2 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if strings.Contains(p.lines.String(), "cut ") {
		t.Errorf("%s", &p.lines)
	}
}

// Goal: what is open after ten seconds is cut, with a line and exit status 0; a second signal does
// that at once.
func TestStopCut(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	p := s.serve(t, "one.example", "tcp://"+echo(t))
	s.dial(t, s.config("one.example"))
	s.dial(t, s.config("one.example"))
	hostdirtest.Must(t, p.Process.Signal(syscall.SIGTERM))
	p.lines.Await(t, "got SIGTERM, shutting down")
	if status := p.stop(t, syscall.SIGINT); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.lines.Await(t, "got SIGINT again, cut what was open: 2 connections")
	if testing.Short() {
		return
	}
	p = s.serve(t, "one.example", "tcp://"+echo(t))
	c := s.dial(t, s.config("one.example"))
	hostdirtest.Must(t, p.Process.Signal(syscall.SIGTERM))
	io.Copy(io.Discard, c)
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.lines.Await(t, "cut what was still open after 10s: 1 connection")
}

// Goal: an upgrade loses nobody: the new program takes the socket while the old one serves what it
// has.
func TestReplaced(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	old := s.serve(t, "one.example", "tcp://"+echo(t))
	c := s.dial(t, s.config("one.example"))
	s.serve(t, "one.example", "tcp://"+echo(t))
	hostdirtest.Must(t, old.Process.Signal(syscall.SIGQUIT))
	old.lines.Await(t, "shutting down")
	for range 20 {
		if got, err := talk(s.dial(t, s.config("one.example")), "new"); got != "new" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	if got, err := talk(c, "old"); got != "old" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if status := old.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

// Goal: after SIGQUIT the socket is away, and what is open stays until it ends, also beyond ten
// seconds; one of the other signals leaves it ten seconds, and a second one ends it at once.
func TestStopQuit(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "bytes.example", "bytes.example")
	s.install(t, "http.example", "http.example")
	leave := make(chan struct{})
	bytes := s.serve(t, "bytes.example", "tcp://"+echo(t))
	requests := s.serve(t, "http.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begin")
		w.(http.Flusher).Flush()
		<-leave
		io.WriteString(w, ", end")
	}))
	c := s.dial(t, s.config("bytes.example"))
	answer, err := s.client(t, true).Get("https://http.example/")
	hostdirtest.Must(t, err)
	defer answer.Body.Close()
	for host, p := range map[string]*process{"bytes.example": bytes, "http.example": requests} {
		hostdirtest.Must(t, p.Process.Signal(syscall.SIGQUIT))
		p.lines.Await(t, "got SIGQUIT, shutting down")
		hostdirtest.Await(t, "the end of the socket", func() bool {
			_, err := os.Lstat(filepath.Join(s.dir(t, host), "tls-socket"))
			return errors.Is(err, os.ErrNotExist)
		})
	}
	if !testing.Short() {
		<-time.After(limits.Drain + time.Second/2)
	}
	if got, err := talk(c, "still open"); got != "still open" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	close(leave)
	if text, err := io.ReadAll(answer.Body); string(text) != "begin, end" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	for _, p := range []*process{bytes, requests} {
		if status := p.wait(t); status != 0 || strings.Contains(p.lines.String(), "cut ") {
			t.Errorf("exit status %d, %s", status, &p.lines)
		}
	}

	p := s.serve(t, "bytes.example", "tcp://"+echo(t))
	s.dial(t, s.config("bytes.example"))
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGTERM} {
		hostdirtest.Must(t, p.Process.Signal(sig))
		p.lines.Await(t, "got "+unix.SignalName(sig)+", shutting down")
	}
	hostdirtest.Must(t, p.Process.Signal(syscall.SIGQUIT)) // which changes nothing
	if status := p.stop(t, syscall.SIGHUP); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.lines.Await(t, "got SIGHUP again, cut what was open: 1 connection")
}

// passed has a program get a socket as from systemd.
func passed(t *testing.T, cmd *exec.Cmd, socket interface{ File() (*os.File, error) }) *exec.Cmd {
	t.Helper()
	f, err := socket.File()
	hostdirtest.Must(t, err)
	t.Cleanup(func() { f.Close() })
	hostdirtest.Must(t, unix.SetNonblock(int(f.Fd()), false)) // as systemd does
	cmd.Args = append([]string{"sh", "-c", `export LISTEN_PID=$$ && exec "$@"`, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = hostdirtest.Need(t, "sh")
	cmd.Env = append(cmd.Env, "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	return cmd
}

// Goal: a socket that systemd passes is served. It stays at the stop, and a client that comes
// meanwhile is served by the next program. A socket of another kind is refused, by what it is.
func TestPassedSocket(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	dir := s.dir(t, "one.example")
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "tls-socket"), Net: "unixgram"})
	hostdirtest.Must(t, err)
	defer socket.Close()
	backend := "tcp://" + echo(t)
	start := func() *process {
		t.Helper()
		p := launch(t, passed(t, s.command(t, "one.example", backend, "one.example"), socket))
		p.lines.Await(t, "serving one.example")
		return p
	}
	p := start()
	c := s.dial(t, s.config("one.example"))
	hostdirtest.Must(t, p.Process.Signal(syscall.SIGTERM))
	p.lines.Await(t, "got SIGTERM, shutting down")
	waiting := make(chan error)
	go func() {
		c, err := s.try(s.config("one.example"))
		if err == nil {
			defer c.Close()
			_, err = talk(c, "next")
		}
		waiting <- err
	}()
	if got, err := talk(c, "still open"); got != "still open" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if status := p.wait(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p = start()
	if err := <-waiting; err != nil {
		t.Errorf("a client that came during the restart: %v", err)
	}
	if status := p.stop(t, syscall.SIGTERM); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if info, err := os.Lstat(filepath.Join(dir, "tls-socket")); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Errorf("after the stop: %v, %v", info, err)
	}

	stream, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(hostdirtest.Dir(t), "stream"), Net: "unix"})
	hostdirtest.Must(t, err)
	defer stream.Close()
	tcp := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	for found, other := range map[string]interface{ File() (*os.File, error) }{
		"is a Unix socket of another kind": stream, "is a socket of another kind than Unix": tcp,
	} {
		stdout, stderr, status := hostdirtest.Run(t, passed(t, s.command(t, "one.example", backend, "one.example"), other))
		want := "descriptor 3 (LISTEN_FDS) " + found
		if stdout != "" || status != 1 || !strings.Contains(stderr, want) || !strings.Contains(stderr, "ListenDatagram=") {
			t.Errorf("exit status %d, %q, %q, want %q", status, stdout, stderr, want)
		}
	}
	cmd := passed(t, s.command(t, "one.example", backend, "one.example"), socket)
	cmd.Env = append(cmd.Env, "LISTEN_FDS=2")
	if _, stderr, status := hostdirtest.Run(t, cmd); status != 1 || !strings.Contains(stderr, "there are 2 sockets (LISTEN_FDS), and a host has one") {
		t.Errorf("two sockets: exit status %d, %q", status, stderr)
	}
}

// few returns sniproxy-tls for a host with room for few connections, and their number.
func (s *site) few(t *testing.T, host, backend string) (p *process, most int) {
	t.Helper()
	const limit = 60
	cmd := s.command(t, host, backend, host)
	cmd.Args = append([]string{"prlimit", fmt.Sprintf("--nofile=%d:%[1]d", limit), cmd.Path}, cmd.Args[1:]...)
	cmd.Path = hostdirtest.Need(t, "prlimit")
	p = launch(t, cmd)
	p.lines.Await(t, "serving ")
	return p, roomFor(limit)
}

// Goal: when there are as many connections as may be, the one that has been silent longest makes
// room, and there is always a descriptor for the service.
func TestFull(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	p, most := s.few(t, "one.example", "tcp://"+echo(t))
	first := s.dial(t, s.config("one.example"))
	for range 3 * most {
		c := s.dial(t, s.config("one.example"))
		io.WriteString(c, "ping")
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadAll(first); err == nil {
		t.Error("the first has ended without a reset")
	}
	p.lines.Await(t, "ended the connection that had been silent longest, for ")
}

// Goal: the same with HTTP, where one connection can have many requests: they never use up all
// descriptors, and a client that comes later is served although others hold all they can get.
func TestFullHTTP(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	p, most := s.few(t, "one.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			<-r.Context().Done()
		}
	}))
	for range most { // idle
		c := s.dial(t, s.config("one.example"))
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: one.example\r\n\r\n")
		io.ReadFull(c, make([]byte, 1))
	}
	holder := s.client(t, true)
	holder.Timeout = 0
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	statuses := make(chan int, 1000)
	for range 3 * most {
		go func() {
			for ctx.Err() == nil {
				q, _ := http.NewRequestWithContext(ctx, "GET", "https://one.example/hold", nil)
				if answer, err := holder.Do(q); err == nil {
					answer.Body.Close()
					select {
					case statuses <- answer.StatusCode:
					default:
					}
				}
			}
		}()
	}
	for range 3 * most {
		select {
		case status := <-statuses:
			if status != http.StatusServiceUnavailable {
				t.Errorf("status %d", status)
			}
		case <-time.After(hostdirtest.Patience):
			t.Fatal("no request is refused")
		}
	}
	cancel()
	client := s.client(t, true)
	hostdirtest.Await(t, "a request that is served", func() bool {
		answer, err := client.Get("https://one.example/")
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == 200
	})
	if strings.Contains(p.lines.String(), "no descriptors are left") {
		t.Error("it ran out of descriptors")
	}
}
