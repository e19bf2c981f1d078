package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: only some of the entries that are no hosts have a line. That others have none is said and
// is a fault. Every host has a line.
func TestStrangers(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	const left = 7
	for i := range strangersMost + left {
		hostdirtest.Touch(t, filepath.Join(hosts, []string{fmt.Sprintf("Wrong-%d", i), entryOf(fmt.Sprintf("file-%d", i))}[i%2]))
	}
	for _, name := range []string{"a.example", "n.example", "z.example"} {
		good(t)(filepath.Join(hosts, entryOf(name)))
	}
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if n := strings.Count(stdout, "\n"); n != strangersMost+3 || strings.Count(stdout, ": ok\n") != 3 || status != 1 ||
		stderr != fmt.Sprintf("sniproxy-check: %d more entries are no hosts, and have no line\n", left) {
		t.Errorf("%d lines, %d good, exit status %d, stderr %q", n, strings.Count(stdout, ": ok\n"), status, stderr)
	}
}

// Goal: if the hosts directory has more entries than there can be hosts, only some are looked at,
// and a line says so.
func TestManyEntries(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	dir, err := unix.Open(hosts, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(dir)
	hostdirtest.Touch(t, filepath.Join(hosts, "file"))
	for i := range entriesMost {
		// A link is cheaper than a file.
		must(t, unix.Linkat(dir, "file", dir, fmt.Sprintf("file-%d", i), 0))
		if i%30000 == 29999 { // file systems have a limit
			must(t, os.Remove(filepath.Join(hosts, "file")))
			hostdirtest.Touch(t, filepath.Join(hosts, "file"))
		}
	}
	stdout, stderr, status := check(t, users()[0], "", hosts)
	want := fmt.Sprintf("sniproxy-check: %d more entries are no hosts, and have no line\n"+
		"sniproxy-check: the hosts directory has more than %d entries: only %d of them are checked\n",
		entriesMost-strangersMost, entriesMost, strangersMost)
	if n := strings.Count(stdout, "\n"); n != strangersMost || stderr != want || status != 1 {
		t.Errorf("%d lines, stderr %q, exit status %d", n, stderr, status)
	}
}

// Goal: in a host's directory with any number of files only some are looked at, and only some get a
// remark.
func TestManyFiles(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	host := filepath.Join(hosts, entryOf("one.example"))
	serve(t, host)
	for i := range 2 * filesMost {
		hostdirtest.Touch(t, filepath.Join(host, fmt.Sprintf("log-%d", i)))
	}
	if got := len(names(host)); got != filesMost {
		t.Errorf("%d files are looked at", got)
	}
	stdout, _, status := check(t, users()[0], "", hosts)
	if n := strings.Count(stdout, " in it means nothing"); n != remarksMost || status != 0 {
		t.Errorf("%d remarks, exit status %d", n, status)
	}
}

// expectShortened checks the lines about hosts of one owner that keep look-ups waiting: only the
// first get as long as sniproxy gives them.
func expectShortened(t *testing.T, stdout string, hosts int, ten string) {
	t.Helper()
	long := len(regexp.MustCompile(`(?m)`+ten+`$`).FindAllString(stdout, -1))
	short := strings.Count(stdout, " for a second, and is not waited for any longer")
	rest := hosts - long - short
	// Look-ups that are made at the same time do not know of each other.
	if long < ownerShort || long >= ownerShort+atOnce || long+short < ownerNone || long+short >= ownerNone+atOnce ||
		strings.Count(stdout, ", as many others have kept this waiting\n") != short+rest {
		t.Errorf("of %d hosts %d are waited for ten seconds, %d for one:\n%s", hosts, long, short, stdout)
	}
}

// Goal: however many hosts have a backend that accepts nobody, only some get ten seconds; those of
// another owner still do.
func TestManyFull(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	t.Parallel()
	dir := hostdirtest.Dir(t)
	hosts := filepath.Join(dir, "hosts")
	must(t, os.Mkdir(hosts, 0o755))
	hostdirtest.FillBacklog(t, filepath.Join(dir, "deaf"))
	const many = 1000
	for i := range many {
		symlink(t, "../deaf")(filepath.Join(hosts, entryOf(fmt.Sprintf("host-%d", i))))
	}
	if os.Geteuid() == 0 {
		// The name comes last, in a hashed build as well.
		theirs(t, symlink(t, "../deaf"))(filepath.Join(hosts, lastEntry))
	}
	stdout, stderr, status := check(t, users()[0], "", hosts)
	if status != 1 || stderr != "" {
		t.Errorf("exit status %d, stderr %q", status, stderr)
	}
	if os.Geteuid() == 0 {
		stdout = strings.TrimSuffix(stdout, "\n")
		i := strings.LastIndex(stdout, "\n") + 1
		last := stdout[i:]
		if !strings.HasSuffix(last, "accepted nobody for ten seconds") || !strings.HasPrefix(last, lastEntry) {
			t.Errorf("of another's it says %q", last)
		}
		stdout = stdout[:i]
	}
	// What takes a second more than that, on a machine with much else to do, is taken for stuck.
	expectShortened(t, stdout, many, "(has accepted nobody for ten seconds|does not answer)")
}

// lastEntry is the name of an entry that sorts behind all others.
var lastEntry = map[bool]string{false: "zzz", true: "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzw"}[hostdir.Hashed]

// Goal: nothing is taken that backends send, or pass, which could be dangerous to close.
func TestDeafDialer(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems let a message in until the connection is made")
	}
	t.Chdir(hostdirtest.Dir(t))
	fd := hostdirtest.Bind(t, entryOf("one.example"), unix.SOCK_STREAM)
	must(t, unix.Listen(fd, 1))
	hosts, err := hostdir.Open()
	must(t, err)
	defer hosts.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		d, err := (&checker{hosts: hosts}).newDialer()
		if err == nil {
			defer d.Close()
			_, err = d.Find([]byte("one.example"), true)
		}
		var b hostdir.Backend
		if err == nil {
			b, err = d.Connect(true)
		}
		if err == nil {
			var peer int
			if peer, _, err = unix.Accept(fd); err == nil {
				err = unix.Sendto(peer, []byte("x"), unix.MSG_NOSIGNAL, nil)
				unix.Close(peer)
			}
			unix.Close(b.FD)
		}
		done <- err
	}()
	if err := <-done; err != unix.EPIPE {
		t.Errorf("the backend's message: %v", err)
	}
}

// Goal: a wildcard that is neither a directory nor a symlink does not count. That is a remark and
// no fault, about the entry itself and about the names that it seems to serve.
func TestOddWildcard(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	hostdirtest.Touch(t, filepath.Join(hosts, entryOf("*")))
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	stdout, stderr, status := check(t, users()[0], "", hosts)
	const odd = "does not count: it is a regular file, and must be a directory or a symlink"
	if want := "one.example: ok\n"; !strings.Contains(stdout, entryOf("*")+": "+odd+"\n") || !hostdir.Hashed && !strings.Contains(stdout, want) || stderr != "" || status != 0 {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
	good(t)(filepath.Join(hosts, entryOf("*.w.example")))
	must(t, os.Remove(filepath.Join(hosts, entryOf("*"))))
	must(t, os.Rename(filepath.Join(hosts, entryOf("*.w.example")), filepath.Join(hosts, entryOf("*"))))
	hostdirtest.Touch(t, filepath.Join(hosts, entryOf("*.w.example")))
	stdout, stderr, status = check(t, users()[0], "", hosts, "a.w.example")
	if want := "a.w.example: ok, served by *; *.w.example " + odd + "\n"; stdout != want || stderr != "" || status != 0 {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}
