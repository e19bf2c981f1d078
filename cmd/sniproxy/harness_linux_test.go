package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// With this variable, a list with commas, the system forbids a daemon what is in denials. It may
// also be set for all daemons of a test run.
const denyVariable = "SNIPROXY_TEST_DENY"

// denials are what some systems forbid, or do not have.
var denials = map[string]struct {
	call  uint32
	args  map[int]uint32 // of the calls that fail: by their numbers, those that matter
	errno unix.Errno
}{
	// A working directory of the thread's own, as container engines do by default.
	"unshare": {unix.SYS_UNSHARE, nil, unix.EPERM},
	// Not to be passed descriptors, as Linux before 6.16.
	"passrights": {unix.SYS_SETSOCKOPT, map[int]uint32{1: unix.SOL_SOCKET, 2: soPassRights}, unix.ENOPROTOOPT},
}

// soPassRights is SO_PASSRIGHTS, which package unix does not have.
const soPassRights = 83

// deny has the system forbid the daemon one of denials.
func deny(what string) setup {
	return func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, denyVariable+"="+strings.Join(append(deniedToAll(), what), ","))
	}
}

// deniedToAll returns what is forbidden to all daemons of the test run.
func deniedToAll() []string {
	return strings.FieldsFunc(os.Getenv(denyVariable), func(r rune) bool { return r == ',' })
}

// denied tells whether something is forbidden to all daemons of the test run.
func denied(what string) bool { return slices.Contains(deniedToAll(), what) }

// Both engines connect from within the host's directory, so its name can have any length, unless the
// system forbids a thread a working directory of its own.
var anyName = !denied("unshare")

// They have the directory that it connects from open, so a symlink may be switched at any rate, with the
// same exception.
var switchPause = map[bool]time.Duration{false: 40 * time.Millisecond}[anyName]

// limitThreads runs the daemon with a limit of the threads of its user (RLIMIT_NPROC), of which root
// has none.
func limitThreads(n int) setup {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", threadsVariable, n)) }
}

const threadsVariable = "SNIPROXY_TEST_THREADS"

func init() {
	if os.Getenv(impersonate) == "" {
		return
	}
	if n, err := strconv.ParseUint(os.Getenv(threadsVariable), 10, 64); err == nil {
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			fmt.Fprintln(os.Stderr, "cannot limit threads:", err)
			os.Exit(255)
		}
	}
	for _, what := range deniedToAll() {
		if err := denyNow(what); err != nil {
			fmt.Fprintf(os.Stderr, "cannot deny %s: %v\n", what, err)
			os.Exit(255)
		}
	}
}

// denyNow installs a filter as in seccomp(2), for all threads. What the filter looks at is struct
// seccomp_data: the number of the call comes first, the arguments from 16 on, the lower halves
// first on the machines that there are.
func denyNow(what string) error {
	d, ok := denials[what]
	if !ok {
		return fmt.Errorf("%s is not in the list", what)
	}
	const allow = 1 // how many instructions are behind the tests, without this
	var filter []unix.SockFilter
	test := func(offset, value uint32) {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value})
	}
	test(0, d.call)
	for arg, value := range d.args {
		test(16+8*uint32(arg), value)
	}
	for i := 1; i < len(filter); i += 2 {
		filter[i].Jf = uint8(len(filter) - i - 1 + allow)
	}
	filter = append(filter,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(d.errno)},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// needRoot skips the test where files cannot be given away.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
}
