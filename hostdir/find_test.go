package hostdir_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// Goal: Hosts.Find names the same entry as a Dialer, for names and for wildcards, and the wildcards
// that do not count.
func TestFind(t *testing.T) { eachWay(t, testFind) }

func testFind(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
	h := open(t)
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
		if e, ignored, err := h.Find([]byte(c.name), true); string(e.Name) != want || !slices.Equal(ignored, c.ignored) || err != nil {
			t.Errorf("%s: %s, ignored %s, error %v; want %s, %s", c.name, e.Name, ignored, err, want, c.ignored)
		}
		b, err := dial(c.name)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		unix.Close(b.FD)
	}
	must(t, os.RemoveAll(everything))
	for _, name := range []string{"x.example", "*.x.example", "*", ""} {
		if e, ignored, err := h.Find([]byte(name), true); e.Name != nil || ignored != nil || problem(err) != noDirectory {
			t.Errorf("%s: %s, ignored %s, error %v; want none", name, e.Name, ignored, err)
		}
		if _, err := dial(name); problem(err) != noDirectory {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Goal: FindEntry finds the entry itself, with its markers and its problems.
func TestFindEntry(t *testing.T) {
	for _, w := range ways(t) {
		chdir(t)
		h := open(t)
		if w.paths {
			h.UsePaths()
		}
		listen(t, "a.example", 8)
		listen(t, "*", 8)
		must(t, os.WriteFile(dirName("a.example")+"/send-proxy-v1", nil, 0o644))
		must(t, os.Mkdir(dirName("b.example"), 0o755))
		withDialer(t, h, func(d *hostdir.Dialer) {
			for _, c := range []struct {
				entry   string
				problem failure
				proxy   uint8
			}{
				{dirName("a.example"), 0, 1},
				{dirName("*"), 0, 0},
				{dirName("b.example"), noSocket, 0},
				{dirName("c.example"), noDirectory, 0},
				{strings.Repeat("a", 256), noDirectory, 0},
			} {
				wait := w.name != "now"
				b, err := again(d, wait, func() (hostdir.Entry, error) { return d.FindEntry([]byte(c.entry), wait) })
				if problem(err) != c.problem || b.Proxy != c.proxy {
					t.Errorf("%s, %s: %+v, %v; want problem %d, PROXY %d", w.name, c.entry, b, err, c.problem, c.proxy)
				}
				if err == nil {
					unix.Close(b.FD)
				}
			}
			d.Leave()
		})
	}
}
