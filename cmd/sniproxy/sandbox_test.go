//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: whatever clients and backends do, the installed program makes no system calls but those
// that the example service allows, and no sockets but Unix sockets.
func TestSandboxCalls(t *testing.T) {
	t.Parallel() // it waits for the ten seconds of some clients
	strace := hostdirtest.Need(t, "strace")
	allowed := allowedCalls(t)
	program, hosts := serviceRoot(t)
	dir := t.TempDir()
	var logs []string
	variedLoad(t, hosts, func(cmd *exec.Cmd) {
		log := filepath.Join(dir, fmt.Sprint(len(logs)))
		logs = append(logs, log)
		// With -D the daemon, not strace, is the child.
		cmd.Path, cmd.Args = strace, []string{strace, "-D", "-f", "-o", log, program}
	})
	made := make(map[string]int)
	for _, log := range logs {
		ended := regexp.MustCompile(` \+\+\+ .* \+\+\+\n\z`)
		hostdirtest.Await(t, "strace to end", func() bool {
			text, err := os.ReadFile(log)
			return err == nil && ended.Match(text)
		})
		for name, n := range countCalls(t, log) {
			made[name] += n
		}
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range regexp.MustCompile(`socket\(.*`).FindAllString(string(text), -1) {
			if !strings.HasPrefix(call, "socket(AF_UNIX,") {
				t.Errorf("RestrictAddressFamilies=AF_UNIX refuses %s", call)
			}
		}
	}
	names := slices.Sorted(maps.Keys(made))
	t.Logf("%d system calls are made: %v", len(names), names)
	for _, name := range names {
		// When a thread ends, strace may take something else for the number of a call.
		if !allowed[name] && !strings.HasPrefix(name, "syscall_0x") {
			t.Errorf("%s is made %d times, and not allowed by %s", name, made[name], exampleService)
		}
	}
	if made["accept4"] == 0 || made["connect"] == 0 {
		t.Error("connections are not among what was traced")
	}
}

// Goal: under the restrictions of the example service, where what it forbids kills, the installed
// program does everything that it does without them.
func TestSandbox(t *testing.T) {
	t.Parallel() // as above
	sandbox := newSandbox(t)
	_, hosts := serviceRoot(t)
	sandbox.Root = filepath.Dir(filepath.Dir(hosts))
	variedLoad(t, hosts, func(cmd *exec.Cmd) { sandbox.use(t, cmd) })

	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts, func(cmd *exec.Cmd) { sandbox.use(t, cmd) })
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Uid: 65534 65534 65534 65534", "Gid: 65534 65534 65534 65534", "Groups:", "Umask: 0077",
		"CapPrm: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2",
	} {
		if !slices.ContainsFunc(strings.Split(string(status), "\n"), func(line string) bool {
			return strings.Join(strings.Fields(line), " ") == want
		}) {
			t.Errorf("the process is not %q", want)
		}
	}
}

// sandboxKilled stands for the error of a call which is not survived.
const sandboxKilled = unix.Errno(255)

// What is tried in the sandbox. Where the error is 0 the call must succeed.
var sandboxTrials = []struct {
	name string
	want unix.Errno
	do   func() unix.Errno
}{
	{"unlisted", sandboxKilled, tryCall(unix.SYS_MOUNT)},
	{"unlisted, of another process", sandboxKilled, tryCall(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1)},
	{"in @privileged", sandboxKilled, tryCall(unix.SYS_CHROOT)},
	{"in @chown of @privileged", sandboxKilled, tryCall(unix.SYS_FCHOWN)},
	{"in @resources", sandboxKilled, tryCall(unix.SYS_SETPRIORITY)},
	{"x32", sandboxKilled, tryCall(unix.SYS_GETPID | 1<<30)}, // elsewhere than on amd64 a number that there is not
	{"native", 0, tryCall(unix.SYS_GETPID)},
	{"Unix socket", 0, tryCall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM)},
	{"IPv4 socket", unix.EAFNOSUPPORT, tryCall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM)},
	{"netlink socket", unix.EAFNOSUPPORT, tryCall(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW)},
	{"memory", 0, tryMemory(unix.PROT_READ | unix.PROT_WRITE)},
	{"executable memory", 0, tryMemory(unix.PROT_READ | unix.PROT_EXEC)},
	{"writable executable memory", sandboxKilled, tryMemory(unix.PROT_WRITE | unix.PROT_EXEC)},
	{"memory made executable", sandboxKilled, tryCall(unix.SYS_MPROTECT, 0, 0, unix.PROT_EXEC)},
	{"own working directory", 0, tryCall(unix.SYS_UNSHARE, unix.CLONE_FS)},
	{"own network", sandboxKilled, tryCall(unix.SYS_UNSHARE, unix.CLONE_NEWNET)},
	{"own users", sandboxKilled, tryCall(unix.SYS_UNSHARE, unix.CLONE_FS|unix.CLONE_NEWUSER)},
	{"personality", sandboxKilled, tryCall(unix.SYS_PERSONALITY, 0x0040000)}, // ADDR_NO_RANDOMIZE
	{"/dev", unix.ENOENT, tryStat("/dev")},
	{"/proc", unix.ENOENT, tryStat("/proc")},
	{"/sys", unix.ENOENT, tryStat("/sys")},
	{"the program", 0, tryStat("/usr/local/bin/sniproxy")},
	{"writing", unix.EACCES, func() unix.Errno { return errnoOf(unix.Mkdir("new.example", 0o755)) }},
}

func tryCall(number uintptr, args ...uintptr) func() unix.Errno {
	return func() unix.Errno {
		a := append(args, 0, 0, 0)
		_, _, errno := unix.RawSyscall(number, a[0], a[1], a[2])
		return errno
	}
}

func tryMemory(prot int) func() unix.Errno {
	return func() unix.Errno {
		_, err := unix.Mmap(-1, 0, os.Getpagesize(), prot, unix.MAP_PRIVATE|unix.MAP_ANON)
		return errnoOf(err)
	}
}

func tryStat(path string) func() unix.Errno {
	return func() unix.Errno { return errnoOf(unix.Stat(path, new(unix.Stat_t))) }
}

func errnoOf(err error) unix.Errno {
	errno := unix.Errno(0)
	errors.As(err, &errno)
	return errno
}

// Goal: the sandbox of TestSandbox forbids what it should, and nothing else.
func TestSandboxForbids(t *testing.T) {
	sandbox := newSandbox(t)
	_, hosts := serviceRoot(t)
	sandbox.Root = filepath.Dir(filepath.Dir(hosts))
	for i, trial := range sandboxTrials {
		t.Run(trial.name, func(t *testing.T) {
			sandbox := *sandbox
			sandbox.Trial = &i
			d := launch(t, nil, hosts, func(cmd *exec.Cmd) { sandbox.use(t, cmd) })
			status := d.wait()
			if trial.want == sandboxKilled {
				if s := d.cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != unix.SIGSYS {
					t.Errorf("%v, want an end by SIGSYS", d.cmd.ProcessState)
				}
			} else if status != int(trial.want) {
				t.Errorf("%v, error %v, want error %v", d.cmd.ProcessState, unix.Errno(status), trial.want)
			}
		})
	}
}

// insideSystemd is set in the environment of the test binary that runs beside the real systemd.
const insideSystemd = "SNIPROXY_TEST_INSIDE"

// sandboxDropIn changes the service: what is forbidden kills, and there is what symlinks of
// the load lead to.
const sandboxDropIn = `
[Service]
SystemCallErrorNumber=kill
BindReadOnlyPaths=/srv/elsewhere
Restart=no
`

// Goal: under a real systemd the example service, changed so that what it forbids kills, does
// everything that the program does elsewhere. The script systemd-run.sh starts that systemd, and
// this test again inside. It is looked for beside this project, and is no part of it.
func TestSandboxSystemd(t *testing.T) {
	if os.Getenv(insideSystemd) != "" {
		testSandboxInside(t)
		return
	}
	t.Parallel() // as above
	program, _ := serviceRoot(t)
	units, err := filepath.Abs(filepath.Dir(exampleService))
	if err != nil {
		t.Fatal(err)
	}
	dropIn := filepath.Join(t.TempDir(), "sniproxy.service.d")
	hostdirtest.Must(t, errors.Join(os.Mkdir(dropIn, 0o755), os.WriteFile(filepath.Join(dropIn, "sandbox.conf"), []byte(sandboxDropIn), 0o644)))
	hostdirtest.InSystemd(t, "../..", insideSystemd+"=1", "-f", program+":/usr/local/bin/sniproxy", units, dropIn)
}

func testSandboxInside(t *testing.T) {
	systemctl := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("systemctl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "--unit=sniproxy*").CombinedOutput()
			t.Logf("%s", out)
		}
	})
	hostdirtest.Must(t, os.MkdirAll("/srv/elsewhere", 0o755))
	systemctl("start", "sniproxy.socket", "sniproxy.service")
	pid, err := strconv.Atoi(systemctl("show", "--value", "--property=MainPID", "sniproxy.service"))
	if err != nil {
		t.Fatal(err)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, cmd: &exec.Cmd{Process: process}, dir: "/srv/sniproxy", addr: "127.0.0.1:443"}
	d.loads(t)
	systemctl("stop", "sniproxy.socket", "sniproxy.service")
	if result := systemctl("show", "--value", "--property=Result", "sniproxy.service"); result != "success" {
		t.Errorf("the result of the service is %s", result)
	}
}

// exampleService is the example whose restrictions are tested.
const exampleService = "../../examples/systemd/sniproxy.service"

// sandboxSettings are the restrictions of the service, besides SystemCallFilter=, as the
// sandbox has them. What takes mounts and a network of its own to apply, the tests with the
// real systemd have.
var sandboxSettings = []string{
	"TemporaryFileSystem=/:ro",                                // chroot(2), to what an ordinary user cannot write
	"BindReadOnlyPaths=/usr/local/bin/sniproxy /srv/sniproxy", // serviceRoot
	"PrivateNetwork=yes",                                      // with systemd only
	"RestrictAddressFamilies=AF_UNIX",                         // sandboxRules
	"CapabilityBoundingSet=",                                  // PR_CAPBSET_DROP
	"NoNewPrivileges=yes",                                     // PR_SET_NO_NEW_PRIVS
	"MemoryDenyWriteExecute=yes",                              // sandboxRules
	"LockPersonality=yes",                                     // sandboxRules
	"RestrictNamespaces=yes",                                  // sandboxRules, and sandboxUnseen
	"RestrictRealtime=yes",                                    // of @resources, which are forbidden
	"SystemCallArchitectures=native",                          // filter
	"SystemCallErrorNumber=EPERM",                             // death
	"UMask=0077",                                              // umask(2)
}

// allowedCalls returns the names of the system calls that the service allows. It fails the
// test if the service has restrictions that the sandbox does not know.
func allowedCalls(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(exampleService)
	if err != nil {
		t.Fatal(err)
	}
	_, restrictions, found := strings.Cut(string(text), sandboxSettings[0])
	if !found {
		t.Fatalf("%s is not in %s", sandboxSettings[0], exampleService)
	}
	sets := callSets(t)
	allowed := make(map[string]bool)
	var set func(name string, yes bool)
	set = func(name string, yes bool) {
		if name[0] != '@' {
			allowed[name] = yes
			return
		}
		if sets[name] == nil {
			t.Fatalf("systemd-analyze does not know %s", name)
		}
		for _, member := range sets[name] {
			set(member, yes)
		}
	}
	var settings []string
	for line := range strings.SplitSeq(sandboxSettings[0]+restrictions, "\n") {
		names, filter := strings.CutPrefix(line, "SystemCallFilter=")
		names, forbidden := strings.CutPrefix(names, "~")
		switch {
		case !filter:
			if line != "" && line[0] != '#' {
				settings = append(settings, line)
			}
			continue
		case names == "" || forbidden && len(allowed) == 0:
			t.Fatalf("%s does not begin with a list of what is allowed", exampleService)
		case len(allowed) == 0:
			set("@default", true) // systemd.exec(5): implicitly
		}
		for name := range strings.FieldsSeq(names) {
			set(name, !forbidden)
		}
	}
	if !slices.Equal(settings, sandboxSettings) {
		t.Fatalf("%s has\n%q, the sandbox has\n%q", exampleService, settings, sandboxSettings)
	}
	maps.DeleteFunc(allowed, func(_ string, yes bool) bool { return !yes })
	return allowed
}

// callSets returns systemd's sets of system calls, which can have other sets in them.
func callSets(t *testing.T) map[string][]string {
	t.Helper()
	out, err := exec.Command(hostdirtest.Need(t, "systemd-analyze"), "--no-pager", "syscall-filter").Output()
	if err != nil {
		t.Fatal(err)
	}
	sets := make(map[string][]string)
	set := ""
	for line := range strings.Lines(string(out)) {
		name := strings.TrimSpace(line)
		switch {
		case name == "" || name[0] == '#':
		case line[0] == '@':
			set = name
		default:
			sets[set] = append(sets[set], name)
		}
	}
	return sets
}

// callNumbers returns the numbers of this system's calls, which package unix has as constants.
func callNumbers(t *testing.T) map[string]uint32 {
	t.Helper()
	dir, err := exec.Command(hostdirtest.Need(t, "go"), "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "zsysnum_linux_"+runtime.GOARCH+".go"))
	if err != nil {
		t.Fatal(err)
	}
	numbers := make(map[string]uint32)
	for _, m := range regexp.MustCompile(`\sSYS_(\w+) += (\d+)\n`).FindAllSubmatch(text, -1) {
		number, err := strconv.ParseUint(string(m[2]), 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		numbers[strings.ToLower(string(m[1]))] = uint32(number)
	}
	return numbers
}

// serviceRoot makes what the service has for its root: the program, built with the tags of
// the test, and the hosts directory. Beside that is a directory for symlinks to lead to.
func serviceRoot(t *testing.T) (program, hosts string) {
	t.Helper()
	root := hostdirtest.Dir(t)
	program, hosts = filepath.Join(root, "usr/local/bin/sniproxy"), filepath.Join(root, "srv/sniproxy")
	for _, dir := range []string{filepath.Dir(program), hosts, filepath.Join(root, "srv/elsewhere")} {
		hostdirtest.Must(t, os.MkdirAll(dir, 0o755))
	}
	var cmd exec.Cmd
	build(t)(&cmd)
	hostdirtest.Must(t, os.Rename(cmd.Path, program))
	return program, hosts
}

// A sandbox is what a process gets to know of the one that it is to become. Namespaces apart,
// that is what systemd makes of the service.
type sandbox struct {
	Root   string
	Filter []unix.SockFilter
	Trial  *int // to do this, of sandboxTrials, in place of running the program
}

// sandboxed is the variable with the sandbox that the test binary enters when it is started.
const sandboxed = "SNIPROXY_TEST_SANDBOX"

// newSandbox returns one that lacks its root.
func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("chroot(2) needs root")
	}
	return &sandbox{Filter: sandboxFilter(t)}
}

// use has cmd start the program, with its arguments, in the sandbox.
func (s *sandbox) use(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = []string{sandboxed + "=" + string(b)}
}

func init() {
	if b := os.Getenv(sandboxed); b != "" {
		var s sandbox
		err := json.Unmarshal([]byte(b), &s)
		if err == nil {
			err = s.enter()
		}
		fmt.Fprintln(os.Stderr, "cannot enter the sandbox:", err)
		os.Exit(int(sandboxKilled) - 1)
	}
}

// enter makes the process the one that is wanted. What is said of threads is said of this one
// only, which is the one that is left when it executes the program.
func (s *sandbox) enter() error {
	runtime.LockOSThread()
	prctl := func(option int, arg2, arg3 uintptr) error { return unix.Prctl(option, arg2, arg3, 0, 0) }
	for capability := uintptr(0); ; capability++ {
		if err := prctl(unix.PR_CAPBSET_DROP, capability, 0); err == unix.EINVAL {
			break // there are no more
		} else if err != nil {
			return fmt.Errorf("PR_CAPBSET_DROP: %w", err)
		}
	}
	unix.Umask(0o077)
	if err := errors.Join(
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}), // who is killed leaves nothing behind
		unix.Chroot(s.Root),
		unix.Chdir("/srv/sniproxy"),
		unix.Setgroups(nil),
		unix.Setresgid(65534, 65534, 65534),
		unix.Setresuid(65534, 65534, 65534),
		prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0),
	); err != nil {
		return err
	}
	filter := unix.SockFprog{Len: uint16(len(s.Filter)), Filter: &s.Filter[0]}
	if err := prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter))); err != nil {
		return fmt.Errorf("PR_SET_SECCOMP: %w", err)
	}
	if s.Trial != nil {
		os.Exit(int(sandboxTrials[*s.Trial].do()))
	}
	return unix.Exec("/usr/local/bin/sniproxy", append([]string{"sniproxy"}, os.Args[1:]...), nil)
}

// sandboxRules are for calls of which only some are allowed: those whose argument, as far as
// the mask goes, is not over the limit.
var sandboxRules = []struct {
	call             string
	arg, mask, limit uint32
	action           uint32 // for the others
}{
	{"socket", 0, math.MaxUint32, unix.AF_UNIX, unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)}, // AF_UNIX is the lowest
	{"mmap", 2, unix.PROT_WRITE | unix.PROT_EXEC, unix.PROT_EXEC, unix.SECCOMP_RET_KILL_PROCESS},    // PROT_EXEC is the higher
	{"mprotect", 2, unix.PROT_EXEC, 0, unix.SECCOMP_RET_KILL_PROCESS},
	{"pkey_mprotect", 2, unix.PROT_EXEC, 0, unix.SECCOMP_RET_KILL_PROCESS},
	{"shmat", 2, 0o100000, 0, unix.SECCOMP_RET_KILL_PROCESS}, // SHM_EXEC
	{"unshare", 0, anyNamespace, 0, unix.SECCOMP_RET_KILL_PROCESS},
	{"clone", 0, anyNamespace, 0, unix.SECCOMP_RET_KILL_PROCESS},
	{"personality", 0, math.MaxUint32, 0, unix.SECCOMP_RET_KILL_PROCESS},
}

const anyNamespace = unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWNS |
	unix.CLONE_NEWPID | unix.CLONE_NEWTIME | unix.CLONE_NEWUSER | unix.CLONE_NEWUTS

// sandboxUnseen are calls that can be for a namespace, and a filter does not see whether they
// are.
var sandboxUnseen = []string{"clone3", "setns"}

// sandboxFilter returns a filter, as in seccomp(2), that kills a process which makes a call
// that the service does not allow.
func sandboxFilter(t *testing.T) []unix.SockFilter {
	t.Helper()
	native, known := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !known {
		t.Skipf("no filter for %s", runtime.GOARCH)
	}
	allowed, numbers := allowedCalls(t), callNumbers(t)
	for _, name := range sandboxUnseen {
		delete(allowed, name)
	}

	// struct seccomp_data: the number of the call, the architecture, the instruction
	// pointer, and the arguments, of which the lower halves come first.
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	jump := func(test uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: yes, Jf: no, K: k}
	}
	ret := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	filter := []unix.SockFilter{
		load(4),
		jump(unix.BPF_JEQ, native, 1, 0),
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		load(0),
	}
	for _, r := range sandboxRules {
		if !allowed[r.call] {
			continue
		}
		delete(allowed, r.call)
		filter = append(filter,
			jump(unix.BPF_JEQ, numbers[r.call], 0, 5),
			load(16+8*r.arg),
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: r.mask},
			jump(unix.BPF_JGT, r.limit, 0, 1),
			ret(r.action),
			ret(unix.SECCOMP_RET_ALLOW))
	}
	for _, name := range slices.Sorted(maps.Keys(allowed)) {
		if number, here := numbers[name]; here { // others are of other architectures
			filter = append(filter, jump(unix.BPF_JEQ, number, 0, 1), ret(unix.SECCOMP_RET_ALLOW))
		}
	}
	return append(filter, ret(unix.SECCOMP_RET_KILL_PROCESS))
}

// variedLoad has the program go through everything there is: good clients and bad ones,
// alerts, much data, overload, stops. program is what starts it. The test fails if something
// does not go as it should.
func variedLoad(t *testing.T, hosts string, program setup) {
	t.Helper()
	t.Run("refused starts", func(t *testing.T) {
		launch(t, openFile(t, os.DevNull), hosts, program).expectRefusal("")
		d := launch(t, nil, hosts, program, func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "-v") })
		if status := d.wait(); status != 2 {
			t.Errorf("status %d for wrong usage, want 2", status)
		}
	})
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts, program)
	l.Close()
	d.loads(t)
	t.Run("few descriptors", func(t *testing.T) {
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		d := startOn(t, l, hosts, program, func(cmd *exec.Cmd) { // as limitFiles, but with arguments
			cmd.Args = slices.Concat([]string{"sh", "-c", `ulimit -n 64; exec "$@"`, "sh", cmd.Path}, cmd.Args[1:])
			cmd.Path = "/bin/sh"
		})
		loadDescriptors(t, d)
		d.signal(syscall.SIGHUP)
		d.expectExit(0)
	})
	t.Run("stop", func(t *testing.T) {
		c := openEcho(t, d, "echo.example")
		d.counters()
		d.signal(syscall.SIGHUP)
		d.awaitRefused()
		c.works()
		c.Close()
		d.expectExit(0)
	})
	t.Run("inetd", func(t *testing.T) {
		// Other than before there is IPv6, where there is, and nothing to write lines to.
		l := hostdirtest.ListenTCP(t, "tcp", ":0")
		f := socketFile(t, l)
		d := startOn(t, l, hosts, program, output1(f), output2(f))
		f.Close()
		l.Close()
		d.addr = fmt.Sprint("127.0.0.1:", l.Addr().(*net.TCPAddr).Port)
		c := openEcho(t, d, "echo.example")
		d.signal(syscall.SIGHUP)
		d.signal(syscall.SIGTERM)
		if status := d.wait(); status != 0 {
			t.Errorf("status %d after two signals, want 0", status)
		}
		c.Close()
	})
	t.Run("full pipe", func(t *testing.T) {
		_, w := openPipe(t)
		fill(t, w)
		l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
		d := startOn(t, l, hosts, program, output1(w), output2(w))
		if err := d.greeted("greet.example"); err != nil {
			t.Error(err)
		}
		d.signal(syscall.SIGHUP)
		d.expectExit(0)
	})
}

// loads is what of the load one daemon can have that nothing is wrong with.
func (d *daemon) loads(t *testing.T) {
	t.Helper()
	d.serve("greet.example", hostdirtest.Greet)
	d.serve("echo.example", hostdirtest.Echo)
	hostdirtest.Must(t, d.greeted("greet.example"))
	base := d.fds()
	for _, load := range []struct {
		name string
		do   func(*testing.T, *daemon)
	}{
		{"good clients", loadGood},
		{"hosts", loadHosts},
		{"alerts", loadAlerts},
		{"bulk", loadBulk},
		{"ends", loadEnds},
		{"backlog", loadBacklog},
		{"time", loadTime},
	} {
		t.Run(load.name, func(t *testing.T) {
			load.do(t, d)
			if !d.running() {
				t.Fatalf("the daemon has ended: %v", d.cmd.ProcessState)
			}
			d.awaitFds(base)
		})
	}
}

func loadGood(t *testing.T, d *daemon) {
	d.serve("proxy.example", func(c *net.UnixConn) {
		header := make([]byte, len("PROXY TCP4 127.0.0.1 127.0.0.1 "))
		io.ReadFull(c, header)
		readUntil(c, '\n')
		if name, _, err := hostdirtest.ReadHello(c); err == nil {
			fmt.Fprintf(c, "%s%s", header, name)
		}
	})
	hostdirtest.Touch(t, d.hostPath("proxy.example", "send-proxy-v1"))
	for range 3 {
		expectWord(t, d, "proxy.example", "PROXY TCP4 127.0.0.1 127.0.0.1 proxy.example")
	}
	inParallel(200, 20, func(int) {
		if err := d.greeted("greet.example"); err != nil {
			t.Error(err)
		}
	})
	if got, err := d.tell(snitest.Hello("greet.example"), 50, false); err != nil || string(got) != "this is greet.example" {
		t.Errorf("in pieces: got %q, error %v", got, err)
	}
}

// readUntil reads bytes up to the one that is given.
func readUntil(r io.Reader, end byte) {
	for b := []byte{^end}; b[0] != end; {
		if _, err := io.ReadFull(r, b); err != nil {
			return
		}
	}
}

// loadHosts asks for hosts with long names, and for such that are elsewhere.
func loadHosts(t *testing.T, d *daemon) {
	elsewhere := filepath.Join(filepath.Dir(d.dir), "elsewhere")
	hostdirtest.Serve(t, hostDir(elsewhere, "target"), saying("elsewhere"))
	target := filepath.Join("..", hostDir("elsewhere", "target"))
	d.serve("short.example", saying("here"))
	long := strings.Repeat("long.", 50)
	for name, do := range map[string]func(dir string) error{
		"directory.example": func(dir string) error { return os.Symlink(target, dir) },
		"socket.example": inDir(func(path string) error {
			return os.Symlink(filepath.Join("..", target, "tls-socket"), path)
		}),
		long + "away": func(dir string) error { return os.Symlink(target, dir) },
		long + "here": func(dir string) error { return os.Rename(d.hostDir("short.example"), dir) },
	} {
		hostdirtest.Must(t, do(d.hostDir(name)))
		if len(name) == sni.MaxName && !anyName && !hostdir.Hashed {
			d.expectAlert(snitest.Hello(name), sni.UnrecognizedName)
			continue
		}
		word := "elsewhere"
		if strings.HasSuffix(name, "here") {
			word = "here"
		}
		inParallel(20, 4, func(int) { expectWord(t, d, name, word) })
	}
}

// loadAlerts has every alert that there is without waiting.
func loadAlerts(t *testing.T, d *daemon) {
	d.expectAlert([]byte("GET / HTTP/1.1\r\n\r\n"), sni.UnexpectedMessage)
	d.expectAlert([]byte{22, 3, 1, 255, 255}, sni.RecordOverflow)
	d.expectAlert(snitest.Record(22), sni.DecodeError)
	d.expectAlert(hugeHello(100<<10), sni.InternalError)
	d.expectAlert(snitest.Hello(""), sni.UnrecognizedName)
	d.expectAlert(snitest.Named("../hosts").Stream(), sni.UnrecognizedName)
	got, err := d.tell(snitest.Hello("greet.example")[:50], 50, true)
	expectRecord(t, got, err, sni.DecodeError)
	for what, do := range badHosts {
		dir := d.hostDir("bad.example")
		hostdirtest.Must(t, do(dir))
		got, err := d.exchange(snitest.Hello("bad.example"))
		if err != nil || alert(got) != int(sni.UnrecognizedName) {
			t.Errorf("%s: got %x, error %v, want alert %d", what, got, err, sni.UnrecognizedName)
		}
		hostdirtest.Must(t, os.RemoveAll(dir))
	}
	// More than there are lines for.
	inParallel(100, 10, func(int) { d.expectAlert(snitest.Hello("unknown.example"), sni.UnrecognizedName) })
}

// loadBulk keeps all loops busy for some time, and has more going on at once than there are
// pipes.
func loadBulk(t *testing.T, d *daemon) {
	const width, size = 50, 1 << 20
	want := randomBytes(size)
	inParallel(2*width, width, func(int) {
		c, err := d.tryDial()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		go func() {
			c.Write(snitest.Hello("echo.example"))
			c.Write(want)
			c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || string(got) != string(want) {
			t.Errorf("%d bytes came back, want what was sent; they begin with %.7x, error %v", len(got), got, err)
		}
	})
}

// loadEnds has connections that end in every manner.
func loadEnds(t *testing.T, d *daemon) {
	d.serve("served.example", served)
	d.serve("flood.example", func(c *net.UnixConn) { io.Copy(c, zeros{}) })
	d.serve("resets.example", func(c *net.UnixConn) { c.Read(make([]byte, 1)) })
	if got, err := d.tell(snitest.Hello("served.example"), 1<<20, true); err != nil || string(got) != "served" {
		t.Errorf("after the client's end: got %q, error %v", got, err)
	}
	if _, err := d.exchange(snitest.Hello("resets.example")); !isReset(err) {
		t.Errorf("a reset comes as error %v", err)
	}
	for _, n := range []int{1, 1 << 20} {
		for _, end := range []func(*net.TCPConn){abort, func(c *net.TCPConn) { c.Close() }} {
			c := d.dial()
			c.Write(snitest.Hello("flood.example"))
			if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
				t.Error(err)
			}
			end(c)
		}
	}
	for _, n := range []int{0, 100} {
		c := d.dial()
		c.Write(snitest.Hello("echo.example")[:n])
		abort(c)
	}
}

// loadDescriptors has more clients than there are descriptors for.
func loadDescriptors(t *testing.T, d *daemon) {
	silent := d.crowd(100, nil)
	silent = append(silent, d.awaitFull()...)
	for range 10 {
		if err := d.greeted("greet.example"); err != nil {
			t.Error(err)
		}
	}
	for _, c := range silent {
		c.Close()
	}
	d.exhaust()
}

// loadBacklog has more clients than a backend takes at once.
func loadBacklog(t *testing.T, d *daemon) {
	const n = 20
	l := d.shortBacklog("slow.example")
	base := d.fds()
	var clients sync.WaitGroup
	for range n {
		clients.Go(func() {
			if err := d.greeted("slow.example"); err != nil {
				t.Error(err)
			}
		})
	}
	hostdirtest.Await(t, "all clients to be accepted", func() bool { return d.fds() >= base+n })
	for range n {
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		hostdirtest.Greet(c)
		c.Close()
	}
	clients.Wait()
}

// loadTime has the alerts for which one has to wait.
func loadTime(t *testing.T, d *daemon) {
	hostdirtest.FillBacklog(t, d.hostDir("full.example"))
	hostdirtest.Must(t, os.Chmod(d.hostPath("full.example", "tls-socket"), 0o777))
	var clients sync.WaitGroup
	clients.Go(func() { d.expectAlert(snitest.Hello("full.example"), sni.InternalError) })
	clients.Go(func() { expectTimeout(t, d, snitest.Hello("greet.example")[:50], nil) })
	clients.Wait()
}
