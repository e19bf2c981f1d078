package hostdir_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// ownDirectories opens the hosts directory. It skips the test where threads cannot have a working
// directory of their own.
func ownDirectories(t testing.TB) *hostdir.Hosts {
	t.Helper()
	h := open(t)
	if err := h.PathsOnly(); err != nil {
		t.Skip(err)
	}
	return h
}

// otherFileSystem returns a new directory on another file system, which is on no block device.
func otherFileSystem(t *testing.T) string {
	t.Helper()
	var here, there unix.Stat_t
	must(t, unix.Stat(".", &here))
	if unix.Stat("/dev/shm", &there) != nil || unix.Major(there.Dev) != 0 || there.Dev == here.Dev {
		t.Skip("/dev/shm is no file system of its own")
	}
	dir, err := os.MkdirTemp("/dev/shm", "hostdir")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

// Goal: with wait false, hosts on the file system of the hosts directory are connected to. For a
// symlink to a file system that is not on a block device, the error is MayWait. With wait true all
// are connected to. No descriptor is left.
func TestDialNow(t *testing.T) {
	chdir(t)
	elsewhere := otherFileSystem(t)
	listen(t, "plain", 100)
	must(t, os.Symlink(dirName("plain"), dirName("link")))
	must(t, os.Mkdir(dirName("socket-link"), 0o755))
	must(t, os.Symlink("../"+dirName("plain")+"/tls-socket", dirName("socket-link")+"/tls-socket"))
	long := strings.Repeat("a", 254)
	must(t, os.Symlink(dirName("plain"), dirName(long)))

	must(t, unix.Listen(hostdirtest.Bind(t, elsewhere, unix.SOCK_STREAM), 100))
	must(t, os.WriteFile(elsewhere+"/send-proxy-v1", nil, 0o644))
	must(t, os.Symlink(elsewhere, dirName("elsewhere")))
	must(t, os.Mkdir(dirName("socket-elsewhere"), 0o755))
	must(t, os.Symlink(elsewhere+"/tls-socket", dirName("socket-elsewhere")+"/tls-socket"))
	// A marker is not followed.
	listen(t, "marker-elsewhere", 100)
	must(t, os.Symlink(elsewhere+"/send-proxy-v1", dirName("marker-elsewhere")+"/send-proxy-v1"))

	h := ownDirectories(t)
	base := descriptors(t)
	withDialer(t, h, func(d *hostdir.Dialer) {
		for name, want := range map[string]struct {
			now, later failure
			proxy      uint8
		}{
			"plain":            {0, 0, 0},
			"link":             {0, 0, 0},
			"socket-link":      {0, 0, 0},
			long:               {0, 0, 0},
			"elsewhere":        {mayWait, 0, 1},
			"socket-elsewhere": {mayWait, 0, 0},
			"marker-elsewhere": {0, 0, 1},
			"absent":           {noDirectory, noDirectory, 0},
		} {
			for range 2 {
				// This comes first: the first who follows a symlink may have to wait.
				b, err := dial(d, name, true)
				if got := problem(err); got != want.later || got == 0 && b.Proxy != want.proxy {
					t.Errorf("%s, with time: problem %d, %+v, want %+v", name, got, b, want)
				}
				if err == nil {
					unix.Close(b.FD)
				}
				b, err = dial(d, name, false)
				if got := problem(err); got != want.now || got == 0 && b.Proxy != want.proxy {
					t.Errorf("%s, now: problem %d, %+v, want %+v", name, got, b, want)
				}
				if err == nil {
					unix.Close(b.FD)
				}
			}
		}
		d.Leave()
	})
	if got := descriptors(t); got != base {
		t.Errorf("%d descriptors, %d before", got, base)
	}
}

// Goal: a host that is looked up again and again is found as it is each time, whatever has replaced
// its directory, its socket or its markers. No descriptor is left once the Dialer has left or is
// closed.
func TestDialNowAgain(t *testing.T) {
	chdir(t)
	all := sites(t, "a", "b", "c", "d")
	h := ownDirectories(t)
	base := descriptors(t)
	tasks, done := make(chan func(*hostdir.Dialer)), make(chan struct{})
	go func() {
		defer close(done)
		withDialer(t, h, func(d *hostdir.Dialer) {
			for task := range tasks {
				task(d)
				done <- struct{}{}
			}
		})
	}()
	do := func(task func(*hostdir.Dialer)) {
		tasks <- task
		<-done
	}
	none := hostdir.Backend{}
	expect := func(what, name string, problemWanted failure, wanted hostdir.Backend) {
		t.Helper()
		for range 3 {
			var b hostdir.Backend
			var err error
			do(func(d *hostdir.Dialer) {
				b, err = dial(d, "a", false)
				if problem(err) == mayWait { // a symlink that is followed for the first time
					b, err = dial(d, "a", true)
				}
				if err == nil {
					unix.Close(b.FD)
				}
			})
			if got := reached(t, all); got != name || marks(b) != wanted || problem(err) != problemWanted {
				t.Errorf("%s: reached %q, %+v, %v", what, got, b, err)
			}
		}
	}
	a := dirName("a")
	move := func(from, to string) {
		t.Helper()
		must(t, os.Rename(dirName(from), dirName(to)))
	}
	touch := func(marker string) {
		t.Helper()
		must(t, os.WriteFile(a+"/"+marker, nil, 0o644))
	}

	expect("at first", "a", 0, none)
	move("a", "gone")
	expect("without a directory", "", noDirectory, none)
	move("b", "a")
	expect("another directory", "b", 0, none)
	move("a", "b")
	move("gone", "a")
	expect("the first directory", "a", 0, none)

	touch("send-proxy-v1")
	expect("with a marker", "a", 0, hostdir.Backend{Proxy: 1})
	touch("send-proxy-v2")
	expect("with two markers", "a", 0, hostdir.Backend{Proxy: 2})
	must(t, os.Remove(a+"/send-proxy-v1"))
	must(t, os.Remove(a+"/send-proxy-v2"))
	expect("without markers", "a", 0, none)
	must(t, os.Rename(a+"/tls-socket", a+"/closed"))
	expect("without a socket", "", noSocket, none)
	must(t, os.Rename(a+"/closed", a+"/tls-socket"))
	expect("with the socket", "a", 0, none)

	move("a", "gone")
	must(t, os.Symlink(dirName("gone"), a))
	expect("a symlink to the same directory", "a", 0, none)
	must(t, os.Symlink(dirName("c"), dirName("next")))
	move("next", "a")
	expect("another symlink", "c", 0, none)
	move("c", "unused")
	move("d", "c")
	expect("another directory behind it", "d", 0, none)
	must(t, os.Remove(a))
	move("gone", "a")
	expect("a directory in place of it", "a", 0, none)

	// A new directory often has the inode number of the removed one.
	for range 3 {
		must(t, os.RemoveAll(a))
		all = append(sites(t, "a"), all[1:]...)
		expect("a directory that is made anew", "a", 0, none)
	}
	if os.Geteuid() == 0 {
		do(func(*hostdir.Dialer) { must(t, unix.Setfsuid(65534)) }) // of that thread alone
		must(t, os.Chmod(a, 0o700))
		expect("a directory that is closed now", "", notPermitted, none)
		do(func(*hostdir.Dialer) { must(t, unix.Setfsuid(0)) })
		expect("as root", "a", 0, none)
	}

	do(func(d *hostdir.Dialer) {
		if !d.Release() || d.Release() {
			t.Error("there is not one descriptor to release")
		}
	})
	expect("with nothing kept open", "a", 0, none)
	// Without another descriptor for the socket, the one that is kept open must be given up.
	do(func(d *hostdir.Dialer) {
		var limit unix.Rlimit
		must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
		lowest, err := unix.Dup(0)
		must(t, err)
		unix.Close(lowest)
		must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(lowest), Max: limit.Max}))
		e, findErr := d.Find([]byte("a"), false)
		_, err = d.Connect(false)
		must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
		if findErr != nil || string(e.Name) != a || problem(err) != withoutRoom || d.Release() {
			t.Errorf("without room: %q, %v, %v, or the directory stayed open", e.Name, findErr, err)
		}
		b, err := d.Connect(false)
		must(t, err)
		unix.Close(b.FD)
		if got := reached(t, all); got != "a" {
			t.Errorf("with room, of what was found without: reached %q", got)
		}
	})
	expect("with room again", "a", 0, none)

	open := descriptors(t)
	do(func(d *hostdir.Dialer) { d.Leave() })
	if got := descriptors(t); got != open-1 {
		t.Errorf("%d descriptors after it has left, %d before", got, open)
	}
	expect("after it has left", "a", 0, none)
	close(tasks)
	<-done
	// Each of the three new directories has a socket.
	if got := descriptors(t); got != base+3 {
		t.Errorf("%d descriptors in the end, %d in the beginning", got, base)
	}
}

// Goal: what has changed in the host's directory a moment ago counts at the next look-up, even if
// nothing had changed for so long that look-ups relied on what they had seen: a marker that was
// made, removed, replaced or given away, a socket that was replaced, exchanged for a symlink,
// closed to this user or got another name, and another directory in place of this one.
func TestChangesAtOnce(t *testing.T) {
	chdir(t)
	changesAtOnce(t, 2000)
}

// Goal: the same on a file system that dates changes by seconds.
func TestChangesAtOnceSeconds(t *testing.T) {
	hostdirtest.NeedRoot(t)
	mke2fs, mount, umount := hostdirtest.Need(t, "mke2fs"), hostdirtest.Need(t, "mount"), hostdirtest.Need(t, "umount")
	dir := t.TempDir()
	image, hosts := dir+"/image", dir+"/hosts"
	must(t, os.Mkdir(hosts, 0o755))
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-I", "128", image, "4m").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command(mount, "-o", "loop", image, hosts).CombinedOutput(); err != nil {
		t.Skipf("no loop device: %v: %s", err, out)
	}
	t.Cleanup(func() { must(t, exec.Command(umount, "-l", hosts).Run()) })
	t.Chdir(hosts)
	changesAtOnce(t, 600)
}

// changesAtOnce changes a host in the working directory so many times.
func changesAtOnce(t *testing.T, times int) {
	elsewhere := otherFileSystem(t)
	unix.Close(listen(t, "other", 8)) // another host
	listeners := map[string]int{"a": listen(t, "a", 4096), "b": listen(t, "b", 4096), "second": listen(t, "c", 4096)}
	h := ownDirectories(t)
	hosts, err := os.Getwd() // the thread will be elsewhere
	must(t, err)
	path := func(file string) string { return hosts + "/" + dirName("a") + "/" + file }
	must(t, os.Rename(dirName("c")+"/tls-socket", path("second")))
	must(t, os.Symlink(elsewhere+"/tls-socket", path("link")))
	must(t, os.Symlink(elsewhere+"/tls-socket", dirName("c")+"/away"))
	must(t, os.Symlink("../"+dirName("b")+"/tls-socket", dirName("c")+"/near"))
	must(t, os.Symlink("../"+dirName("c")+"/near", path("by way of c")))
	must(t, os.WriteFile(dirName("b")+"/send-proxy-v2", nil, 0o644))
	must(t, unix.Listen(hostdirtest.Bind(t, elsewhere, unix.SOCK_STREAM), 4096))
	// Other users than root, if we may become one.
	asUser, asRoot := func() {}, func() {}
	if os.Geteuid() == 0 {
		asUser = func() { unix.Setfsuid(12345) }
		asRoot = func() { unix.Setfsuid(0) }
	}

	var want hostdir.Backend
	problemWanted, at := failure(0), "a"
	exchange := func(a, b string) error {
		return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	}
	exchangeFar := func() error {
		return exchange(hosts+"/"+dirName("c")+"/near", hosts+"/"+dirName("c")+"/away")
	}
	changes := []func() error{
		func() error { want.Proxy = 1; return os.WriteFile(path("send-proxy-v1"), nil, 0o644) },
		func() error { problemWanted = mayWait; return exchange(path("tls-socket"), path("link")) },
		func() error { problemWanted = 0; return exchange(path("tls-socket"), path("link")) },
		func() error { want.Proxy = 2; return os.Mkdir(path("send-proxy-v2"), 0o755) },
		func() error { return os.Remove(path("send-proxy-v1")) },
		func() error { at = "second"; return exchange(path("tls-socket"), path("second")) },
		func() error { want.Proxy = 1; return os.Rename(path("send-proxy-v2"), path("send-proxy-v1")) },
		func() error { want.Log = true; return os.WriteFile(path("log-connections"), nil, 0o644) },
		func() error { want.Proxy = 0; return os.Remove(path("send-proxy-v1")) },
		func() error { want.Log = os.Geteuid() != 0; return chownFile(path("log-connections"), 12345) },
		func() error { want.Log = true; return chownFile(path("log-connections"), 0) },
		func() error { at = "a"; return exchange(path("tls-socket"), path("second")) },
		func() error {
			want, at = hostdir.Backend{Proxy: 2}, "b"
			return exchange(hosts+"/"+dirName("a"), hosts+"/"+dirName("b"))
		},
		func() error {
			want, at = hostdir.Backend{Log: true}, "a"
			return exchange(hosts+"/"+dirName("a"), hosts+"/"+dirName("b"))
		},
		func() error { at = "b"; return exchange(path("tls-socket"), path("by way of c")) },
		func() error { problemWanted = mayWait; return exchangeFar() },
		func() error { problemWanted = 0; return exchangeFar() },
		func() error { at = "a"; return exchange(path("tls-socket"), path("by way of c")) },
		func() error { problemWanted = notPermitted; return os.Chmod(path("tls-socket"), 0) },
		func() error { problemWanted = 0; return os.Chmod(path("tls-socket"), 0o777) },
		func() error { want.Log = false; return os.Remove(path("log-connections")) },
		func() error { return os.Link(path("tls-socket"), path("linked")) },
		func() error { problemWanted = noSocket; return os.Remove(path("tls-socket")) },
		func() error { problemWanted = mayWait; return os.Link(path("link"), path("tls-socket")) },
		func() error { problemWanted = 0; return os.Rename(path("linked"), path("tls-socket")) },
	}
	withDialer(t, h, func(d *hostdir.Dialer) {
		defer d.Leave()
		expect := func(what string, i int) bool {
			asUser()
			b, err := dial(d, "a", false)
			if problem(err) == mayWait && problemWanted == 0 { // a symlink that is followed for the first time
				b, err = dial(d, "a", true)
			}
			asRoot()
			if problem(err) != problemWanted {
				t.Errorf("%s, change %d: %v, want problem %d", what, i, err, problemWanted)
				return false
			}
			if err != nil {
				return true
			}
			unix.Close(b.FD)
			c, _, err := unix.Accept(listeners[at])
			if err != nil {
				t.Errorf("%s, change %d: %s was not connected to: %v", what, i, at, err)
				return false
			}
			unix.Close(c)
			if marks(b) != want {
				t.Errorf("%s, change %d: got %+v, want %+v", what, i, marks(b), want)
				return false
			}
			return true
		}
		for i := range times {
			if i%23 == 0 { // long enough that the look-up relies on what it sees
				for begin := time.Now(); time.Since(begin) < 25*time.Millisecond; {
					if !expect("unchanged", i) {
						return
					}
				}
			}
			if err := changes[i%len(changes)](); err != nil {
				t.Error(err)
				return
			}
			for range 1 + i%3 { // at the third it would rely on what it has seen
				if !expect("changed", i) {
					return
				}
			}
		}
	})
}

// chownFile gives a file away, if we may.
func chownFile(path string, uid int) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, uid, uid)
}
