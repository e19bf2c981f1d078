package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// With this in its environment, the test binary is the quick start.
const runMain = "SNIPROXY_QUICKSTART_RUN_MAIN"

// lineTimeout is only there to let a test fail rather than hang; the first line follows a build.
const lineTimeout = 3 * time.Minute

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A quickstart is a run of the quick start.
type quickstart struct {
	*exec.Cmd
	tempDir string         // everything that it makes is in here
	lines   *bufio.Scanner // its standard output and standard error, and those of the daemon
	output  strings.Builder
}

// start runs the quick start, or a command that does.
func start(t *testing.T, cmd *exec.Cmd) *quickstart {
	t.Helper()
	hostdirtest.Need(t, "go")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.SetReadDeadline(time.Now().Add(lineTimeout))
	q := &quickstart{Cmd: cmd, tempDir: t.TempDir(), lines: bufio.NewScanner(r)}
	q.Env = append(cmd.Environ(), "TMPDIR="+q.tempDir)
	q.Stdout, q.Stderr = w, w
	hostdirtest.Must(t, q.Start())
	t.Cleanup(func() {
		q.Process.Kill()
		q.Wait()
		r.Close()
		if t.Failed() {
			t.Logf("%s printed:\n%s", cmd, q.output.String())
		}
	})
	return q
}

// command returns the command that runs the quick start itself.
func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = hostdirtest.Environ(runMain + "=1")
	return cmd
}

// readUntil reads up to a line that matches, and returns the parts of it that are in parentheses.
func (q *quickstart) readUntil(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for q.lines.Scan() {
		q.output.WriteString(q.lines.Text() + "\n")
		if match := re.FindStringSubmatch(q.lines.Text()); match != nil {
			return match[1:]
		}
	}
	t.Fatalf("no line matches %q: %v", pattern, q.lines.Err())
	return nil
}

// readAll reads until the quick start and the daemon have both ended.
func (q *quickstart) readAll(t *testing.T) {
	t.Helper()
	for q.lines.Scan() {
		q.output.WriteString(q.lines.Text() + "\n")
	}
	hostdirtest.Must(t, q.lines.Err())
}

// wait waits for the end, and checks the exit status and that nothing stays behind.
func (q *quickstart) wait(t *testing.T, status int) {
	t.Helper()
	q.readAll(t)
	q.Wait()
	if got := q.ProcessState.ExitCode(); got != status {
		t.Errorf("%v; want exit status %d", q.ProcessState, status)
	}
	left, err := os.ReadDir(q.tempDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range left {
		t.Errorf("%s is left in the directory for temporary files", entry.Name())
	}
}

const listening = `^sniproxy \(process (\d+)\): listening on (127\.0\.0\.1:\d+)$`

// Goal: the command at the beginning of the README works, shows that all sites answer, and exits
// with status 0.
func TestCheck(t *testing.T) {
	cmd := exec.Command("go", "run", "./examples/quickstart", "-check")
	cmd.Dir = filepath.Join("..", "..")
	q := start(t, cmd)
	q.wait(t, 0)
	want := regexp.MustCompile(`^building sniproxy and sniproxy-tls
(go: downloading .*
)*(port \d+ is taken, trying the next
)*(sniproxy(-tls)? \(process \d+\): (listening on 127\.0\.0\.1:\d+|serving three.localhost)
){2}checked one\.localhost
  this is one\.localhost, you are 127\.0\.0\.1:\d+
  sniproxy has handed me your connection and is out of the way
checked two\.localhost
  this is two\.localhost, you are 127\.0\.0\.1:\d+
  sniproxy forwards the bytes, and told me by a PROXY line who you are
checked three\.localhost
  this is three\.localhost, you are 127\.0\.0\.1
  I am a plain HTTP service; sniproxy-tls ends TLS for me
sniproxy \(process \d+\): got SIGHUP, shutting down
(sniproxy-tls \(process \d+\): .*
)*$`)
	if !want.MatchString(q.output.String()) {
		t.Errorf("output does not match %s", want)
	}
}

// Goal: where port 8443 is taken, it says so and takes another.
func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:8443")
	if err == nil {
		defer l.Close()
	} else if !errors.Is(err, syscall.EADDRINUSE) { // taken by another program is as good
		t.Fatal(err)
	}
	q := start(t, command("-check"))
	q.readUntil(t, `^port 8443 is taken, trying the next$`)
	if addr := q.readUntil(t, listening)[1]; addr == "127.0.0.1:8443" {
		t.Errorf("listening on %s, which is taken", addr)
	}
	q.wait(t, 0)
}

// Goal: the curl lines that it prints work as they stand. A signal stops it and the daemon
// gracefully, nothing that it made stays behind, and the port is free again.
func TestSignal(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(signal.String(), func(t *testing.T) {
			q := start(t, command())
			addr := q.readUntil(t, listening)[1]
			for _, name := range []string{"one", "two", "three"} {
				line := q.readUntil(t, `^ +(curl .*)$`)[0]
				hostdirtest.Need(t, "curl")
				want := "this is " + name + ".localhost, you are 127.0.0.1"
				if got := shell(t, line+" -sS --noproxy '*'"); !strings.HasPrefix(got, want) {
					t.Errorf("%s: %q, want %q", line, got, want)
				}
				want = "<h1>" + name + ".localhost</h1>\n<p>You are <b>127.0.0.1"
				if got := shell(t, line+" -sS --noproxy '*' -H 'Accept: text/html'"); !strings.Contains(got, want) {
					t.Errorf("%s: %q, want %q", line, got, want)
				}
			}
			shell(t, q.readUntil(t, `^ +(ln .*)$`)[0])
			line := q.readUntil(t, `^ +(curl .*)$`)[0]
			if got := shell(t, line+" -sS --noproxy '*'"); !strings.HasPrefix(got, "this is one.localhost") {
				t.Errorf("%s: %q, want the page of one.localhost", line, got)
			}
			q.readUntil(t, "^Ctrl-C stops")

			hostdirtest.Must(t, q.Process.Signal(signal))
			q.readUntil(t, `^sniproxy \(process \d+\): got SIGHUP, shutting down$`)
			q.wait(t, 0)
			l, err := net.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			l.Close()
		})
	}
}

// shell runs a line that the quick start has printed.
func shell(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v, output %q", line, err, out)
	}
	return string(out)
}

// Goal: what it prints fits into 80 columns, if the directory for temporary files has its usual
// name, and has no colours where it is no terminal. On a terminal it has some.
func TestColumns(t *testing.T) {
	q := start(t, command())
	q.readUntil(t, "^Ctrl-C stops")
	for line := range strings.Lines(q.output.String()) {
		line = strings.ReplaceAll(line, q.tempDir, "/tmp")
		if n := len(line) - 1; n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
		if strings.Contains(line, "\x1b") {
			t.Errorf("colours: %q", line)
		}
	}
	hostdirtest.Must(t, q.Process.Signal(syscall.SIGINT))
	q.wait(t, 0)

	// script(1) runs a command at a terminal.
	cmd := exec.Command(hostdirtest.Need(t, "script"), "-qec", os.Args[0]+" -check", "/dev/null")
	cmd.Env = hostdirtest.Environ(runMain + "=1")
	q = start(t, cmd)
	q.readUntil(t, "\x1b\\[32mchecked\x1b\\[0m one")
	q.wait(t, 0)
}

// Goal: when the daemon dies, it says so and ends with exit status 1.
func TestDaemonDies(t *testing.T) {
	q := start(t, command())
	pid := atoi(t, q.readUntil(t, listening)[0])
	q.readUntil(t, "^Ctrl-C stops")
	hostdirtest.Must(t, syscall.Kill(pid, syscall.SIGKILL))
	q.readUntil(t, "^quickstart: sniproxy has ended: signal: killed$")
	q.wait(t, 1)
}

// Goal: when it is killed, the daemon does not stay behind.
func TestKilled(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux signals a process when its parent is killed")
	}
	q := start(t, command())
	pid := atoi(t, q.readUntil(t, listening)[0])
	t.Cleanup(func() {
		if t.Failed() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	q.readUntil(t, "^Ctrl-C stops")
	hostdirtest.Must(t, q.Process.Kill())
	q.readAll(t) // the daemon holds the stream, too
}

func atoi(t *testing.T, s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Goal: the client's address is the one in the PROXY line, and what follows the line is read
// unchanged. Without a valid line of at most 107 bytes, nothing is read.
func TestProxyLine(t *testing.T) {
	for _, c := range []struct{ sent, client string }{
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1234 443\r\n", "192.0.2.1:1234"},
		{"PROXY TCP6 2001:db8::1 2001:db8::2 1234 443\r\n", "[2001:db8::1]:1234"},
		{"PROXY TCP6 " + strings.Repeat("ffff:", 7) + "ffff " + strings.Repeat("ffff:", 7) + "ffff 65535 65535\r\n",
			"[" + strings.Repeat("ffff:", 7) + "ffff]:65535"},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1234 443\n", ""},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 65536 443\r\n", ""},
		{"PROXY UNKNOWN\r\n", ""},
		{"\r\n", ""},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1234 443", ""}, // and then the end
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1234 443" + strings.Repeat(" ", 108) + "\r\n", ""},
	} {
		const rest = "the rest\r\nof the bytes"
		listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		client, err := net.Dial("unix", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		sent := c.sent
		if strings.HasSuffix(sent, "\n") {
			sent += rest
		}
		if _, err := io.WriteString(client, sent); err != nil {
			t.Fatal(err)
		}
		client.Close()

		conn, err := proxyListener{listener}.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		addr := conn.RemoteAddr()
		got, err := io.ReadAll(conn)
		if c.client == "" {
			if err == nil || len(got) != 0 || addr.Network() != "unix" {
				t.Errorf("%q: client %v, then %q, error %v; want an error", c.sent, addr, got, err)
			}
		} else if err != nil || string(got) != rest || addr.String() != c.client {
			t.Errorf("%q: client %v, then %q, error %v; want %s and %q", c.sent, addr, got, err, c.client, rest)
		}
	}
}
