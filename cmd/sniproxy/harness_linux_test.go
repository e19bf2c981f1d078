package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
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
	"passrights": {unix.SYS_SETSOCKOPT, map[int]uint32{1: unix.SOL_SOCKET, 2: hostdirtest.SOPassRights}, unix.ENOPROTOOPT},
}

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

// Both engines connect from within the host's directory, so its name can have any length, unless
// the system forbids a thread a working directory of its own.
var anyName = !denied("unshare")

// They have the directory that it connects from open, so a symlink may be switched at any rate,
// with the same exception.
var switchPause = map[bool]time.Duration{false: 40 * time.Millisecond}[anyName]

// limitThreads runs the daemon with a limit of the threads of its user (RLIMIT_NPROC), of which
// root has none.
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
		d, ok := denials[what]
		if !ok {
			fmt.Fprintln(os.Stderr, "cannot deny", what)
			os.Exit(255)
		}
		if err := hostdirtest.Deny(d.call, d.args, d.errno); err != nil {
			fmt.Fprintf(os.Stderr, "cannot deny %s: %v\n", what, err)
			os.Exit(255)
		}
	}
}
