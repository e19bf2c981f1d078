package hostdir_test

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// tenant is a user who is not the administrator.
const tenant = 65532

// Goal: a wildcard that is neither a directory nor a symlink does not count, whoever owns it: the
// look-up passes over it, and Hosts.Find names it. The entry of a host that is neither cannot
// serve.
func TestFindOdd(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		h := open(t)
		all := sites(t, "*")
		file := func(path string) error { return os.WriteFile(path, nil, 0o644) }
		fifo := func(path string) error { return unix.Mkfifo(path, 0o644) }
		socket := func(path string) error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			must(t, err)
			defer unix.Close(fd)
			return unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		}
		for what, put := range map[string]func(string) error{"file": file, "fifo": fifo, "socket": socket} {
			must(t, put(dirName("*.example")))
			must(t, put(dirName("own.example")))
			b, err := dial("a.example")
			if err == nil {
				unix.Close(b.FD)
			}
			if got := reached(t, all); got != "*" {
				t.Errorf("%s: reached %q, %v", what, got, err)
			}
			if e, over, err := h.Find([]byte("a.example"), true); string(e.Name) != dirName("*") || !slices.Equal(over, []string{dirName("*.example")}) || err != nil {
				t.Errorf("%s: %q, passed over %q, %v", what, e.Name, over, err)
			}
			if _, err := dial("own.example"); problem(err) != noDirectory {
				t.Errorf("%s: %v", what, err)
			}
			if e, _, err := h.Find([]byte("own.example"), true); string(e.Name) != dirName("own.example") || problem(err) != noDirectory {
				t.Errorf("%s: %q, %v", what, e.Name, err)
			}
			must(t, os.Remove(dirName("*.example")))
			must(t, os.Remove(dirName("own.example")))
		}
		must(t, os.RemoveAll(dirName("*")))
		must(t, file(dirName("*")))
		_, err := dial("a.example")
		if e, _ := err.(*hostdir.Error); e == nil || e.Problem != hostdir.NoDirectory || e.Ignored {
			t.Errorf("a file for all: %#v", err)
		}
	})
}

// Goal: the overflow uid is never the administrator, not even as the owner of the hosts directory:
// neither its wildcards nor its log-connections count. Root's do.
func TestOverflow(t *testing.T) {
	hostdirtest.NeedRoot(t)
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		const nobody = 65534
		must(t, os.Chown(".", nobody, nobody))
		h := open(t)
		if !h.Unmapped() || h.Administrator(nobody) || !h.Administrator(0) || h.Administrator(tenant) {
			t.Errorf("unmapped %t, administrator: nobody %t, root %t, tenant %t", h.Unmapped(), h.Administrator(nobody), h.Administrator(0), h.Administrator(tenant))
		}
		all := sites(t, "*.theirs.example", "*.ours.example", "host.example", "*")
		for _, entry := range []string{"*.theirs.example", "*.ours.example", "host.example"} {
			must(t, os.WriteFile(dirName(entry)+"/log-connections", nil, 0o644))
			must(t, os.Lchown(dirName(entry)+"/log-connections", nobody, nobody))
		}
		must(t, os.Lchown(dirName("*.theirs.example"), nobody, nobody))
		must(t, os.Lchown(dirName("host.example"), nobody, nobody))
		for name, want := range map[string]string{
			"a.theirs.example": "*", "a.ours.example": "*.ours.example", "host.example": "host.example",
		} {
			b, err := dial(name)
			if err == nil {
				unix.Close(b.FD)
			}
			if got := reached(t, all); got != want || b.Log {
				t.Errorf("%s: reached %q, %+v, %v", name, got, b, err)
			}
			if e, _, err := h.Find([]byte(name), true); err != nil || e.Administrators != (want == "*" || want == "*.ours.example") {
				t.Errorf("%s: %+v, %v", name, e, err)
			}
		}
		must(t, os.WriteFile(dirName("*")+"/log-connections", nil, 0o644))
		logAll(t, h, true)
		must(t, os.Lchown(dirName("*")+"/log-connections", nobody, nobody))
		logAll(t, h, false)
		must(t, os.Lchown(dirName("*")+"/log-connections", 0, 0))
		must(t, os.Lchown(dirName("*"), nobody, nobody))
		logAll(t, h, false)
	})
}

func logAll(t *testing.T, h *hostdir.Hosts, want bool) {
	t.Helper()
	if got, err := h.LogAll(); got != want || err != nil {
		t.Errorf("all are logged: %t, %v; want %t", got, err, want)
	}
}

// Goal: all connections are logged if the directory * has a log-connections and both are the
// administrator's, wherever they lead. What cannot be found out is an error. No descriptor is
// needed.
func TestLogAll(t *testing.T) {
	chdir(t)
	h := open(t)
	logAll(t, h, false)
	star, marker := dirName("*"), dirName("*")+"/log-connections"
	must(t, os.WriteFile(star, nil, 0o644))
	logAll(t, h, false)
	must(t, os.Remove(star))
	must(t, os.Mkdir(star, 0o755))
	logAll(t, h, false)
	must(t, os.Symlink("nowhere", marker))
	logAll(t, h, true)
	if r := elsewhere(t, "", with(noRoom, "1")); !r.LogAll {
		t.Errorf("without a descriptor: %+v", r)
	}
	must(t, os.Rename(star, "target"))
	must(t, os.Symlink("target", star))
	logAll(t, h, true)
	if os.Geteuid() == 0 {
		must(t, os.Chown(".", 65533, 65533))
		for path, counts := range map[string]bool{star: true, marker: true, "target": false} {
			for uid, want := range map[int]bool{0: true, 65533: true, tenant: !counts} {
				must(t, os.Lchown(path, uid, uid))
				logAll(t, h, want)
			}
			must(t, os.Lchown(path, 0, 0))
		}
		must(t, os.Chown(".", 0, 0))
	}
	must(t, os.Remove(star))
	must(t, os.Symlink("nowhere", star))
	logAll(t, h, false)
	must(t, os.Remove(star))
	must(t, os.Symlink(star, star))
	if got, err := h.LogAll(); got || err == nil {
		t.Errorf("in a circle: %t, %v", got, err)
	}
}

func acceptProxy(t *testing.T, h *hostdir.Hosts, want bool, wantIgnored string) {
	t.Helper()
	yes, ignored, err := h.AcceptProxy()
	if yes != want || (ignored != "") != (wantIgnored != "") || !strings.Contains(ignored, wantIgnored) || err != nil {
		t.Errorf("PROXY headers are expected: %t, ignored %q, %v; want %t, %q", yes, ignored, err, want, wantIgnored)
	}
}

// Goal: PROXY headers are expected if there is an .accept-proxy of the administrator's that is a
// directory, is and wherever it leads. One of somebody else does not count, and it is said why. No
// descriptor is needed.
func TestAcceptProxy(t *testing.T) {
	chdir(t)
	h := open(t)
	acceptProxy(t, h, false, "")
	const marker = ".accept-proxy"
	must(t, os.Mkdir(marker, 0))
	acceptProxy(t, h, true, "")
	if r := elsewhere(t, "", with(noRoom, "1")); !r.AcceptProxy {
		t.Errorf("without a descriptor: %+v", r)
	}
	if os.Geteuid() == 0 {
		const owner, nobody = 65533, 65534
		must(t, os.Chown(".", owner, owner))
		must(t, os.Chown(marker, owner, owner))
		acceptProxy(t, h, true, "")
		must(t, os.Chown(marker, tenant, tenant))
		acceptProxy(t, h, false, "it belongs to uid 65532, neither to root nor to the owner of the hosts directory: chown it to root")
		must(t, os.Chown(marker, nobody, nobody))
		acceptProxy(t, h, false, "in a user namespace stands for all users unknown to it")
		must(t, os.Chown(".", nobody, nobody))
		acceptProxy(t, h, false, "in a user namespace stands for all users unknown to it")
		must(t, os.Chown(marker, 0, 0))
		acceptProxy(t, h, true, "")
		must(t, os.Chown(".", 0, 0))
	}
	must(t, os.Remove(marker))
	acceptProxy(t, h, false, "")
	// A tenant can move these out of a directory of his own, whoever has made them there.
	for what, put := range map[string]func() error{
		"file":    func() error { return os.WriteFile(marker, nil, 0) },
		"symlink": func() error { return os.Symlink(".", marker) },
		"circle":  func() error { return os.Symlink(marker, marker) },
		"socket": func() error {
			l, err := net.Listen("unix", marker)
			if err == nil {
				l.(*net.UnixListener).SetUnlinkOnClose(false)
				l.Close()
			}
			return err
		},
	} {
		t.Log(what)
		must(t, put())
		acceptProxy(t, h, false, "it is no directory, so a tenant may have moved it there")
		must(t, os.Remove(marker))
	}
}

// Goal: Find tells who owns an entry, which for a symlink is the owner of the link, and whether the
// target may be somebody else's.
func TestFindOwner(t *testing.T) {
	hostdirtest.NeedRoot(t)
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			const owner = 65533
			chdir(t)
			must(t, os.Chown(".", owner, owner))
			h := open(t)
			if w.paths {
				h.UsePaths()
			}
			give := func(name string, uid int) {
				t.Helper()
				must(t, os.Lchown(dirName(name), uid, uid))
			}
			for name, uid := range map[string]int{"root": 0, "owner": owner, "tenant": tenant, "*.wild": owner} {
				listen(t, name, 8)
				give(name, uid)
			}
			for name, to := range map[string]string{"root-to-tenant": "tenant", "tenant-to-root": "root", "*.link": "tenant", "dangling": "nowhere"} {
				must(t, os.Symlink(dirName(to), dirName(name)))
			}
			must(t, os.Symlink("nowhere", dirName("*.theirs")))
			give("*.theirs", tenant)
			give("tenant-to-root", tenant)
			give("dangling", tenant)
			letClockTick(t)

			withDialer(t, h, func(d *hostdir.Dialer) {
				for range 2 {
					for name, want := range map[string]struct {
						entry   string
						owner   uint32
						admin   bool
						foreign bool
						problem failure
					}{
						"root":           {"root", 0, true, false, 0},
						"owner":          {"owner", owner, true, false, 0},
						"tenant":         {"tenant", tenant, false, true, 0},
						"a.wild":         {"*.wild", owner, true, false, 0},
						"root-to-tenant": {"root-to-tenant", 0, true, true, 0},
						"tenant-to-root": {"tenant-to-root", tenant, false, false, 0},
						"a.link":         {"*.link", 0, true, true, 0},
						"dangling":       {"dangling", tenant, false, true, noDirectory},
						"a.theirs":       {"", 0, false, false, noDirectory},
						"absent":         {"", 0, false, false, noDirectory},
					} {
						check := func(wait bool) {
							e, err := d.Find([]byte(name), wait)
							if err == nil && wait {
								var b hostdir.Backend
								if b, err = d.Connect(wait); err == nil {
									unix.Close(b.FD)
								}
							}
							entry := ""
							if want.entry != "" {
								entry = dirName(want.entry)
							}
							// With wait false Find need not know where a symlink leads.
							if string(e.Name) != entry || e.Owner != want.owner || e.Administrators != want.admin ||
								e.Foreign != want.foreign && (wait || !e.Foreign) || problem(err) != want.problem && (wait || want.entry == "") {
								t.Errorf("%s, wait %t: %q %+v, %v; want %+v", name, wait, e.Name, e, err, want)
							}
						}
						check(false)
						check(true)
					}
				}
				d.Leave()
			})
		})
	}
}

// letClockTick waits for a clock tick, so that no change before it is recent.
func letClockTick(t *testing.T) {
	t.Helper()
	h := open(t)
	h.UsePaths()
	must(t, os.Symlink(".", ".clock"))
	withDialer(t, h, func(d *hostdir.Dialer) {
		for {
			if _, err := d.FindEntry([]byte(".clock"), true); problem(err) != exchanged {
				break
			}
			runtime.Gosched()
		}
	})
	must(t, os.Remove(".clock"))
}

// Goal: with paths, a directory that is exchanged between Find and Connect gives Exchanged, and so
// does a symlink that was made a moment ago, since nobody can tell whether it is exchanged again.
// Otherwise Connect reaches what Find found, with its markers. Nothing is tried twice.
func TestExchanged(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if w.paths {
				h.UsePaths()
			}
			all := sites(t, "a", "b")
			must(t, os.WriteFile(dirName("a")+"/send-proxy-v1", nil, 0o644))
			wait := w.name != "now"
			root, err := os.Getwd() // the Dialer's thread is elsewhere
			must(t, err)
			at := func(entry string) string { return filepath.Join(root, entry) }
			withDialer(t, h, func(d *hostdir.Dialer) {
				_, err := d.Find([]byte("a"), wait)
				must(t, err)
				must(t, os.Rename(at(dirName("a")), at("away")))
				must(t, os.Rename(at(dirName("b")), at(dirName("a"))))
				b, err := d.Connect(wait)
				if err == nil {
					unix.Close(b.FD)
				}
				got := reached(t, all)
				if w.paths && problem(err) != exchanged || !w.paths && (err != nil || got != "a" || b.Proxy != 1) {
					t.Errorf("exchanged: reached %q, %+v, %v", got, b, err)
				}
				if !w.paths {
					return
				}
				for range 1000 { // the tick may have passed
					must(t, os.Symlink("away", dirName("link")))
					_, err := d.Find([]byte("link"), true)
					if problem(err) == exchanged {
						return
					}
					must(t, os.Remove(dirName("link")))
				}
				t.Error("a new symlink is never told of")
			})
		})
	}
}

// Goal: with paths and wait false, Find tells which entry it is, and nothing else is done.
func TestPathsWithoutTime(t *testing.T) {
	chdir(t)
	h := open(t)
	h.UsePaths()
	all := sites(t, "a", "*")
	withDialer(t, h, func(d *hostdir.Dialer) {
		for name, entry := range map[string]string{"a": "a", "b": "*"} {
			e, err := d.Find([]byte(name), false)
			if string(e.Name) != dirName(entry) || e.Owner != uint32(os.Geteuid()) || !e.Administrators || e.Foreign || err != nil {
				t.Errorf("%s: %q %+v, %v", name, e.Name, e, err)
			}
			if b, err := d.Connect(false); problem(err) != mayWait || b.FD != -1 {
				t.Errorf("%s: %+v, %v", name, b, err)
			}
		}
	})
	if got := reached(t, all); got != "" {
		t.Errorf("reached %q", got)
	}
}

// Goal: a deaf connection takes nothing that a backend sends or passes, and the backend gets an
// error.
func TestDeaf(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if w.paths {
				h.UsePaths()
			}
			backend := listen(t, "a", 8)
			withDialer(t, h, func(d *hostdir.Dialer) {
				d.Deaf = true
				b, err := w.dial(d, "a")
				must(t, err)
				defer unix.Close(b.FD)
				peer, _, err := unix.Accept(backend)
				must(t, err)
				defer unix.Close(peer)
				err = unix.Sendmsg(peer, []byte("x"), unix.UnixRights(0), nil, unix.MSG_NOSIGNAL)
				if err == nil && runtime.GOOS == "linux" || err != nil && err != unix.EPIPE && err != unix.EPERM {
					t.Errorf("a message with a descriptor: %v", err)
				}
				if err := unix.Sendto(peer, []byte("x"), unix.MSG_NOSIGNAL, nil); err != unix.EPIPE && runtime.GOOS == "linux" {
					t.Errorf("a message: %v", err)
				}
				// The other direction is open.
				_, err = unix.Write(b.FD, []byte("hello"))
				must(t, err)
				var got [5]byte
				if n, err := unix.Read(peer, got[:]); n != 5 || err != nil {
					t.Errorf("the backend got %d bytes, %v", n, err)
				}
			})
		})
	}
}
