package hostdir_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: a Dialer that was made without a free descriptor works like any other. However many
// descriptors are missing, and for whatever host, the error is NoRoom.
func TestDialerWithoutRoom(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if w.paths {
				h.UsePaths()
			}
			listen(t, "plain", 100)
			listen(t, "*.wild", 100)
			must(t, os.Symlink(dirName("plain"), dirName("link")))
			must(t, os.Symlink(dirName("plain"), dirName("*.link")))
			letClockTick(t)
			names := []string{"plain", "a.wild", "link", "a.link"}
			var limit unix.Rlimit
			must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
			defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
			for _, name := range names {
				lowest, err := unix.Dup(0)
				must(t, err)
				unix.Close(lowest)
				allow := func(n int) error {
					return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(lowest + n), Max: limit.Max})
				}
				must(t, allow(0))
				withDialer(t, h, func(d *hostdir.Dialer) {
					for short := 0; ; short++ {
						b, err := w.dial(d, name)
						if err == nil {
							unix.Close(b.FD)
							if short == 0 {
								t.Errorf("%s: no descriptor was needed", name)
							}
							return
						}
						if problem(err) != withoutRoom || short > 8 {
							t.Errorf("%s, with %d descriptors: %v", name, short, err)
							return
						}
						must(t, allow(short+1))
					}
				})
				must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
			}
		})
	}
}

// Goal: where the kernel can refuse passed descriptors, a backend that passes one gets an error and
// loses nothing else.
func TestRefusesDescriptors(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if !h.RefusesDescriptors() {
				t.Skip("this kernel has no SO_PASSRIGHTS")
			}
			if w.paths {
				h.UsePaths()
			}
			backend := listen(t, "a", 8)
			withDialer(t, h, func(d *hostdir.Dialer) {
				b, err := w.dial(d, "a")
				must(t, err)
				defer unix.Close(b.FD)
				peer, _, err := unix.Accept(backend)
				must(t, err)
				defer unix.Close(peer)
				for _, flags := range []int{0, unix.MSG_OOB} {
					if err := unix.Sendmsg(peer, []byte("x"), unix.UnixRights(0), nil, flags); err != unix.EPERM {
						t.Errorf("flags %d: passing a descriptor: %v", flags, err)
					}
				}
				_, err = unix.Write(peer, []byte("hello"))
				must(t, err)
				var got [10]byte
				if n, err := unix.Read(b.FD, got[:]); string(got[:max(n, 0)]) != "hello" || err != nil {
					t.Errorf("%q, %v", got, err)
				}
			})
		})
	}
}

// Goal: where unshare(2) is forbidden, as by container engines, PathsOnly says so, and hosts are
// reached by their paths, as long as these fit into a socket address.
func TestUnshareForbidden(t *testing.T) {
	chdir(t)
	long := strings.Repeat("a", 200)
	listen(t, "a", 8)
	listen(t, "*.wild", 8)
	must(t, os.Mkdir(dirName(long), 0o755))
	must(t, os.WriteFile(dirName("a")+"/send-proxy-v2", nil, 0o644))
	r := elsewhere(t, "a b.wild absent "+long, with(forbidden, "unshare"))
	if !r.Paths {
		t.Errorf("it works without paths: %+v", r)
	}
	tooLong := noSocket
	if !hostdir.Hashed {
		tooLong = pathTooLong
	}
	for name, want := range map[string]struct {
		now, connect, problem failure
		proxy                 uint8
	}{
		"a":      {0, mayWait, 0, 2},
		"b.wild": {0, mayWait, 0, 0},
		"absent": {noDirectory, noDirectory, noDirectory, 0},
		long:     {0, mayWait, tooLong, 0},
	} {
		got := r.Names[name]
		if got.FindNow != want.now || got.ConnectNow != want.connect || got.Problem != want.problem || got.Proxy != want.proxy {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	if r := elsewhere(t, "a", nil); r.Paths {
		t.Errorf("where it is not forbidden: %+v", r)
	}
}

// Goal: without SO_PASSRIGHTS, RefusesDescriptors says so, and reading does not pass over an
// out-of-band byte: the kernel would drop what came with it.
func TestNoPassRights(t *testing.T) {
	chdir(t)
	listen(t, "a", 8)
	for _, also := range []string{"", "unshare"} {
		r := elsewhere(t, "a", func(cmd *exec.Cmd) {
			with(forbidden, "SO_PASSRIGHTS")(cmd)
			with(alsoForbidden, also)(cmd)
		})
		if got := r.Names["a"]; r.Refuses || r.Paths != (also != "") || got.Problem != 0 || got.OOBInline != 1 {
			t.Errorf("also without %q: %+v", also, r)
		}
	}
	if r := elsewhere(t, "a", nil); r.Refuses && r.Names["a"].OOBInline != 0 {
		t.Errorf("where there is: %+v", r)
	}
}

// Goal: a kernel that cannot tell whether a look-up may wait is taken to wait wherever a symlink is
// followed, and nowhere else.
func TestNoOpenat2(t *testing.T) {
	chdir(t)
	for _, name := range []string{"plain", "*.wild", "socket-link"} {
		listen(t, name, 8)
	}
	must(t, os.Symlink(dirName("plain"), dirName("link")))
	must(t, os.Symlink(dirName("plain"), dirName("*.link")))
	socket := dirName("socket-link") + "/tls-socket"
	must(t, os.Rename(socket, socket+"-2"))
	must(t, os.Symlink("tls-socket-2", socket))
	r := elsewhere(t, "plain a.wild link a.link socket-link absent", with(forbidden, "openat2"))
	for name, want := range map[string][3]failure{
		"plain":       {0, 0, 0},
		"a.wild":      {0, 0, 0},
		"link":        {mayWait, mayWait, 0},
		"a.link":      {mayWait, mayWait, 0},
		"socket-link": {0, mayWait, 0},
		"absent":      {noDirectory, noDirectory, noDirectory},
	} {
		if got := r.Names[name]; [3]failure{got.FindNow, got.ConnectNow, got.Problem} != want {
			t.Errorf("%s: %+v, want %v", name, got, want)
		}
	}
}

// Goal: in a user namespace the overflow uid stands for all users that it does not know. It is not
// the administrator, even if it seems to own the hosts directory: its wildcards and its
// log-connections do not count.
func TestUserNamespace(t *testing.T) {
	hostdirtest.NeedRoot(t)
	for _, inside := range []bool{false, true} { // whether the namespace knows the owner of the hosts directory
		for _, forbid := range []string{"", "unshare"} {
			t.Run(fmt.Sprintf("known %t, without %q", inside, forbid), func(t *testing.T) {
				const owner, stranger = 1000, 2000
				chdir(t)
				who := stranger
				if inside {
					who = owner
				}
				must(t, os.Chown(".", who, who))
				listen(t, "*", 8)
				for name, uid := range map[string]int{"*.root": 0, "*.owner": owner, "*.stranger": stranger} {
					listen(t, name, 8)
					must(t, os.Lchown(dirName(name), uid, uid))
					must(t, os.WriteFile(dirName(name)+"/log-connections", nil, 0o644))
					must(t, os.Lchown(dirName(name)+"/log-connections", stranger, stranger))
				}
				must(t, os.WriteFile(dirName("*")+"/log-connections", nil, 0o644))
				must(t, os.Lchown(dirName("*")+"/log-connections", stranger, stranger))
				cmd := childCommand(t, "") // copies the binary while we are still outside the namespace
				r := elsewhere(t, "a.root a.owner a.stranger", func(child *exec.Cmd) {
					mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: owner, HostID: owner, Size: 1}}
					child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping}
					trial := exec.Command(cmd.Path)
					trial.Env, trial.SysProcAttr = cmd.Env, child.SysProcAttr
					if err := trial.Run(); err != nil {
						t.Skipf("no user namespace: %v", err)
					}
					with(forbidden, forbid)(child)
				})
				if r.Unmapped == inside || r.LogAll || r.LogAllFailed || r.Paths != (forbid != "") {
					t.Errorf("%+v", r)
				}
				for name, want := range map[string]string{"a.root": "*.root", "a.owner": "*.owner", "a.stranger": "*"} {
					if name == "a.owner" && !inside {
						want = "*"
					}
					if got := r.Names[name]; got.Problem != 0 || got.Entry != dirName(want) || got.Log || !got.Administrators {
						t.Errorf("%s: %+v", name, got)
					}
				}
			})
		}
	}
}

// Goal: a file system that is mounted on an entry is followed only with wait true, and its owner is
// believed only if it is no FUSE. A tenant may mount a FUSE on his directory and have it say that
// it is root's.
func TestMountOwner(t *testing.T) {
	hostdirtest.NeedRoot(t)
	hostdirtest.OwnMounts(t)
	chdir(t)
	must(t, os.Chmod(".", 0o755))
	for _, name := range []string{"memory", "*.memory", "fuse", "*.fuse"} {
		must(t, os.Mkdir(dirName(name), 0o755))
		path, err := filepath.Abs(dirName(name))
		must(t, err)
		if strings.HasSuffix(name, "memory") {
			hostdirtest.Mount(t, "memory", path, "tmpfs", 0, "mode=755")
			listen(t, name, 100)
			continue
		}
		// It says that it is root's, and that there is nothing in it.
		fs := hostdirtest.MountUserFS(t, path, unix.S_IFDIR, fmt.Sprintf("user_id=%d", tenant))
		fs.Serve(0)
	}
	listen(t, "*", 100)
	r := elsewhere(t, "memory a.memory fuse a.fuse", nil)
	p := elsewhere(t, "memory a.memory fuse a.fuse", with(forbidden, "unshare"))
	const nobody = 65534
	for name, want := range map[string]found{
		"memory":   {FindNow: mayWait, ConnectNow: mayWait, Entry: "memory", Administrators: true},
		"a.memory": {FindNow: mayWait, ConnectNow: mayWait, Entry: "*.memory", Administrators: true},
		"fuse":     {FindNow: mayWait, ConnectNow: mayWait, Entry: "fuse", Owner: nobody, Problem: noSocket},
		"a.fuse":   {FindNow: mayWait, ConnectNow: mayWait, Entry: "*", Administrators: true},
	} {
		want.Entry = dirName(want.Entry)
		check := func(how string, got found) {
			got.OOBInline, got.Foreign = 0, false
			if got != want {
				t.Errorf("%s%s: %+v, want %+v", name, how, got, want)
			}
		}
		check("", r.Names[name])
		want.FindNow = 0
		check(", with paths", p.Names[name])
	}
}

// Goal: who mounts a FUSE on a marker of his own, and has it say that it is root's, neither has it
// counted nor keeps anybody waiting, although it answers nothing.
func TestMarkersMounted(t *testing.T) {
	for marker, ask := range map[string]func(*hostdir.Hosts) (ignored string, err error){
		".accept-proxy": func(h *hostdir.Hosts) (string, error) { _, ignored, err := h.AcceptProxy(); return ignored, err },
		".ech":          func(h *hostdir.Hosts) (string, error) { _, _, ignored, err := h.KeyFiles(); return ignored, err },
	} {
		t.Run(marker, func(t *testing.T) { testMarkerMounted(t, marker, ask) })
	}
}

func testMarkerMounted(t *testing.T, marker string, ask func(*hostdir.Hosts) (ignored string, err error)) {
	hostdirtest.NeedRoot(t)
	hostdirtest.OwnMounts(t)
	chdir(t)
	must(t, os.Chmod(".", 0o755))
	h := open(t)
	must(t, os.Mkdir(marker, 0o755))
	path, err := filepath.Abs(marker)
	must(t, err)
	fs := hostdirtest.MountUserFS(t, path, unix.S_IFDIR, fmt.Sprintf("user_id=%d", tenant))
	fs.Serve(0)
	fs.Hold()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if ignored, err := ask(h); err != nil || !strings.HasPrefix(ignored, "a file system is mounted on it") {
			t.Errorf("ignored %q, error %v", ignored, err)
		}
	}()
	select {
	case <-done:
	case <-time.After(hostdirtest.Patience):
		t.Error("the file system was asked")
		fs.Abort()
		<-done
	}
}

// Goal: where others than the owner may change the hosts directory, and so keep it locked, nobody
// looks for an entry that the kernel does not know without the time to wait. Nobody is told who
// owns it, either.
func TestFindUnknownEntry(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			listen(t, "known", 1)
			for mode, want := range map[uint32]failure{0o755: noDirectory, 0o1777: mayWait, 0o775: mayWait} {
				must(t, unix.Chmod(".", mode))
				h := open(t)
				if w.paths {
					h.UsePaths()
				}
				withDialer(t, h, func(d *hostdir.Dialer) {
					name := fmt.Appendf(nil, "new-%o", mode)
					if e, _, err := h.Find(name, false); e.Name != nil || problem(err) != want {
						t.Errorf("mode %o: found %q, error %v", mode, e.Name, err)
					}
					if e, err := d.Find(fmt.Appendf(nil, "newer-%o", mode), false); e.Name != nil || e.Owner == 0 && want == mayWait || problem(err) != want {
						t.Errorf("mode %o: the dialer found %q of uid %d, error %v", mode, e.Name, e.Owner, err)
					}
					for _, wait := range []bool{true, false} {
						if e, err := d.Find([]byte("known"), wait); string(e.Name) != dirName("known") || err != nil {
							t.Errorf("mode %o, wait %v: found %q, error %v", mode, wait, e.Name, err)
						}
					}
					if _, _, err := h.Find(name, true); problem(err) != noDirectory {
						t.Errorf("mode %o: with the time to wait the error is %v", mode, err)
					}
				})
			}
		})
	}
}

// Goal: nor does anybody look for an entry that was open the last time, and has another name since.
func TestFindMovedEntry(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			dir, err := os.Getwd()
			must(t, err)
			must(t, unix.Chmod(".", 0o1777))
			listen(t, "moved", 1)
			h := open(t)
			if w.paths {
				h.UsePaths()
			}
			withDialer(t, h, func(d *hostdir.Dialer) {
				for range 2 {
					if _, err := d.Find([]byte("moved"), false); err != nil {
						t.Fatal(err)
					}
				}
				must(t, os.Rename(filepath.Join(dir, dirName("moved")), filepath.Join(dir, dirName("elsewhere"))))
				unlock := hostdirtest.LockDirectory(t, dir)
				late := time.AfterFunc(hostdirtest.Patience/3, unlock)
				if e, err := d.Find([]byte("moved"), false); e.Name != nil || problem(err) != mayWait || !late.Stop() {
					t.Errorf("found %q, error %v, or it waited", e.Name, err)
				}
				unlock()
			})
		})
	}
}
