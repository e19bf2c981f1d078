package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// With this in its environment the test binary gives up IPv6 and executes its arguments.
const runWithoutIPv6 = "SNIPROXY_LISTEN_RUN_WITHOUT_IPV6"

func init() {
	if os.Getenv(runWithoutIPv6) == "" {
		return
	}
	os.Unsetenv(runWithoutIPv6)
	if err := withoutIPv6(); err != nil {
		panic(err)
	}
	panic(unix.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

// withoutIPv6 lets socket(2) fail for AF_INET6 as in a kernel that has none.
func withoutIPv6() error {
	runtime.LockOSThread()
	return hostdirtest.Deny(unix.SYS_SOCKET, map[int]uint32{0: unix.AF_INET6}, unix.EAFNOSUPPORT)
}

// Goal: on a machine without IPv6, :PORT is every IPv4 address, and an IPv6 address is refused with
// the reason.
func TestWithoutIPv6(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the filter is for little-endian machines")
	}
	without := func() *exec.Cmd {
		cmd := program(t, self(t))
		cmd.Env = append(cmd.Env, runWithoutIPv6+"=1")
		return cmd
	}
	cmd := without()
	cmd.Args = append(cmd.Args, ":0")
	if s := given(t, cmd); s.Addr.Addr() != netip.IPv4Unspecified() || s.Listens != 1 {
		t.Errorf("got %+v, want 0.0.0.0", s)
	}
	refused(t, without(), "[::1]:0", "address family not supported", "no IPv6")
}

// Goal: the backlog is the longest that the system grants.
func TestBacklog(t *testing.T) {
	ss := hostdirtest.Need(t, "ss")
	text, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	if err != nil {
		t.Fatal(err)
	}
	granted, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	// PROGRAM is ss, which lists its own socket.
	cmd := program(t, "127.0.0.1:0", ss, "-ltnpH")
	stdout, _, _ := hostdirtest.Run(t, cmd)
	for line := range strings.Lines(stdout) {
		if strings.Contains(line, fmt.Sprintf("pid=%d,fd=0)", cmd.Process.Pid)) {
			if got, want := strings.Fields(line)[2], strconv.Itoa(min(granted, backlog)); got != want {
				t.Errorf("the backlog is %s, want %s", got, want)
			}
			return
		}
	}
	t.Errorf("%q does not have descriptor 0 of process %d", stdout, cmd.Process.Pid)
}

// What PROGRAM gets from its parent, apart from standard input.
const inheritance = `echo $$; umask; pwd; ulimit -Sn; ulimit -Hn; env | sort
	grep -E '^(Sig|Shd)(Pnd|Blk|Ign|Cgt)|^Cap|^NoNewPrivs|^Nice' /proc/self/status
	ls /proc/self/fd; cat /proc/self/stat | cut -d' ' -f 5-8`

// Goal: PROGRAM inherits everything as if sniproxy-listen did not stand in between: the pid, the
// limits, the signals, the descriptors and no others. Of ignored signals this holds for SIGHUP and
// SIGINT, as the manual says.
func TestInheritance(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	var reports []string
	for _, chain := range [][]string{nil, {self(t), ":0"}} {
		// A limit below what the runtime wants, an ignored signal, and descriptors 3 and 6.
		args := append([]string{"-c", `ulimit -Sn 99; umask 027; trap "" HUP INT; exec 6<&3; exec "$@"`, "sh"}, chain...)
		cmd := exec.Command("sh", append(args, "sh", "-c", inheritance)...)
		cmd.Env, cmd.ExtraFiles = environ(), []*os.File{r}
		stdout, stderr, status := hostdirtest.Run(t, cmd)
		pid, report, _ := strings.Cut(stdout, "\n")
		if pid != strconv.Itoa(cmd.Process.Pid) || stderr != "" || status != 0 {
			t.Errorf("pid %s, stderr %q, exit status %d; want %d, and 0", pid, stderr, status, cmd.Process.Pid)
		}
		reports = append(reports, report)
	}
	want, got := strings.Split(reports[0], "\n"), strings.Split(reports[1], "\n")
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) || got[i] != want[i] {
			t.Fatalf("got %q, want %q", got[min(i, len(got)):], want[min(i, len(want)):])
		}
	}
	if !strings.Contains(reports[0], "\nSigIgn:\t0000000000000003\n") || !strings.Contains(reports[0], "\n99\n") {
		t.Errorf("the shell has not set what is compared: %s", reports[0])
	}

	cmd := exec.Command("sh", "-c", `trap "" HUP PIPE; exec "$@"`, "sh", self(t), ":0", "grep", "SigIgn", "/proc/self/status")
	cmd.Env = environ()
	if stdout, _, _ := hostdirtest.Run(t, cmd); stdout != "SigIgn:\t0000000000000001\n" {
		t.Errorf("with SIGHUP and SIGPIPE ignored: %q; want SIGHUP alone", stdout)
	}
}

// Goal: the first thread of the process executes PROGRAM, so that the signal at the death of the
// parent stays, which Linux keeps for each thread. Slow system calls in looking up a name bring
// other threads in: without precaution the signal is lost in every second run.
func TestFirstThread(t *testing.T) {
	strace, setpriv := hostdirtest.Need(t, "strace"), hostdirtest.Need(t, "setpriv")
	for range 5 {
		cmd := exec.Command(strace, "-f", "-o", os.DevNull, "-e", "inject=all:delay_exit=20000",
			"-P", "/etc/hosts", "-P", "/etc/nsswitch.conf", "-P", "/etc/resolv.conf",
			setpriv, "--pdeathsig=TERM", self(t), "localhost:0", setpriv, "--dump")
		cmd.Env = environ()
		stdout, stderr, status := hostdirtest.Run(t, cmd)
		if !strings.Contains(stdout, "Parent death signal: TERM\n") || status != 0 {
			t.Fatalf("stdout %q, stderr %q, exit status %d; want the signal", stdout, stderr, status)
		}
	}
}

func nobody(t *testing.T) *user.User {
	t.Helper()
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Goal: an ordinary user is refused a privileged port, and told what it takes.
func TestNotPermitted(t *testing.T) {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(text)) == "0" {
		t.Skip("every user may listen on every port here")
	}
	cmd := program(t)
	if os.Getuid() == 0 {
		setpriv, u := hostdirtest.Need(t, "setpriv"), nobody(t)
		cmd.Path = setpriv
		cmd.Args = []string{setpriv, "--reuid=" + u.Uid, "--regid=" + u.Gid, "--clear-groups",
			hostdirtest.Program(t, hostdirtest.Dir(t), "sniproxy-listen")}
	}
	refused(t, cmd, "127.0.0.1:1", "permission denied", "needs root", "CAP_NET_BIND_SERVICE",
		"net.ipv4.ip_unprivileged_port_start")
}

// Goal: sniproxy behind sniproxy-listen serves and stops, in the process that was started. So it
// does behind programs that take privileges away, and each of these does what it is for.
func TestChain(t *testing.T) {
	dir := hostdirtest.Dir(t)
	sniproxy := hostdirtest.Program(t, dir, "sniproxy")
	hostdirtest.Serve(t, filepath.Join(dir, hostdirtest.Entry("a.example")), func(c *net.UnixConn) { io.Copy(c, c) })
	u := nobody(t)
	var (
		root   = os.Getuid() == 0
		drop   = []string{"--reuid=" + u.Uid, "--regid=" + u.Gid, "--clear-groups"}
		ids    = ":" + u.Uid + ":" + u.Gid
		asUser = regexp.MustCompile(`(?m)^Uid:\t` + u.Uid + `\t` + u.Uid + `\t` + u.Uid + `\t` + u.Uid +
			`\nGid:\t` + u.Gid + `\t` + u.Gid + `\t` + u.Gid + `\t` + u.Gid + `$`)
	)
	for _, c := range []struct {
		name   string
		root   bool
		chain  []string
		status *regexp.Regexp // of /proc/PID/status
	}{
		{"nothing", false, []string{sniproxy}, nil},
		{"itself", false, []string{self(t), "127.0.0.1:0", sniproxy}, nil},
		{"setpriv", false, []string{"setpriv", "--no-new-privs", sniproxy}, regexp.MustCompile(`(?m)^NoNewPrivs:\t1$`)},
		{"setpriv as root", true, append(append([]string{"setpriv"}, drop...), sniproxy), asUser},
		{"chpst", false, []string{"chpst", "-o", "99", sniproxy}, nil},
		{"chpst as root", true, []string{"chpst", "-u", ids, sniproxy}, asUser},
		{"s6-setuidgid", true, []string{"s6-setuidgid", u.Username, sniproxy}, asUser},
		{"chroot", true, []string{"chroot", "--userspec=" + ids[1:], dir, "/sniproxy"}, asUser},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.root && !root {
				t.Skip("needs root")
			}
			c.chain[0] = hostdirtest.Need(t, c.chain[0])
			cmd := program(t, append([]string{"127.0.0.1:0"}, c.chain...)...)
			cmd.Dir = dir
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			overdue := time.AfterFunc(hostdirtest.Patience, func() { cmd.Process.Kill() })
			defer func() {
				overdue.Stop()
				cmd.Process.Kill()
				cmd.Wait()
				if t.Failed() {
					t.Logf("standard error: %s", &stderr)
				}
			}()

			lines := bufio.NewScanner(stdout)
			lines.Scan()
			addr, ok := strings.CutPrefix(lines.Text(), "listening on ")
			if !ok {
				t.Fatalf("the first line is %q, not where it listens", lines.Text())
			}
			echo(t, addr, "a.example")
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(string(status), "Name:\tsniproxy\n") || c.status != nil && !c.status.Match(status) {
				t.Errorf("the process is not what it must be, sniproxy and %v:\n%s", c.status, status)
			}
			if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			lines.Scan()
			if got := lines.Text(); got != "got SIGHUP, shutting down" {
				t.Errorf("the last line is %q", got)
			}
			if err := cmd.Wait(); err != nil || stderr.Len() != 0 {
				t.Errorf("%v, standard error %q; want exit status 0", err, &stderr)
			}
		})
	}
}

// echo sends a hello for name to the proxy at addr, and expects it back from the backend.
func echo(t *testing.T, addr, name string) {
	t.Helper()
	hello := snitest.Hello(name)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if _, err := c.Write(hello); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(hello))
	if n, err := io.ReadFull(c, got); err != nil || !slices.Equal(got, hello) {
		t.Fatalf("%v, %d bytes, want the hello back: %x", err, n, got[:n])
	}
}
