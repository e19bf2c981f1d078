package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// With the first of these in its environment the test binary is sniproxy-listen. With the second,
// which overrides the first, it is a PROGRAM that reports what its standard input is.
const (
	runMain   = "SNIPROXY_LISTEN_RUN_MAIN"
	runReport = "SNIPROXY_LISTEN_RUN_REPORT"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(runReport) != "":
		report()
		os.Exit(0)
	case os.Getenv(runMain) != "":
		main()
	}
	os.Exit(m.Run())
}

// A stdin is what a PROGRAM finds on descriptor 0.
type stdin struct {
	Addr      netip.AddrPort
	V6Only    int // -1 for IPv4
	Type      int
	Listens   int
	ReuseAddr int
	Blocking  bool
	Protocol  int // where the system tells
}

func report() {
	option := func(level, name int) int {
		value, err := unix.GetsockoptInt(0, level, name)
		if err != nil {
			panic(err)
		}
		return value
	}
	sa, err := unix.Getsockname(0)
	if err != nil {
		panic(err)
	}
	flags, err := unix.FcntlInt(0, unix.F_GETFL, 0)
	if err != nil {
		panic(err)
	}
	s := stdin{
		V6Only:    -1,
		Type:      option(unix.SOL_SOCKET, unix.SO_TYPE),
		Listens:   option(unix.SOL_SOCKET, unix.SO_ACCEPTCONN),
		ReuseAddr: option(unix.SOL_SOCKET, unix.SO_REUSEADDR),
		Blocking:  flags&unix.O_NONBLOCK == 0,
		Protocol:  unix.IPPROTO_TCP,
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		s.Addr = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		s.Addr = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		s.V6Only = option(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	}
	if runtime.GOOS == "linux" {
		s.Protocol = option(unix.SOL_SOCKET, 38) // SO_PROTOCOL: not TCP for MPTCP
	}
	if err := json.NewEncoder(os.Stdout).Encode(s); err != nil {
		panic(err)
	}
}

// self returns the path of the test binary.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// program returns sniproxy-listen with these arguments.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return hostdirtest.Command(t, runMain+"=1", args...)
}

func environ() []string { return hostdirtest.Environ(runMain + "=1") }

// given appends a PROGRAM to cmd, and returns what that finds on descriptor 0.
func given(t *testing.T, cmd *exec.Cmd) stdin {
	t.Helper()
	cmd.Args = append(cmd.Args, "env", runReport+"=1", self(t))
	stdout, stderr, status := hostdirtest.Run(t, cmd)
	var s stdin
	if err := json.Unmarshal([]byte(stdout), &s); err != nil || stderr != "" || status != 0 {
		t.Fatalf("%q: %v, exit status %d, stdout %q, stderr %q", cmd.Args, err, status, stdout, stderr)
	}
	return s
}

// Goal: every form of an address gives the socket that the manual describes: its address and
// families, listening, plain TCP, with SO_REUSEADDR, and blocking.
func TestSocket(t *testing.T) {
	for _, c := range []struct {
		addr   string
		want   string
		v6Only int
	}{
		{"127.0.0.1:0", "127.0.0.1", -1},
		{"0.0.0.0:0", "0.0.0.0", -1},
		{"localhost:0", "127.0.0.1", -1},
		{"[127.0.0.1]:0", "127.0.0.1", -1},
		{"[::ffff:127.0.0.1]:0", "127.0.0.1", -1},
		{"[::ffff:0.0.0.0]:0", "0.0.0.0", -1},
		{":0", "::", 0},
		{"[]:0", "::", 0},
		{"[::]:0", "::", 1},
		{"[0:0:0:0:0:0:0:0]:0", "::", 1},
		{"[::1]:0", "::1", 1},
	} {
		t.Run(c.addr, func(t *testing.T) {
			if c.v6Only >= 0 {
				hostdirtest.NeedIPv6(t)
			}
			want := stdin{
				V6Only: c.v6Only, Type: unix.SOCK_STREAM, Listens: 1, ReuseAddr: 1, Blocking: true,
				Protocol: unix.IPPROTO_TCP,
			}
			got := given(t, program(t, c.addr))
			if got.Addr.Port() == 0 {
				t.Error("the port is 0")
			}
			want.Addr = netip.AddrPortFrom(netip.MustParseAddr(c.want), got.Addr.Port())
			// Other systems than Linux return the bit of the option instead of 1.
			got.Listens, got.ReuseAddr = min(got.Listens, 1), min(got.ReuseAddr, 1)
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// Goal: the port is the one that was given, and a link-local address is on the interface that was
// named with it.
func TestPortAndZone(t *testing.T) {
	port := freePort(t)
	if got := given(t, program(t, fmt.Sprintf("127.0.0.1:%d", port))).Addr.Port(); got != port {
		t.Errorf("port %d, want %d", got, port)
	}
	t.Run("zone", func(t *testing.T) {
		addr := linkLocal(t)
		if got := given(t, program(t, "["+addr.String()+"]:0")).Addr.Addr(); got != addr.WithZone("") {
			t.Errorf("address %v, want %v", got, addr)
		}
	})
}

// freePort returns a port of 127.0.0.1 that nobody listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	return uint16(hostdirtest.FreePort(t, "127.0.0.1"))
}

// linkLocal returns a link-local address of this machine, with its zone.
func linkLocal(t *testing.T) netip.Addr {
	t.Helper()
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			prefix, err := netip.ParsePrefix(a.String())
			if err == nil && prefix.Addr().Is6() && prefix.Addr().IsLinkLocalUnicast() && i.Flags&net.FlagUp != 0 {
				return prefix.Addr().WithZone(i.Name)
			}
		}
	}
	t.Skip("this machine has no link-local address")
	return netip.Addr{}
}

// Goal: wrong usage, and so every option but -h, gives the usage on standard error and exit status
// 2. -h gives it on standard output and exit status 0. Neither runs anything. Both have the
// version.
func TestUsage(t *testing.T) {
	asked, messages, status := hostdirtest.Run(t, program(t, "-h", "echo", "run"))
	if messages != "" || status != 0 || !strings.HasPrefix(asked, "usage: sniproxy-listen ADDR PROGRAM") || !strings.Contains(asked, "\nThis is version ") {
		t.Errorf("-h: stdout %q, stderr %q, exit status %d; want the usage and 0", asked, messages, status)
	}
	for _, args := range [][]string{
		{},
		{"127.0.0.1:0"},
		{"--help"},
		{"-", "echo", "run"},
		{"--", "127.0.0.1:0", "echo", "run"},
		{"-1:443", "echo", "run"},
	} {
		stdout, stderr, status := hostdirtest.Run(t, program(t, args...))
		if stdout != "" || status != 2 || stderr != asked {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d; want the usage and 2", args, stdout, stderr, status)
		}
	}
}

// refused runs sniproxy-listen, which must print one line with addr and the reasons, run nothing,
// and exit with status 1.
func refused(t *testing.T, cmd *exec.Cmd, addr string, reasons ...string) {
	t.Helper()
	cmd.Args = append(cmd.Args, addr, "echo", "run")
	stdout, stderr, status := hostdirtest.Run(t, cmd)
	if stdout != "" || status != 1 {
		t.Errorf("%q: stdout %q, exit status %d; want none, and 1", addr, stdout, status)
	}
	line, rest, _ := strings.Cut(stderr, "\n")
	message, ok := strings.CutPrefix(line, fmt.Sprintf("sniproxy-listen: cannot listen on %q: ", addr))
	if !ok || rest != "" {
		t.Errorf("%q: stderr %q; want one line that names the address", addr, stderr)
	}
	for _, reason := range reasons {
		if !strings.Contains(message, reason) {
			t.Errorf("%q: message %q; want %q in it", addr, message, reason)
		}
	}
}

// Goal: what is no address is refused with the reason and an example.
func TestBadAddress(t *testing.T) {
	for _, c := range []struct {
		addr    string
		reasons []string
	}{
		{"", []string{"missing port in address", "such as :443"}},
		{"443", []string{"missing port in address", "such as :443"}},
		{"127.0.0.1", []string{"missing port in address", "such as :443"}},
		{":", []string{"missing port in address", "such as :443"}},
		{"127.0.0.1:", []string{"missing port in address", "such as :443"}},
		{"::1:443", []string{"too many colons in address", "such as :443"}},
		{"[::1:443", []string{"missing ']' in address", "such as :443"}},
		{":65536", []string{"invalid port", "such as :443"}},
		{":-1", []string{"invalid port", "such as :443"}},
		{":no-such-service", []string{"unknown port", "such as :443"}},
		{"bad\nname:443", []string{"no such host", "such as :443"}},
	} {
		refused(t, program(t), c.addr, c.reasons...)
	}
}

// Goal: a port in use is refused, even if only one family or one address is in use. The message
// says how to find out who has it.
func TestInUse(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	for _, host := range []string{"127.0.0.1", "0.0.0.0", ""} {
		refused(t, program(t), fmt.Sprintf("%s:%d", host, port), "address already in use", "ss -ltnp")
	}
}

// Goal: an address that this machine does not have, or not without its zone, is refused, and the
// message says what to do.
func TestNotOurAddress(t *testing.T) {
	refused(t, program(t), "192.0.2.1:0", "cannot assign requested address", "this machine does not have")
	t.Run("zone", func(t *testing.T) {
		addr := linkLocal(t)
		refused(t, program(t), "["+addr.WithZone("").String()+"]:0", "invalid argument", "[fe80::1%eth0]:443")
		refused(t, program(t), "["+addr.WithZone("nosuch0").String()+"]:0", "invalid argument", "interface")
	})
}

// write makes a file in dir.
func write(t *testing.T, dir, name, content string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// programs makes three directories for PATH, which have:
//
//	first/denied    second/denied     neither executable
//	first/later     second/later      only the second executable
//	                second/plain      a script without #!
//	                second/missing    whose interpreter does not exist
//	                second/directory/
//	file                              not a directory
func programs(t *testing.T) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	for _, d := range []string{first, second, filepath.Join(second, "directory")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const script = "#!/bin/sh\necho run \"$@\"\n"
	for _, d := range []string{first, second} {
		write(t, d, "denied", script, 0o644)
	}
	write(t, first, "later", script, 0o644)
	write(t, second, "later", script, 0o755)
	write(t, second, "plain", "echo run \"$@\"\n", 0o755)
	write(t, second, "missing", "#!/no/such/interpreter\n", 0o755)
	write(t, dir, "file", "", 0o755)
	return dir, strings.Join([]string{filepath.Join(dir, "none"), filepath.Join(dir, "file"), first, second}, ":")
}

// Goal: PROGRAM is found and run, or not, with the exit status of env(1), however it is named. If
// it cannot be run, one line names it.
func TestProgram(t *testing.T) {
	env := hostdirtest.Need(t, "env")
	dir, path := programs(t)
	for _, c := range []struct {
		path   string // PATH; "-" for none
		name   string
		status int
	}{
		{path, "later", 0},
		{path, "plain", 0},
		{path, "denied", 126},
		{path, "directory", 126},
		{path, "missing", 127},
		{path, "no-such-program", 127},
		{path, "", 127},
		{path, "second/later", 0},
		{path, "./second/plain", 0},
		{path, "first/later", 126},
		{path, "second/directory", 126},
		{path, "second/later/", 126},
		{path, "file/later", 126},
		{path, "second/missing", 127},
		{path, "./no-such-program", 127},
		{filepath.Join(dir, "second"), "later", 0},
		{"second", "later", 0},
		{path, "file", 127},
		{path + ":", "file", 0}, // the working directory
		{"", "file", 0},
		{"-", "echo", 0},
		{"-", "no-such-program", 127},
	} {
		var environment []string
		for _, v := range environ() {
			if !strings.HasPrefix(v, "PATH=") {
				environment = append(environment, v)
			}
		}
		if c.path != "-" {
			environment = append(environment, "PATH="+c.path)
		}
		run := func(cmd *exec.Cmd) (stdout, stderr string, status int) {
			cmd.Dir, cmd.Env = dir, environment
			return hostdirtest.Run(t, cmd)
		}
		stdout, stderr, status := run(program(t, "127.0.0.1:0", c.name, "run", "two words"))
		wantOut, _, envStatus := run(exec.Command(env, c.name, "run", "two words"))
		if status != c.status || stdout != wantOut {
			t.Errorf("PATH %q, program %q: exit status %d, stdout %q; want %d and %q",
				c.path, c.name, status, stdout, c.status, wantOut)
		}
		if envStatus != c.status {
			t.Errorf("PATH %q, program %q: the exit status of env is %d, not %d", c.path, c.name, envStatus, c.status)
		}
		want := ""
		if c.status != 0 {
			want = fmt.Sprintf("sniproxy-listen: cannot run %q: ", c.name)
		}
		if !strings.HasPrefix(stderr, want) || strings.Count(stderr, "\n") != min(len(want), 1) {
			t.Errorf("PATH %q, program %q: stderr %q; want one line with %q, or none", c.path, c.name, stderr, want)
		}
	}
}

// Goal: the exit status is that of PROGRAM.
func TestExitStatus(t *testing.T) {
	for _, want := range []int{0, 1, 7} {
		cmd := program(t, "127.0.0.1:0", "sh", "-c", fmt.Sprintf("exit %d", want))
		if _, stderr, status := hostdirtest.Run(t, cmd); status != want || stderr != "" {
			t.Errorf("exit status %d, stderr %q; want %d", status, stderr, want)
		}
	}
}

// Goal: the exit status does not depend on whether anybody reads standard error.
func TestNobodyReads(t *testing.T) {
	for want, args := range map[int][]string{
		1:   {"443", "true"},
		2:   {},
		127: {"127.0.0.1:0", "/no/such/program"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		cmd := program(t, args...)
		cmd.Stderr = w
		err = cmd.Run()
		w.Close()
		if status := cmd.ProcessState.ExitCode(); status != want {
			t.Errorf("%q: %v; want exit status %d", args, err, want)
		}
	}
}
