package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: what can never be a host is a remark and no fault: lost+found, a file of any name, a
// directory under a name that is not canonical. With a tls-socket in it, somebody means it to be a
// host: then it is a fault. So is a file, if somebody asks for its name.
func TestNoHosts(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	path := func(name string) string { return filepath.Join(hosts, name) }
	must(t, os.Mkdir(path("lost+found"), 0o700))
	must(t, os.Mkdir(path("Later.Example"), 0o755))
	hostdirtest.Touch(t, path("README.md"), path(entryOf("file.example")))
	symlink(t, "README.md")(path("Link"))
	symlink(t, "nowhere")(path("Dangling"))
	good(t)(path(entryOf("one.example")))
	const never = "not a canonical name, so it is never looked up"
	want := map[string]string{
		"lost+found":            never,
		"Later.Example":         never + ": rename it to later.example; no fault: no tls-socket is seen in it",
		"README.md":             never + ": rename it to readme.md; no fault: it is a regular file",
		"Link":                  never,
		"Dangling":              never,
		entryOf("file.example"): noDirectory + ": it is a regular file; no fault: only a directory, or a symlink to one, can be a host",
		entryOf("one.example"):  "ok",
	}
	for _, u := range users() {
		stdout, stderr, status := check(t, u, "", hosts)
		lines := byLabel(stdout)
		for name, begins := range want {
			if hostdir.Hashed && strings.HasPrefix(begins, never) {
				begins = "not the hash of a name"
			}
			if line := lines[name]; !strings.HasPrefix(line, begins) || name != entryOf("one.example") && !strings.Contains(line, "; no fault: ") {
				t.Errorf("uid %d: %s: %q, want %q", u.uid, name, line, begins)
			}
		}
		if len(lines) != len(want) || stderr != "" || status != 0 {
			t.Errorf("uid %d: stdout %q, stderr %q, exit status %d", u.uid, stdout, stderr, status)
		}
	}
	if stdout, _, status := check(t, users()[0], "", hosts, "file.example"); stdout != "file.example: "+noDirectory+": it is a regular file\n" || status != 1 {
		t.Errorf("asked for: %q, exit status %d", stdout, status)
	}
	hostdirtest.Abandon(t, path("Later.Example"))
	stdout, _, status := check(t, users()[0], "", hosts)
	if line := byLabel(stdout)["Later.Example"]; strings.Contains(line, "no fault") || line == "" || status != 1 {
		t.Errorf("with a socket: %q, exit status %d", line, status)
	}
}

// Goal: who asks for a name that has no entry is told of entries that nearly are it, whether a
// wildcard serves the name or not.
func TestNearby(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	for _, entry := range []string{"One.example", "bücher.example", "dot.example.", "two.exampl", "thrree.example", "fouR.eXample", "four.exampla", "*.y.example"} {
		good(t)(filepath.Join(hosts, entry))
	}
	ask := func(name, want string) {
		t.Helper()
		stdout, stderr, _ := check(t, users()[0], "", hosts, name)
		if stdout != want+"\n" || stderr != "" {
			t.Errorf("stdout %q, stderr %q; want %q", stdout, stderr, want)
		}
	}
	const none = ": no directory: make one, in which the backend listens on tls-socket"
	rename := func(from, to string) string {
		return to + none + "; or rename " + from + " to " + entryOf(to) + ", the only form that is looked up"
	}
	ask("one.example", rename("One.example", "one.example"))
	ask("bücher.example", rename("bücher.example", "xn--bcher-kva.example"))
	ask("dot.example.", rename("dot.example.", "dot.example"))
	ask("four.example", rename("fouR.eXample", "four.example"))
	ask("unlike.example", "unlike.example"+none)
	ask("x.y.example.org", "x.y.example.org"+none)
	if hostdir.Hashed {
		ask("two.example", "two.example"+none)
		return
	}
	ask("two.example", "two.example"+none+"; or is it two.exampl?")
	ask("three.example", "three.example"+none+"; or is it thrree.example?")
	ask("z.y.example", "z.y.example: ok, served by *.y.example")
	good(t)(filepath.Join(hosts, "*"))
	ask("one.example", "one.example: ok, served by *; One.example is never looked up, as that is not the canonical form of the name")
	ask("two.example", "two.example: ok, served by *")
}
