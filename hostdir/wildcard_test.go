package hostdir_test

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// A site is a host that tells who was connected to.
type site struct {
	name string
	fd   int
}

func sites(t *testing.T, names ...string) (s []site) {
	t.Helper()
	for _, name := range names {
		fd := listen(t, name, 100)
		must(t, unix.SetNonblock(fd, true))
		s = append(s, site{name, fd})
	}
	return s
}

// reached takes the connections that wait, and returns the names of their sites.
func reached(t *testing.T, all []site) string {
	t.Helper()
	var names []string
	for _, s := range all {
		if fd, _, err := unix.Accept(s.fd); err == nil {
			unix.Close(fd)
			names = append(names, s.name)
		}
	}
	return strings.Join(names, " and ")
}

// Goal: the entry of its own name serves a host, or else the wildcard with an asterisk for its
// first label, or else *. The entry * also serves clients that name no host.
func TestDialWildcard(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		all := sites(t, "a.example.com", "*.example.com", "*.com")
		words := map[string]string{
			"a.example.com": "a.example.com", "b.example.com": "*.example.com", "example.com": "*.com",
			"a.b.example.com": "", "a.a.example.com": "", "com": "", "a": "", "": "",
			strings.Repeat("a", 242) + ".example.com": "*.example.com",
		}
		check := func() {
			t.Helper()
			for name, want := range words {
				b, err := dial(name)
				if err == nil {
					unix.Close(b.FD)
				}
				if got := reached(t, all); got != want || b.Proxy != 0 || b.Log {
					t.Errorf("%.40q: reached %q, markers %+v, error %v, want %q", name, got, b, err, want)
				}
				var e *hostdir.Error
				if want == "" && (!errors.As(err, &e) || e.Problem != hostdir.NoDirectory || e.Ignored) {
					t.Errorf("%.40q: error %#v", name, err)
				}
			}
		}
		check()
		all = append(all, sites(t, "*")...)
		for name, want := range words {
			if want == "" {
				words[name] = "*"
			}
		}
		check()
	})
}

// Goal: there is no fallback from an entry that counts but cannot serve, and no descriptor is lost.
func TestDialWildcardDown(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		all := sites(t, "*.good.example", "*")
		bad := map[string]failure{
			"file": noDirectory, "dangling": noDirectory, "loop": noDirectory,
			"empty": noSocket, "abandoned": nobodyListens,
		}
		put := func(what, entry string) {
			t.Helper()
			path := dirName(entry)
			switch what {
			case "file":
				must(t, os.WriteFile(path, nil, 0o644))
			case "dangling":
				must(t, os.Symlink("nowhere", path))
			case "loop":
				must(t, os.Symlink(path, path))
			case "empty":
				must(t, os.Mkdir(path, 0o755))
			case "abandoned":
				hostdirtest.Abandon(t, path)
			}
		}
		base := descriptors(t)
		for what, want := range bad {
			for _, entry := range []string{"bad.good.example", "*.bad.example"} {
				if what == "file" && entry == "*.bad.example" {
					continue // it does not count
				}
				put(what, entry)
				name := strings.Replace(entry, "*", "a", 1)
				_, err := dial(name)
				if got := reached(t, all); got != "" || problem(err) != want {
					t.Errorf("%s as %s: reached %q, error %v", what, entry, got, err)
				}
				must(t, os.RemoveAll(dirName(entry)))
				b, err := dial(name)
				if err != nil {
					t.Fatal(err)
				}
				unix.Close(b.FD)
				reached(t, all)
			}
		}
		must(t, os.RemoveAll(dirName("*")))
		for what, want := range bad {
			put(what, "*")
			for _, name := range []string{"any.example", "any", ""} {
				if _, err := dial(name); problem(err) != want {
					t.Errorf("%s as *: %q: error %v", what, name, err)
				}
			}
			must(t, os.RemoveAll(dirName("*")))
		}
		if got := descriptors(t); got != base {
			t.Errorf("%d descriptors, %d before", got, base)
		}
	})
}

// Goal: the markers are those of the entry that serves the name. Version 2 of the PROXY protocol
// overrides version 1.
func TestDialMarkers(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		all := sites(t, "a.example", "*.example", "*")
		for entry, markers := range map[string][]string{
			"a.example": {"send-proxy-v1", "send-proxy-v2"},
			"*.example": {"send-proxy-v1", "log-connections"},
			"*":         {"send-proxy-v2"},
		} {
			for _, marker := range markers {
				must(t, os.Symlink("nowhere", dirName(entry)+"/"+marker))
			}
		}
		for name, want := range map[string]hostdir.Backend{
			"a.example": {Proxy: 2}, "b.example": {Proxy: 1, Log: true}, "c": {Proxy: 2}, "": {Proxy: 2},
		} {
			b, err := dial(name)
			if err != nil || marks(b) != want {
				t.Errorf("%q: markers %+v, error %v, want %+v", name, b, err, want)
			}
			unix.Close(b.FD)
		}
		reached(t, all)
	})
}

// Goal: a wildcard counts only if the entry itself belongs to root or to the owner of the hosts
// directory. Others are passed over, and if nothing else serves the name the error says so.
func TestDialWildcardOwner(t *testing.T) {
	hostdirtest.NeedRoot(t)
	const owner, other = 65533, 65532
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		must(t, os.Chown(".", owner, owner))
		all := sites(t, "target", "*.directory.example")
		must(t, os.Chown(dirName("target"), other, other))
		must(t, os.Symlink(dirName("target"), dirName("*.link.example")))
		must(t, os.Symlink("nowhere", dirName("*.dangling.example")))
		kinds := []string{"directory", "link", "dangling"}
		check := func(uid int, kind, name string, wantSite string, wantIgnored bool) {
			t.Helper()
			b, err := dial(name)
			if err == nil {
				unix.Close(b.FD)
			}
			var e *hostdir.Error
			errors.As(err, &e)
			if got := reached(t, all); got != wantSite {
				t.Errorf("%s of %d: %q: reached %q, error %v, want %q", kind, uid, name, got, err, wantSite)
			}
			if wantSite == "" && (e == nil || e.Problem != hostdir.NoDirectory || e.Ignored != wantIgnored ||
				wantIgnored != strings.Contains(e.Error(), "belongs neither to root nor to the owner")) {
				t.Errorf("%s of %d: %q: error %#v (%v), want Ignored %v", kind, uid, name, e, err, wantIgnored)
			}
		}
		for _, uid := range []int{0, owner, other, 1} {
			counts := uid == 0 || uid == owner
			for _, kind := range kinds {
				entry := dirName(fmt.Sprintf("*.%s.example", kind))
				must(t, os.Lchown(entry, uid, uid))
				want := map[string]string{"directory": "*.directory.example", "link": "target", "dangling": ""}[kind]
				if !counts {
					want = ""
				}
				check(uid, kind, "a."+kind+".example", want, !counts)
				check(uid, kind, "a.b."+kind+".example", "", false)

				must(t, os.Rename(entry, dirName("*")))
				for _, name := range []string{"a." + kind + ".example", "a", ""} {
					check(uid, kind+" for all", name, want, !counts)
				}
				must(t, os.Rename(dirName("*"), entry))

				// A good * serves the names of a wildcard that does not count.
				if !counts {
					all = append(all, sites(t, "*")...)
					check(uid, kind, "a."+kind+".example", "*", false)
					must(t, os.RemoveAll(dirName("*")))
					all = slices.Clip(all[:len(all)-1])
				}
			}
		}
	})
}
