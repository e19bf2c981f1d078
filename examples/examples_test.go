// Package examples_test runs the files of this directory under the programs they are written for: a
// real systemd, inetd, xinetd and s6, and in a chroot, behind a real nginx, HAProxy or socat. Where
// a file names a user, a port or a directory that a test cannot have, the test replaces just that.
package examples_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// workspace holds what the tests share, the daemon that they all run. Any user may enter it.
var workspace string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if workspace, err = os.MkdirTemp("", "sniproxy"); err == nil {
			defer os.RemoveAll(workspace)
			err = os.Chmod(workspace, 0o755)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

var (
	builtMu sync.Mutex
	built   = map[string]string{}
)

// build returns the path of a program of the project that every user may execute: static, as the
// examples want it.
func build(t *testing.T, name string) string {
	t.Helper()
	if os.Getenv(inside) != "" {
		return filepath.Dir(binary) + "/" + name
	}
	builtMu.Lock()
	defer builtMu.Unlock()
	if built[name] == "" {
		built[name] = hostdirtest.Program(t, workspace, name)
	}
	return built[name]
}

// daemon returns the path of the daemon.
func daemon(t *testing.T) string {
	t.Helper()
	return build(t, "sniproxy")
}

// example installs the example file in dir, with each old string, which must occur exactly once,
// replaced by the new one that follows it.
func example(t *testing.T, file, dir string, oldnew ...string) (path string) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	for i := 0; i < len(oldnew); i += 2 {
		if n := strings.Count(text, oldnew[i]); n != 1 {
			t.Fatalf("%s: %q occurs %d times", file, oldnew[i], n)
		}
		text = strings.Replace(text, oldnew[i], oldnew[i+1], 1)
	}
	path = filepath.Join(dir, filepath.Base(file))
	hostdirtest.Must(t, os.WriteFile(path, []byte(text), info.Mode().Perm()))
	return path
}

// freePort returns a port of 127.0.0.1 that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	return strconv.Itoa(hostdirtest.FreePort(t, "127.0.0.1"))
}

// nobody returns an unprivileged user.
func nobody(t *testing.T) (uid, gid int) {
	t.Helper()
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	if uid, err = strconv.Atoi(u.Uid); err == nil {
		gid, err = strconv.Atoi(u.Gid)
	}
	if err != nil {
		t.Fatal(err)
	}
	return uid, gid
}

// serve is the backend of name: it sends every byte back, and ends when the client does. It counts
// the connections.
func serve(t *testing.T, hosts, name string) *atomic.Int64 {
	t.Helper()
	dir := filepath.Join(hosts, hostdirtest.Entry(name))
	t.Cleanup(func() { os.RemoveAll(dir) })
	count := new(atomic.Int64)
	hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
		count.Add(1)
		io.Copy(c, c)
	})
	return count
}

// serveHanded makes a host whose connections are handed over, with a backend that does the same.
func serveHanded(t *testing.T, hosts, name string) {
	t.Helper()
	dir := filepath.Join(hosts, hostdirtest.Entry(name))
	t.Cleanup(func() { os.RemoveAll(dir) })
	hostdirtest.ServeDatagram(t, dir, func(c *net.TCPConn, first []byte) {
		c.Write(first)
		io.Copy(c, c)
	})
}

// A client is a connection that has sent its hello and was not answered yet.
type client struct {
	*net.TCPConn
	hello []byte
}

func connect(addr string, hello []byte) (client, error) {
	c, err := net.DialTimeout("tcp", addr, hostdirtest.Patience)
	if err != nil {
		return client{}, err
	}
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if _, err := c.Write(hello); err != nil {
		c.Close()
		return client{}, err
	}
	return client{c.(*net.TCPConn), hello}, nil
}

// finish ends the client's side, and checks that all it has sent came back.
func (c client) finish() error {
	defer c.Close()
	if err := c.CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(answer, c.hello) {
		return fmt.Errorf("sent %d bytes, got back %d: %.20x", len(c.hello), len(answer), answer)
	}
	return nil
}

// exchange is one client from beginning to end.
func exchange(addr string, hello []byte) error {
	c, err := connect(addr, hello)
	if err != nil {
		return err
	}
	return c.finish()
}

// A load is a number of clients, each of which connects again when it was served.
type load struct {
	t      *testing.T
	ended  atomic.Bool
	served atomic.Int64
	failed chan error
	wg     sync.WaitGroup
}

func startLoad(t *testing.T, addr string, hello []byte) *load {
	return startLoadOf(t, func() error { return exchange(addr, hello) })
}

// startLoadOf is startLoad for clients of another kind.
func startLoadOf(t *testing.T, client func() error) *load {
	l := &load{t: t, failed: make(chan error, 1)}
	t.Cleanup(func() { l.ended.Store(true) })
	for range 8 {
		l.wg.Go(func() {
			for !l.ended.Load() {
				if err := client(); err != nil {
					select {
					case l.failed <- err:
					default:
					}
					return
				}
				l.served.Add(1)
			}
		})
	}
	return l
}

// more waits until n more clients were served.
func (l *load) more(n int64) {
	l.t.Helper()
	n += l.served.Load()
	hostdirtest.Await(l.t, fmt.Sprintf("%d clients served", n), func() bool {
		return l.served.Load() >= n || len(l.failed) > 0
	})
}

// end stops the load. Not one client may have failed.
func (l *load) end() {
	l.t.Helper()
	l.ended.Store(true)
	l.wg.Wait()
	select {
	case err := <-l.failed:
		l.t.Errorf("a client failed, after %d that were served: %v", l.served.Load(), err)
	default:
		l.t.Logf("%d clients served, none failed", l.served.Load())
	}
}

// command runs a program, and returns what it printed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// start starts a program, which the test kills at its end if it still runs then, with the daemon
// that it has started.
func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &out
	}
	cmd.WaitDelay = time.Second // a service that outlives its supervisor holds the pipe
	hostdirtest.Must(t, cmd.Start())
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			for _, child := range children(cmd.Process.Pid) {
				killDaemon(t, child)
			}
			cmd.Process.Kill()
			cmd.Wait()
		}
		if t.Failed() {
			t.Logf("%s: %s", cmd, out.Bytes())
		}
	})
}

// children returns the processes that pid has started and that have not ended.
func children(pid int) (pids []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid)) // none once pid has ended
	for field := range bytes.FieldsSeq(b) {
		if child, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, child)
		}
	}
	return pids
}

// onlyChild waits until pid has just one child, and that runs the daemon, as nobody.
func onlyChild(t *testing.T, pid int) (child int) {
	t.Helper()
	uid, _ := nobody(t)
	hostdirtest.Await(t, "one sniproxy under the supervisor", func() bool {
		pids := children(pid)
		if len(pids) != 1 {
			return false
		}
		child = pids[0]
		return executes(child, daemon(t))
	})
	var stat syscall.Stat_t
	hostdirtest.Must(t, syscall.Stat(fmt.Sprintf("/proc/%d", child), &stat))
	if int(stat.Uid) != uid {
		t.Errorf("sniproxy runs as user %d, want nobody (%d)", stat.Uid, uid)
	}
	t.Cleanup(func() { killDaemon(t, child) }) // it may outlive its supervisor
	return child
}

// executes tells whether a process executes the file at path, or another name of it.
func executes(pid int, path string) bool {
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return false
	}
	file, err := os.Stat(path)
	return err == nil && os.SameFile(running, file)
}

// killDaemon kills the daemon that pid is, if it still is.
func killDaemon(t *testing.T, pid int) {
	if executes(pid, daemon(t)) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// signalAndAwait sends a signal, and waits until the process is gone: it is a child of the
// supervisor.
func signalAndAwait(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	hostdirtest.Must(t, syscall.Kill(pid, sig))
	hostdirtest.Await(t, fmt.Sprintf("the end of process %d", pid), func() bool {
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})
}

// canListen tells whether the address can be bound.
func canListen(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// canConnect tells whether somebody listens at the address.
func canConnect(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return false
	}
	c.Close()
	return true
}
