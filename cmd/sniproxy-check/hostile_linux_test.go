package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// forbidUnshare has the kernel refuse unshare(2) to this process, as container engines do by
// default.
func forbidUnshare() {
	if err := hostdirtest.Deny(unix.SYS_UNSHARE, nil, unix.EPERM); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
}

// forbidPassRights makes the kernel one that does not have SO_PASSRIGHTS.
func forbidPassRights() {
	if err := hostdirtest.Deny(unix.SYS_SETSOCKOPT, map[int]uint32{2: hostdirtest.SOPassRights}, unix.ENOPROTOOPT); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
}

// Goal: where the kernel does not refuse descriptors, a backend that passes one whose last close
// never returns keeps nobody from the whole answer, and not the program from ending.
func TestPassedDescriptor(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	fs.Lazy = true
	fs.Add(hostdirtest.RootNode, "f", unix.S_IFREG|0o666, "")
	fs.Serve(time.Hour)
	open := func() int {
		fd, err := unix.Open(filepath.Join(fs.Dir, "f"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		must(t, err)
		return fd
	}
	passed, writer := open(), open()

	h := newTLSHosts(t)
	cert := certify(t, begin, end, "good.example")
	speak(t, h.add("good.example", "ok; TLS 1.3", good2101), cert)
	sent := make(chan error, 1)
	evil := h.add("evil.example", "", "")
	hostdirtest.Serve(t, evil, func(c *net.UnixConn) {
		b := make([]byte, 1<<16)
		if n, err := c.Read(b); err != nil || n == 0 {
			return
		}
		// Sniproxy-check must not read the message before the close of the descriptor would hang,
		// and here it can be closed only as long as that does not.
		resume := suspend(t, c)
		_, _, err := c.WriteMsgUnix([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), unix.UnixRights(passed), nil)
		unix.Close(passed)
		fs.HoldWrites()
		_, writeErr := unix.Write(writer, make([]byte, 4096))
		resume()
		select {
		case sent <- errors.Join(err, writeErr):
		default:
		}
	})
	cmd := users()[0].command(self(t), users()[0].forItself(append([]string{"-t", h.dir}, h.names...)...)...)
	cmd.Env = append(cmd.Env, "SNIPROXY_CHECK_NO_PASSRIGHTS=1")
	out, err := os.CreateTemp(h.dir, ".out")
	must(t, err)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(2 * hostdirtest.Patience):
		t.Error("it does not end")
	}
	must(t, <-sent)
	text, err := os.ReadFile(out.Name())
	must(t, err)
	if lines := byLabel(string(text)); len(lines) != 2 || !strings.HasPrefix(lines["good.example"], "ok; TLS 1.3") || strings.HasPrefix(lines["evil.example"], "ok") || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("it says %q, exit status %d", text, cmd.ProcessState.ExitCode())
	}
	fs.Abort()
	unix.Close(writer)
}

// suspend stops the process at the other end of a connection, and returns how to let it go on.
func suspend(t *testing.T, c *net.UnixConn) (resume func()) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return func() {}
	}
	pid := 0
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	unix.Kill(pid, unix.SIGSTOP)
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, task := range tasks {
			if stat, _ := os.ReadFile(task); !strings.Contains(string(stat), ") T ") {
				return false
			}
		}
		return len(tasks) > 0
	}) {
		t.Errorf("process %d is not stopped", pid)
	}
	return func() { unix.Kill(pid, unix.SIGCONT) }
}

// Goal: where unshare(2) is forbidden, one line says so, and names that are too long are a problem.
func TestUnshareForbidden(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	long := strings.Repeat("a", 200)
	good(t)(filepath.Join(hosts, entryOf(long)))
	cmd := users()[0].command(self(t), users()[0].forItself(hosts, "one.example", long)...)
	cmd.Env = append(cmd.Env, "SNIPROXY_CHECK_NO_UNSHARE=1")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	want := "one.example: ok\n" + long + ": the path of tls-socket is too long for a socket address, use hashed names: it has 211 bytes, and 107 is the most\n"
	if hostdir.Hashed {
		want = "one.example: ok\n" + long + ": ok\n"
	}
	if stdout.String() != want || strings.Count(stderr.String(), "\n") != 1 || (err == nil) != hostdir.Hashed ||
		!strings.HasPrefix(stderr.String(), "sniproxy-check: the system forbids unshare(2) (operation not permitted), as container engines do: ") {
		t.Errorf("%v, stdout %q, stderr %q", err, stdout.String(), stderr.String())
	}
}

// Goal: in a user namespace that does not know the owner of the hosts directory a line says so, and
// so does the remark about an entry with such an owner.
func TestUserNamespace(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	for _, name := range []string{"one.example", "*.theirs.example"} {
		theirs(t, good(t))(filepath.Join(hosts, entryOf(name)))
	}
	good(t)(filepath.Join(hosts, entryOf("*.ours.example")))
	must(t, os.Chown(hosts, 1000, 1000))
	mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd := users()[0].command(self(t), users()[0].forItself(hosts, "one.example", "a.theirs.example", "a.ours.example")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespace: %v", err)
	}
	cmd.Wait()
	const want = "one.example: ok; it cannot be told whose it is (uid 65534), and it shares its limits with all such entries\n" +
		"a.theirs.example: no directory, and the wildcard for it belongs neither to root nor to the owner of the hosts directory: " +
		"it belongs to uid 65534, chown -h it to root\n" +
		"a.ours.example: ok, served by *.ours.example\n"
	if stdout.String() != want || strings.Count(stderr.String(), "\n") != 1 ||
		!strings.HasPrefix(stderr.String(), "sniproxy-check: the hosts directory belongs to uid 65534, which in a user namespace stands for all users unknown to it: ") {
		t.Errorf("stdout %q, stderr %q", stdout.String(), stderr.String())
	}
}

// Goal: however many hosts lead to a file system that does not answer, only some get ten seconds,
// and most get none. All of it ends then.
func TestManyStuck(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	dir := hostdirtest.Dir(t)
	hosts, stuck := filepath.Join(dir, "hosts"), filepath.Join(dir, "stuck")
	must(t, os.Mkdir(hosts, 0o755))
	must(t, os.Mkdir(stuck, 0o755))
	hostdirtest.MountUserFS(t, stuck, unix.S_IFDIR)
	const many = 1000
	for i := range many {
		symlink(t, "../stuck/x")(filepath.Join(hosts, entryOf(fmt.Sprintf("host-%d", i))))
	}
	good(t)(filepath.Join(hosts, lastEntry))
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if status != 1 || stderr != "" {
		t.Errorf("exit status %d, stderr %q", status, stderr)
	}
	stdout, ok := strings.CutSuffix(stdout, lastEntry+": ok\n")
	if !ok {
		t.Error("the host that does not lead there has no such line")
	}
	expectShortened(t, stdout, many, "does not answer")
}

// Goal: if somebody who may change the hosts directory keeps it locked, that is said, for each NAME
// and for what concerns all hosts. The process can end only when the lock does.
func TestLocked(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	must(t, os.Chmod(hosts, 0o1777))
	unlock := hostdirtest.LockDirectory(t, hosts)
	defer time.AfterFunc(lookupLimit*3/2, unlock).Stop()
	stdout, stderr, status := check(t, users()[0], "", hosts, "one.example", "two.example")
	const why = "a process of somebody who may change it keeps it locked\n"
	if strings.Count(stdout, ".example: ") != 2 || strings.Count(stdout, why) != 2 || !strings.HasSuffix(stderr, why) || status != 1 {
		t.Errorf("exit status %d, it says %q, and %q", status, stdout, stderr)
	}
}

// Goal: an endless hosts directory is not read to its end, and a line says so.
func TestEndless(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	hosts := hostdirtest.Dir(t)
	fs := hostdirtest.MountUserFS(t, hosts, unix.S_IFDIR)
	fs.Endless = true
	fs.Serve(0)
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if n := strings.Count(stdout, "\n"); n > strangersMost || status != 1 || !strings.Contains(stderr, "sniproxy-check: the hosts directory ") ||
		!strings.Contains(stderr, " more entries are no hosts, and have no line\n") {
		t.Errorf("%d lines, exit status %d, stderr %q", n, status, stderr)
	}
}

// Goal: where only a mount still shows a socket that was removed, as a container does after the
// backend was started again, that is said, and what to mount in its place.
func TestRemovedSocket(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	hosts, others := hostdirtest.Dir(t), hostdirtest.Dir(t)
	dir := filepath.Join(hosts, entryOf("one.example"))
	must(t, os.Mkdir(dir, 0o755))
	hostdirtest.Touch(t, dir+"/tls-socket")
	hostdirtest.Abandon(t, others)
	hostdirtest.Mount(t, others+"/tls-socket", dir+"/tls-socket", "", unix.MS_BIND, "")
	const removed = "this socket was removed (its link count is 0), and only a mount still shows it: mount its directory into the container or sandbox, not the socket"
	for _, want := range []bool{false, true} {
		stdout, _, status := check(t, users()[0], "", hosts, "one.example")
		if !strings.HasPrefix(stdout, "one.example: "+nobodyListens+": ") || strings.Contains(stdout, removed) != want || status != 1 {
			t.Errorf("removed %t: %q, exit status %d", want, stdout, status)
		}
		if !want {
			must(t, os.Remove(others+"/tls-socket"))
			serve(t, others) // the new one, which is not seen
		}
	}
}
