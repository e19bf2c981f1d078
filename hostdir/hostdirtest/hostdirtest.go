// Package hostdirtest has what tests around a hosts directory need: the directory itself, good and
// bad backends, file systems that do not answer, system calls that fail, programs that run to their
// end.
//
// Only tests import it.
package hostdirtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sniproxy/hostdir"
)

// Patience is how long a test waits for what must come. It is no limit on speed.
const Patience = 30 * time.Second

// Need returns the path of a program. Where it is not installed, Need skips the test, or fails it
// if SNIPROXY_TEST_REQUIRE is set.
func Need(t testing.TB, program string) string {
	t.Helper()
	for _, name := range []string{program, "/usr/sbin/" + program, "/sbin/" + program} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	Missing(t, program)
	return ""
}

// Missing ends the test because something is not installed.
func Missing(t testing.TB, name string) {
	t.Helper()
	if os.Getenv("SNIPROXY_TEST_REQUIRE") != "" {
		t.Fatalf("%s is not installed, and SNIPROXY_TEST_REQUIRE is set", name)
	}
	t.Skipf("%s is not installed", name)
}

// NeedRoot skips the test for users other than root, who cannot give files away, for example.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// NeedIPv6 skips the test where the machine has no IPv6.
func NeedIPv6(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	l.Close()
}

// InSystemd runs the test again beside a systemd of its own, with a setting, NAME=VALUE, in its
// environment. The script systemd-run.sh, which is no part of this project, starts that systemd
// with the units and files in args. Where the script is not beside the project, whose root this is,
// InSystemd skips the test.
func InSystemd(t testing.TB, root, setting string, args ...string) {
	t.Helper()
	script, err := filepath.Abs(filepath.Join(root, "../shared/systemd-run.sh"))
	Must(t, err)
	if _, err := os.Stat(script); err != nil {
		t.Skipf("%s is not installed", script)
	}
	NeedRoot(t)
	self, err := os.Executable()
	Must(t, err)
	const installed = "/usr/bin/sniproxy-test"
	args = append([]string{"-t", "120", "-f", self + ":" + installed}, args...)
	cmd := exec.Command(script, append(args, "--", installed, "-test.v", "-test.run=^"+t.Name()+"$")...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), setting)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if cmd.ProcessState.ExitCode() == 125 && os.Getenv("SNIPROXY_TEST_REQUIRE") == "" {
		t.Skip("systemd cannot be started here")
	}
	Must(t, err)
}

// Dir returns a new directory, such as a hosts directory. Unlike those of t.TempDir it has a short
// path, since the path of a socket is limited, and any user may enter it.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sni")
	Must(t, err)
	t.Cleanup(func() {
		// An ordinary user can remove nothing from a directory that is closed to all.
		filepath.WalkDir(dir, func(path string, e os.DirEntry, _ error) error {
			if e != nil && e.IsDir() {
				os.Chmod(path, 0o755)
			}
			return nil
		})
		os.RemoveAll(dir)
	})
	Must(t, os.Chmod(dir, 0o755))
	return dir
}

// Entry returns the name of the entry of a host, or of a wildcard, in a hosts directory.
func Entry(name string) string { return string(hostdir.AppendName(nil, []byte(name))) }

// Program builds a program of this module in a directory, static, where every user may execute it.
func Program(t testing.TB, dir, name string, tags ...string) string {
	t.Helper()
	if hostdir.Hashed {
		tags = append(tags, "hashed")
	}
	path := filepath.Join(dir, name)
	cmd := exec.Command(Need(t, "go"), "build", "-buildvcs=false", "-tags", strings.Join(tags, ","), "-o", path, "sniproxy/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// Command returns the test binary as the program that TestMain makes of it with this setting,
// NAME=VALUE, in its environment.
func Command(t testing.TB, setting string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	Must(t, err)
	cmd := exec.Command(self, args...)
	cmd.Env = Environ(setting)
	return cmd
}

// Environ returns the environment with a setting, NAME=VALUE.
func Environ(setting string) []string {
	// The race detector would let each run sleep for a second at its end.
	return append(os.Environ(), "GORACE=atexit_sleep_ms=0", setting)
}

// Run runs a program to its end.
func Run(t testing.TB, cmd *exec.Cmd) (stdout, stderr string, status int) {
	t.Helper()
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	if err := cmd.Run(); err != nil {
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			t.Fatal(err)
		}
	}
	return out.String(), messages.String(), cmd.ProcessState.ExitCode()
}

// Await waits until ok returns true.
func Await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !AwaitFor(Patience, ok) {
		t.Fatalf("waited in vain for %s", what)
	}
}

// AwaitListening waits until somebody listens on the Unix socket at an absolute path, without a
// connection. The file is there a moment before, in which clients are refused; where the system
// does not tell, it has to do.
func AwaitListening(t testing.TB, path string) {
	t.Helper()
	const listens = " 00010000 "
	Await(t, "somebody to listen on "+path, func() bool {
		sockets, err := os.ReadFile("/proc/net/unix")
		if err != nil {
			_, err := os.Lstat(path)
			return err == nil
		}
		for line := range strings.Lines(string(sockets)) {
			if strings.Contains(line, listens) && strings.HasSuffix(line, " "+path+"\n") {
				return true
			}
		}
		return false
	})
}

// AwaitFor waits until ok returns true, for some time at most, and reports whether it did.
func AwaitFor(most time.Duration, ok func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(most)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			return false
		}
	}
	return true
}

// Lines collects what a program prints.
type Lines struct {
	mu   sync.Mutex
	text []byte
}

func (l *Lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *Lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// Find returns the first whole line that contains part, "" if there is none.
func (l *Lines) Find(part string) string {
	text := l.String()
	sc := bufio.NewScanner(strings.NewReader(text[:strings.LastIndex(text, "\n")+1]))
	for sc.Scan() {
		if strings.Contains(sc.Text(), part) {
			return sc.Text()
		}
	}
	return ""
}

// Await waits for a line that contains part, and returns it.
func (l *Lines) Await(t testing.TB, part string) (line string) {
	t.Helper()
	Await(t, fmt.Sprintf("a line with %q", part), func() bool {
		line = l.Find(part)
		return line != ""
	})
	return line
}

// ListenTCP returns a plain TCP listener. Go's default would be MPTCP.
func ListenTCP(t testing.TB, network, addr string) *net.TCPListener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), network, addr)
	Must(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// CopyProgram copies a program to where everybody may execute it. Another process does so: what
// this one has written cannot be executed while a child that it starts just now has the file open
// for writing, too.
func CopyProgram(t testing.TB, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	Must(t, os.Chmod(to, 0o755))
}

// ports has those that FreePort has returned.
var ports sync.Map

// FreePort returns a TCP port of an IP address for a program that a test starts. It returns none
// twice, since tests run at the same time and some programs share a port without a word, and none
// that the system takes for clients, from 32768 on.
func FreePort(t testing.TB, ip string) int {
	t.Helper()
	for range 100 {
		port := 10000 + rand.IntN(22000)
		l, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
		if err != nil {
			continue
		}
		l.Close()
		if _, used := ports.LoadOrStore(port, true); !used {
			return port
		}
	}
	t.Fatalf("no free port on %s", ip)
	return 0
}

// Must ends the test with an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
