package hostdir_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// With reportOn, names separated by spaces, the test binary looks them up in its working directory
// and prints a report. With forbidden it first calls forbid with that. With noRoom it gets no
// descriptor after it has opened the hosts directory, with noOpening none before.
const (
	reportOn      = "HOSTDIR_TEST_REPORT"
	forbidden     = "HOSTDIR_TEST_FORBIDDEN"
	alsoForbidden = "HOSTDIR_TEST_ALSO_FORBIDDEN"
	noRoom        = "HOSTDIR_TEST_NOROOM"
	noOpening     = "HOSTDIR_TEST_NOOPENING"
)

// A report is what another process finds in a hosts directory.
type report struct {
	NoOpening         bool // Open failed for lack of a descriptor
	Paths             bool
	Refuses, Unmapped bool
	LogAll            bool
	LogAllFailed      bool
	AcceptProxy       bool
	Names             map[string]found
}

// found is the result for a name: with wait false, then with wait true.
type found struct {
	FindNow, ConnectNow, Problem failure
	Entry                        string
	Owner                        uint32
	Administrators, Foreign      bool
	Proxy                        uint8
	Log                          bool
	Ignored                      bool
	OOBInline                    int
}

func TestMain(m *testing.M) {
	names, is := os.LookupEnv(reportOn)
	if !is {
		os.Exit(m.Run())
	}
	runtime.LockOSThread()
	forbid(os.Getenv(forbidden))
	forbid(os.Getenv(alsoForbidden))
	r, err := makeReport(strings.Split(names, " "))
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(r)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func makeReport(names []string) (r report, err error) {
	leaveNoRoom := func(when string) error {
		if os.Getenv(when) == "" {
			return nil
		}
		return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{})
	}
	if err := leaveNoRoom(noOpening); err != nil {
		return r, err
	}
	h, err := hostdir.Open()
	if errors.Is(err, unix.EMFILE) {
		return report{NoOpening: true}, nil
	}
	if err != nil {
		return r, err
	}
	if err := leaveNoRoom(noRoom); err != nil {
		return r, err
	}
	d, err := h.NewDialer()
	if err != nil {
		return r, err
	}
	all, err := h.LogAll()
	r = report{
		Paths: h.PathsOnly() != nil, Refuses: h.RefusesDescriptors(), Unmapped: h.Unmapped(),
		LogAll: all, LogAllFailed: err != nil, Names: map[string]found{},
	}
	if r.AcceptProxy, _, err = h.AcceptProxy(); err != nil {
		return r, err
	}
	for _, name := range names {
		r.Names[name] = find(d, name)
	}
	return r, nil
}

func find(d *hostdir.Dialer, name string) (f found) {
	_, err := d.Find([]byte(name), false)
	f.FindNow = problem(err)
	b, err := d.Connect(false)
	f.ConnectNow = problem(err)
	if err == nil {
		unix.Close(b.FD)
	}
	var e hostdir.Entry
	b, err = again(d, true, func() (_ hostdir.Entry, err error) {
		e, err = d.Find([]byte(name), true)
		return e, err
	})
	f.Problem = problem(err)
	f.Entry, f.Owner, f.Administrators, f.Foreign = string(e.Name), e.Owner, e.Administrators, e.Foreign
	f.Proxy, f.Log = b.Proxy, b.Log
	if err == nil {
		f.OOBInline, _ = unix.GetsockoptInt(b.FD, unix.SOL_SOCKET, unix.SO_OOBINLINE)
		unix.Close(b.FD)
	}
	var what *hostdir.Error
	f.Ignored = errors.As(err, &what) && what.Ignored
	d.Leave()
	return f
}

// elsewhere has another process report what it finds in the working directory. The function change
// may change the command.
func elsewhere(t *testing.T, names string, change func(*exec.Cmd)) (r report) {
	t.Helper()
	cmd := childCommand(t, names)
	if change != nil {
		change(cmd)
	}
	stdout, stderr, status := hostdirtest.Run(t, cmd)
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != 0 {
		t.Fatalf("%v, exit status %d: %s", err, status, stderr)
	}
	return r
}

func childCommand(t *testing.T, names string) *exec.Cmd {
	t.Helper()
	cmd := hostdirtest.Command(t, reportOn+"="+names)
	if os.Geteuid() == 0 { // it is where only root can enter
		self, err := filepath.Abs(".self")
		must(t, err)
		if _, err := os.Lstat(self); err != nil {
			hostdirtest.CopyProgram(t, cmd.Path, self)
		}
		cmd.Path = self
	}
	return cmd
}

// with sets a variable in the environment of a process.
func with(name, value string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, name+"="+value) }
}
