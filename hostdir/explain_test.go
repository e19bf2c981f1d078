package hostdir_test

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// Goal: Deciding names the entry that Dial goes by, for names and for wildcards, and those that do not count.
func TestDeciding(t *testing.T) {
	chdir(t)
	for _, name := range []string{"a.example", "*.w.example", "a.w.example", "*.theirs.example", "*"} {
		listen(t, name, 8)
	}
	everything := dirName("*")
	var theirs []string
	if os.Geteuid() == 0 {
		must(t, os.Lchown(dirName("*.theirs.example"), 1000, 1000))
		theirs = []string{dirName("*.theirs.example")}
	}
	for _, c := range []struct {
		name, entry string
		ignored     []string
	}{
		{"a.example", dirName("a.example"), nil},
		{"a.w.example", dirName("a.w.example"), nil},
		{"b.w.example", dirName("*.w.example"), nil},
		{"*.w.example", dirName("*.w.example"), nil},
		{"*.x.example", everything, nil},
		{"w.example", everything, nil},
		{"*", everything, nil},
		{"", everything, nil},
		{"a.theirs.example", everything, theirs},
		{"*.theirs.example", everything, theirs},
	} {
		want := c.entry
		if c.ignored == nil && (c.name == "a.theirs.example" || c.name == "*.theirs.example") {
			want = dirName("*.theirs.example")
		}
		if entry, ignored := hostdir.Deciding([]byte(c.name)); entry != want || !slices.Equal(ignored, c.ignored) {
			t.Errorf("%s: %s, ignored %s; want %s, %s", c.name, entry, ignored, want, c.ignored)
		}
		fd, _, err := hostdir.Dial([]byte(c.name))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		unix.Close(fd)
	}
	must(t, os.RemoveAll(everything))
	for _, name := range []string{"x.example", "*.x.example", "*", ""} {
		if entry, ignored := hostdir.Deciding([]byte(name)); entry != "" || ignored != nil {
			t.Errorf("%s: %s, ignored %s; want none", name, entry, ignored)
		}
		if _, _, err := hostdir.Dial([]byte(name)); problem(err) != hostdir.NoDirectory {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Goal: DialEntry connects to the host of the entry itself, and finds its markers and its problems.
func TestDialEntry(t *testing.T) {
	chdir(t)
	listen(t, "a.example", 8)
	listen(t, "*", 8)
	must(t, os.WriteFile(dirName("a.example")+"/send-proxy-v1", nil, 0o644))
	must(t, os.Mkdir(dirName("b.example"), 0o755))
	for _, c := range []struct {
		entry   string
		problem hostdir.Problem
		proxy   uint8
	}{
		{dirName("a.example"), 0, 1},
		{dirName("*"), 0, 0},
		{dirName("b.example"), hostdir.NoSocket, 0},
		{dirName("c.example"), hostdir.NoDirectory, 0},
	} {
		for way, dial := range entryDialers(t) {
			fd, marks, err := dial([]byte(c.entry))
			if problem(err) != c.problem || marks.Proxy != c.proxy {
				t.Errorf("%s, %s: %v, %v; want problem %d, PROXY %d", way, c.entry, marks, err, c.problem, c.proxy)
			}
			if err == nil {
				unix.Close(fd)
			}
		}
	}
}
