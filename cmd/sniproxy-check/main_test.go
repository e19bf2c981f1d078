package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// workspace holds what the tests share. Any user may enter it.
var workspace string

func TestMain(m *testing.M) {
	if os.Getenv("SNIPROXY_CHECK_ACCESS") != "" {
		printAccess(os.Args[1:])
		return
	}
	if os.Getenv("SNIPROXY_CHECK_RUN_MAIN") != "" {
		if os.Getenv("SNIPROXY_CHECK_NO_UNSHARE") != "" {
			forbidUnshare()
		}
		if os.Getenv("SNIPROXY_CHECK_NO_PASSRIGHTS") != "" {
			forbidPassRights()
		}
		main()
	}
	os.Exit(func() int {
		var err error
		if workspace, err = os.MkdirTemp("", "check"); err == nil {
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

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// engines are the build tags of the engines that sniproxy has on this system.
var engines = map[bool][]string{true: {"", "portable"}, false: {""}}[runtime.GOOS == "linux"]

var (
	built   = map[string]string{}
	builtMu sync.Mutex
)

// build returns the path of a program of the project, built for an engine.
func build(t *testing.T, program, engine string) string {
	t.Helper()
	builtMu.Lock()
	defer builtMu.Unlock()
	key := program + "-" + engine
	if built[key] == "" {
		dir, err := os.MkdirTemp(workspace, "")
		must(t, err)
		must(t, os.Chmod(dir, 0o755))
		built[key] = hostdirtest.Program(t, dir, program, engine)
	}
	return built[key]
}

// self returns a path of this test binary where every user may execute it. As sniproxy-check it has
// the race detector if the test has.
func self(t *testing.T) string {
	t.Helper()
	path := filepath.Join(workspace, "self")
	builtMu.Lock()
	defer builtMu.Unlock()
	if built[path] == "" {
		own, err := os.Executable()
		must(t, err)
		hostdirtest.CopyProgram(t, own, path) // it is in a directory that only its owner can enter
		built[path] = path
	}
	return path
}

// A user is who runs a program.
type user struct{ uid int }

// users returns those that the test can run a program as.
func users() []user {
	if os.Geteuid() == 0 {
		return []user{{0}, {65534}}
	}
	return []user{{os.Geteuid()}}
}

// command returns a program that this user will run.
func (u user) command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Dir = "/"
	cmd.Env = hostdirtest.Environ("SNIPROXY_CHECK_RUN_MAIN=1")
	if u.uid != os.Geteuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(u.uid), Gid: uint32(u.uid)}}
	}
	return cmd
}

// forItself returns arguments that have sniproxy-check answer for the user who runs it.
func (u user) forItself(args ...string) []string {
	return append([]string{"-u", fmt.Sprint(u.uid)}, args...)
}

// check runs sniproxy-check to its end. It answers for who runs it.
func check(t *testing.T, u user, dir string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return checkFor(t, u, dir, u.forItself(args...)...)
}

// checkFor is check for whom the arguments say.
func checkFor(t *testing.T, u user, dir string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := u.command(self(t), args...)
	if dir != "" {
		cmd.Dir = dir
	}
	return hostdirtest.Run(t, cmd)
}

// entryOf returns the name of the directory of a host.
func entryOf(name string) string { return hostdirtest.Entry(name) }

// Goal: any wrong option gives the usage on stderr and exit status 2; -h gives it on stdout and
// exit status 0. The usage says that backends are connected to, and only in a hashed build that it
// is one.
func TestUsage(t *testing.T) {
	for _, args := range []string{"-h", "--help", "-", "-x", "-u", "-u=", "-t -u"} {
		stdout, stderr, status := checkFor(t, users()[0], "", strings.Fields(args)...)
		want := 2
		if args == "-h" {
			want, stdout, stderr = 0, stderr, stdout
		}
		if stdout != "" || status != want || !strings.HasPrefix(stderr, "usage: sniproxy-check [-t] [-u USER] [HOSTS-DIRECTORY [NAME...]]\n") ||
			!strings.Contains(stderr, "\nThis is version ") {
			t.Errorf("%s: stdout %q, stderr %q, exit status %d; want the usage and %d", args, stdout, stderr, status, want)
		}
		if !strings.Contains(stderr, "It connects to each backend") {
			t.Errorf("the usage does not say that backends are connected to: %q", stderr)
		}
		if got := strings.Contains(stderr, "hashed build"); got != hostdir.Hashed {
			t.Errorf("usage %q mentions a hashed build: %t; want %t", stderr, got, hostdir.Hashed)
		}
	}
}

// Goal: the default hosts directory is the working directory; entries that begin with a dot are
// passed over; the exit status is 0 if every host can be served, and 1 if one cannot.
func TestDirectory(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	for _, name := range []string{"one.example", "two.example"} {
		serve(t, filepath.Join(hosts, entryOf(name)))
	}
	must(t, os.Mkdir(filepath.Join(hosts, ".hidden"), 0o755))
	for _, u := range users() {
		for _, c := range []struct {
			dir  string
			args []string
		}{{hosts, nil}, {hosts, []string{"."}}, {"", []string{hosts}}, {filepath.Dir(hosts), []string{filepath.Base(hosts)}}} {
			stdout, stderr, status := check(t, u, c.dir, c.args...)
			if strings.Count(stdout, "\n") != 2 || strings.Count(stdout, ": ok\n") != 2 || stderr != "" || status != 0 {
				t.Errorf("uid %d, %q: stdout %q, stderr %q, exit status %d", u.uid, c.args, stdout, stderr, status)
			}
		}
		stdout, stderr, status := check(t, u, "", hosts, "One.Example.", "three.example")
		if !strings.HasPrefix(stdout, "one.example: ok\nthree.example: no directory: ") || stderr != "" || status != 1 {
			t.Errorf("uid %d: stdout %q, stderr %q, exit status %d", u.uid, stdout, stderr, status)
		}
	}
}

// Goal: an empty hosts directory is no failure, but a line says so.
func TestEmpty(t *testing.T) {
	stdout, stderr, status := check(t, users()[0], "", hostdirtest.Dir(t))
	if stdout != "" || !strings.HasPrefix(stderr, "sniproxy-check: there are no hosts in ") || status != 0 {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}

// Goal: an .accept-proxy is no host, and has a line only if it is a tenant's, and does not count.
func TestAcceptProxy(t *testing.T) {
	hostdirtest.NeedRoot(t)
	hosts := hostdirtest.Dir(t)
	serve(t, filepath.Join(hosts, entryOf("one.example")))
	marker := filepath.Join(hosts, ".accept-proxy")
	must(t, os.Mkdir(marker, 0o755))
	root := users()[0]
	if stdout, stderr, status := check(t, root, hosts); strings.Count(stdout, "\n") != 1 || stderr != "" || status != 0 {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
	must(t, os.Chown(marker, 65532, 65532))
	const want = "sniproxy-check: .accept-proxy in the hosts directory does not count: it belongs to uid 65532, "
	if stdout, stderr, status := check(t, root, hosts); strings.Count(stdout, "\n") != 1 || !strings.HasPrefix(stderr, want) || status != 0 {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}

// Goal: if the hosts directory cannot be entered or listed, one line on stderr says what is missing
// and where, and the exit status is 1. A directory that cannot be listed can be checked by name,
// since sniproxy can serve it.
func TestDirectoryUnreadable(t *testing.T) {
	u := users()[len(users())-1]
	if u.uid == 0 {
		t.Skip("nothing is forbidden to root")
	}
	parent := hostdirtest.Dir(t)
	hosts := filepath.Join(parent, "hosts")
	serve(t, filepath.Join(hosts, entryOf("one.example")))
	must(t, os.WriteFile(filepath.Join(parent, "file"), nil, 0o644))
	mode := func(parentMode, hostsMode os.FileMode) func() {
		return func() {
			must(t, os.Chmod(parent, 0o755))
			must(t, os.Chmod(hosts, hostsMode))
			must(t, os.Chmod(parent, parentMode))
		}
	}
	for _, c := range []struct {
		prepare func()
		dir     string
		want    string
	}{
		{mode(0o755, 0o755), parent + "/none", "sniproxy-check: cannot enter the hosts directory DIR: no such file or directory\n"},
		{mode(0o755, 0o755), parent + "/file", "sniproxy-check: cannot enter the hosts directory DIR: not a directory\n"},
		{mode(0o755, 0o444), hosts, "sniproxy-check: cannot enter the hosts directory DIR: permission denied: x is missing on the directory DIR (mode 0444, uid ME)"},
		{mode(0o644, 0o755), hosts, "sniproxy-check: cannot enter the hosts directory DIR: permission denied: x is missing on the directory PARENT (mode 0644, uid ME)"},
		{mode(0o755, 0o111), hosts, "sniproxy-check: cannot list the hosts directory DIR: permission denied: r is missing on the directory DIR (mode 0111, uid ME)"},
	} {
		c.prepare()
		stdout, stderr, status := check(t, u, "", c.dir)
		want := strings.NewReplacer("DIR", c.dir, "PARENT", parent, "ME", fmt.Sprint(os.Geteuid())).Replace(c.want)
		if stdout != "" || !strings.HasPrefix(stderr, want) || strings.Count(stderr, "\n") != 1 || status != 1 {
			t.Errorf("stdout %q, stderr %q, exit status %d; want %q", stdout, stderr, status, want)
		}
	}
	if stdout, stderr, status := check(t, u, "", hosts, "one.example"); stdout != "one.example: ok\n" || stderr != "" || status != 0 {
		t.Errorf("by name: stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
	must(t, os.Chmod(hosts, 0o755))
}

// Goal: output that cannot be written gives a line on stderr and exit status 1, so that no script
// takes silence for good news.
func TestOutputLost(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err) // only Linux and some BSDs have it
	}
	defer full.Close()
	hosts := hostdirtest.Dir(t)
	serve(t, filepath.Join(hosts, entryOf("one.example")))
	cmd := users()[0].command(self(t), users()[0].forItself(hosts)...)
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = full, &stderr
	err = cmd.Run()
	if status := cmd.ProcessState.ExitCode(); status != 1 || !strings.HasPrefix(stderr.String(), "sniproxy-check: write ") {
		t.Errorf("%v, stderr %q", err, stderr.String())
	}
}

// Goal: many hosts, some of them slow, each have one line, in the order of the names.
func TestOrder(t *testing.T) {
	hosts := hostdirtest.Dir(t)
	var names []string
	for i := range 3 * atOnce {
		name := fmt.Sprintf("host%02d.example", i)
		names = append(names, name)
		if i == 7 {
			continue // the fastest answer
		}
		serve(t, filepath.Join(hosts, entryOf(name)))
	}
	stdout, _, status := check(t, users()[0], "", append([]string{hosts}, names...)...)
	lines := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
	if len(lines) != len(names) || status != 1 {
		t.Fatalf("%d lines, exit status %d", len(lines), status)
	}
	for i, line := range lines {
		if want := names[i] + ": ok"; line != want && i != 7 {
			t.Errorf("line %d is %q, want %q", i, line, want)
		}
	}
}

// Goal: where no descriptor is left, sniproxy-check says so and what to do, and does not call the
// host good. It does not crash, unless there are too few for Go's runtime to begin with.
func TestNoRoom(t *testing.T) {
	z := newZoo(t)
	z.add(animal{name: "one.example", make: good(t)})
	const reason = "no descriptor is left to connect to tls-socket with"
	limited := func(n int, checker string, args ...string) *exec.Cmd {
		script := fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, n)
		return users()[0].command("/bin/sh", append([]string{"-c", script, checker}, args...)...)
	}
	for _, engine := range engines {
		said := false
		checker := build(t, "sniproxy-check", engine)
		for n := 3; ; n++ {
			var stdout, stderr strings.Builder
			cmd := limited(n, checker, users()[0].forItself(z.hosts, "one.example")...)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			out, trace := stdout.String(), stderr.String()
			if err == nil && out == "one.example: ok\n" {
				break
			}
			switch {
			case strings.HasPrefix(out, "one.example: "+reason+": raise the limit") && trace == "":
				said = true
			case strings.HasPrefix(trace, "sniproxy-check: cannot open the hosts directory") && strings.HasSuffix(trace, ": raise the limit (ulimit -n)\n") && out == "" && !said:
			case strings.Contains(trace, "netpollinit") && !strings.Contains(trace, "main.(*worker)") && !said && n < 100:
				// It has not begun: without these descriptors Go's runtime ends every program that
				// starts a timer.
			default:
				t.Fatalf("engine %q, with %d descriptors: %q, %.100q, %v", engine, n, out, trace, err)
			}
		}
		if !said {
			t.Errorf("engine %q: sniproxy-check never said that no descriptor was left", engine)
		}
	}
}

// Goal: while a host's directory is exchanged the look-up is made again, as in sniproxy. If it is
// exchanged all the time, that is the problem, and not that a file system does not answer.
func TestExchanged(t *testing.T) {
	t.Parallel()
	times := 0
	_, err := redial(func() (hostdir.Backend, error) {
		if times++; times < 3 {
			return hostdir.Backend{FD: -1}, hostdir.Exchanged
		}
		return hostdir.Backend{FD: -1}, &hostdir.Error{Problem: hostdir.NobodyListens}
	}, lookupLimit)
	if times != 3 || problem(err) != hostdir.NobodyListens {
		t.Errorf("after %d look-ups: %v", times, err)
	}
	_, err = redial(func() (hostdir.Backend, error) { return hostdir.Backend{FD: -1}, hostdir.Exchanged }, shortLimit)
	if got := (&checker{}).explain(nil, "one.example", nil, shortLimit, err); !strings.HasPrefix(got, "the directory was exchanged: the entry, ") {
		t.Errorf("it says %q", got)
	}
}

// Goal: of the symlinks on a path, the one is found that fs.protected_symlinks keeps from being
// followed: in a sticky directory that everybody can write to, and owned neither by us nor by the
// owner of the directory. It does not matter whether the setting is on.
func TestUnprotected(t *testing.T) {
	hostdirtest.NeedRoot(t)
	dir := hostdirtest.Dir(t)
	sticky := filepath.Join(dir, "sticky")
	must(t, os.Mkdir(sticky, 0o755))
	must(t, os.Chmod(sticky, 0o777|os.ModeSticky))
	must(t, os.Mkdir(filepath.Join(dir, "target"), 0o755))
	symlink(t, "../target")(filepath.Join(sticky, "ours"))
	theirs(t, symlink(t, "../target"))(filepath.Join(sticky, "theirs"))
	theirs(t, symlink(t, "target"))(filepath.Join(dir, "elsewhere"))
	symlink(t, "sticky/theirs")(filepath.Join(dir, "through"))
	bad := filepath.Join(sticky, "theirs")
	e := ours()
	for path, want := range map[string]string{"sticky/ours": "", "sticky/theirs": bad, "elsewhere": "", "through/.": bad} {
		_, links, _, _ := e.walkLinks(filepath.Join(dir, path))
		if got := e.unprotected(links); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// Goal: the examples of the README are what the program prints.
func TestReadme(t *testing.T) {
	if hostdir.Hashed || os.Geteuid() != 0 {
		t.Skip("needs root, for the owners, and a build without hashes")
	}
	hosts := hostdirtest.Dir(t)
	path := func(entry string) string { return filepath.Join(hosts, entry) }
	good(t)(path("*.one.example"))
	theirs(t, good(t))(path("*.two.example"))
	hostdirtest.Abandon(t, path("five.example"))
	theirs(t, good(t))(path("four.example"))
	must(t, os.Chmod(path("four.example"), 0o700))
	speak(t, path("one.example"), certify(t, begin, end, "one.example"))
	hostdirtest.Touch(t, path("one.example/send-proxy-v2"), path("one.example/log-connections"), path("README.md"))
	symlink(t, "../backends/six")(path("six.example"))
	good(t)(path("Three.example"))
	good(t, "send-proxy-v3")(path("two.example"))

	text, err := os.ReadFile("../../README.md")
	must(t, err)
	examples := regexp.MustCompile(`(?m)^    \$ sniproxy-check (.*)\n((?:    [^$].*\n)+)`).FindAllStringSubmatch(string(text), -1)
	if len(examples) != 3 {
		t.Errorf("the README has %d examples", len(examples))
	}
	for _, example := range examples {
		want := strings.ReplaceAll("\n"+example[2], "\n    ", "\n")[1:]
		if strings.Contains(example[1], "seven.example") {
			seven := path("seven.example")
			speak(t, seven, certify(t, begin, end, "seven.example"))
			hostdirtest.Touch(t, seven+"/send-proxy-v1")
		}
		args := append([]string{"-u", "998:998"}, strings.Fields(strings.ReplaceAll(example[1], "/srv/sniproxy", hosts))...)
		stdout, stderr, status := checkFor(t, user{0}, "", args...)
		if stdout = strings.ReplaceAll(stdout, hosts, "/srv/sniproxy"); stdout != want || stderr != "" || status != 1 {
			t.Errorf("%s: stderr %q, exit status %d, and it prints\n%s, but the README has\n%s", example[1], stderr, status, stdout, want)
		}
	}
}

// problem returns the problem in an error of a look-up, 0 if there is none.
func problem(err error) hostdir.Problem {
	var e *hostdir.Error
	errors.As(err, &e)
	if e == nil {
		return 0
	}
	return e.Problem
}
