//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
)

const (
	// Limits on look-ups that wait for a file system: for one host, and in all.
	stuckPerHost = 4
	stuckInAll   = 64

	// Hosts that together exceed the limit, and by how much, if each has as many as it may.
	stuckHosts   = 20
	stuckTooMany = stuckHosts*stuckPerHost - stuckInAll
)

// Goal: however a tenant's host leads into a file system that never answers, all others are
// served as if nothing were. Of the clients that ask for the host, as many as may wait get
// user_canceled when their time is over, all others internal_error at once. When the file system
// is gone, so is all that was held for it, and the host is served as soon as it is a good one.
func TestStuck(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup // all at once, since they do little but wait
	defer all.Wait()
	for _, tt := range []struct {
		way string
		do  func(t *testing.T, d *daemon, name string) *userFS
	}{
		{"symlink into a mount that was never set up", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			symlink(t, filepath.Join(fs.dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to the root of a mount", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			symlink(t, fs.dir, d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that has to be asked for", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			fs.add(rootNode, "x", unix.S_IFDIR|0o755, "")
			fs.serve(0)
			look(t, filepath.Join(fs.dir, "x"))
			fs.ignore()
			symlink(t, filepath.Join(fs.dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that is asked for in vain", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			fs.hold()
			fs.serve(0)
			symlink(t, filepath.Join(fs.dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that is in the cache", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			fs.add(rootNode, "x", unix.S_IFDIR|0o755, "")
			fs.serve(time.Hour)
			look(t, filepath.Join(fs.dir, "x"))
			fs.ignore()
			symlink(t, filepath.Join(fs.dir, "x"), d.hostDir(name))
			return fs
		}},
		{"mount point", func(t *testing.T, d *daemon, name string) *userFS {
			return mountUserFS(t, filepath.Dir(d.hostPath(name, "x")), unix.S_IFDIR)
		}},
		{"mount point that is in the cache", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, filepath.Dir(d.hostPath(name, "x")), unix.S_IFDIR)
			fs.serve(time.Hour)
			look(t, fs.dir)
			fs.ignore()
			return fs
		}},
		{"socket that is a symlink", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			symlink(t, filepath.Join(fs.dir, "x"), d.hostPath(name, "tls-socket"))
			return fs
		}},
		{"socket that is a symlink through the cache", func(t *testing.T, d *daemon, name string) *userFS {
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			fs.add(rootNode, "x", unix.S_IFDIR|0o755, "")
			fs.serve(time.Hour)
			look(t, filepath.Join(fs.dir, "x"))
			fs.ignore()
			symlink(t, filepath.Join(fs.dir, "x", "y"), d.hostPath(name, "tls-socket"))
			return fs
		}},
		{"socket that is a mount point", func(t *testing.T, d *daemon, name string) *userFS {
			path := d.hostPath(name, "tls-socket")
			if err := os.WriteFile(path, nil, 0o777); err != nil {
				t.Fatal(err)
			}
			// The kernel has to ask for the permissions, which it was not told yet.
			return mountUserFS(t, path, unix.S_IFSOCK, "default_permissions")
		}},
	} {
		run := func(t *testing.T) {
			ownMounts(t)
			d := start(t)
			d.serve("good.example", greet)
			if err := d.greeted("good.example"); err != nil {
				t.Fatal(err)
			}
			base, threads := d.fds(), d.threads()
			const name = "stuck.example"
			fs := tt.do(t, d, name)
			stop := d.steady("good.example")
			defer stop()

			clients := d.ask(20, name)
			expectTold(t, clients, 20-stuckPerHost, "alert 80")
			expectTold(t, d.ask(100, name), 100, "alert 80")
			expectTold(t, clients, stuckPerHost, "alert 90")
			// Those that wait hold their places also without a client.
			expectTold(t, d.ask(20, name), 20, "alert 80")
			stop()
			d.awaitFds(base + stuckPerHost) // their sockets

			fs.abort()
			if err := os.RemoveAll(d.hostDir(name)); err != nil {
				t.Fatal(err)
			}
			d.serve(name, greet)
			await(t, "the host to be served", func() bool { return d.greeted(name) == nil })
			d.awaitFds(base)
			d.expectThreads(threads)
		}
		all.Go(func() { t.Run(tt.way, run) })
	}
}

// Goal: what all stuck hosts together can hold is bounded as well. Descriptors and threads do not
// add up when file systems get stuck, and are gone, again and again; clients that wait when that
// happens are told at once.
func TestStuckManyHosts(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	d := start(t)
	d.serve("good.example", greet)
	if err := d.greeted("good.example"); err != nil {
		t.Fatal(err)
	}
	base, all, threads := d.fds(), d.allFds(), d.threads()
	stop := func() {}
	if anyName && !isPortable(t) {
		// The portable engine cannot tell beforehand which look-ups take time, so with all
		// places taken it refuses every host.
		stop = d.steady("good.example")
	}
	defer stop()
	dir := hostsDir(t)
	d.leadAll(dir)
	for round := range 4 {
		fs := mountUserFS(t, dir, unix.S_IFDIR)
		clients := d.askAll()
		expectTold(t, clients, stuckTooMany, "alert 80")
		if round == 0 {
			expectTold(t, clients, stuckInAll, "alert 90")
			fs.abort()
			continue
		}
		fs.abort()
		for range stuckInAll {
			if got := <-clients; got != "alert 80" && got != "alert 112" {
				t.Errorf("a client got %s when the file system was gone", got)
			}
		}
		// Not before its look-up has ended can another one wait in its place.
		await(t, "the look-ups to have ended", func() bool {
			return <-d.ask(1, "stuck0.example") == "alert 112"
		})
	}
	stop()
	d.awaitFds(base)
	await(t, "all descriptors to be closed", func() bool { return d.allFds() <= all+8 })
	if !anyName {
		threads += stuckInAll // the portable engine leaves them to Go's runtime, which keeps them for later
	}
	d.expectThreads(threads)
}

// Goal: a tenant gains nothing by exchanging its socket for a symlink into a stuck file system, and
// back, at any moment: what was found of a path may not be true any more when it is used.
func TestStuckExchange(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	d := start(t)
	d.serve("good.example", greet)
	d.serve("stuck.example", greet)
	base := d.fds()
	fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
	socket, link := d.hostPath("stuck.example", "tls-socket"), d.hostPath("stuck.example", "link")
	symlink(t, filepath.Join(fs.dir, "x"), link)
	stop := d.steady("good.example")
	defer stop()
	var over atomic.Bool
	var tenant sync.WaitGroup
	tenant.Go(func() {
		for !over.Load() && !t.Failed() {
			if err := unix.Renameat2(unix.AT_FDCWD, socket, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
			}
		}
	})
	inParallel(300, 16, func(int) {
		if t.Failed() {
			return
		}
		switch got := <-d.ask(1, "stuck.example"); got {
		case `"this is stuck.example"`, "alert 80", "alert 90":
		default:
			t.Errorf("a client got %s", got)
		}
	})
	over.Store(true)
	tenant.Wait()
	stop()
	fs.abort()
	d.awaitFds(base)
}

// Goal: a stop does not wait for look-ups that are stuck, once their clients have been told.
func TestStuckStop(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	d := start(t)
	clients := d.stickAll(t)
	d.signal(syscall.SIGTERM)
	d.out.await(t, "shutting down")
	expectTold(t, clients, stuckInAll, "alert 90")
	d.expectExit(0)
}

// Goal: a second signal ends the program at once, in spite of look-ups that are stuck, and before
// their clients' time is over. The system may have any thread take a signal, the first of all by
// preference, and one that is stuck takes none. Which ones are is a matter of chance, hence the
// number of daemons.
func TestStuckSignals(t *testing.T) {
	var all sync.WaitGroup
	defer all.Wait()
	run := func(t *testing.T) {
		ownMounts(t)
		d := start(t)
		clients := d.stickAll(t)
		d.signal(syscall.SIGTERM)
		d.out.await(t, "shutting down")
		d.signal(syscall.SIGTERM)
		if got := d.wait(); got != 0 {
			t.Errorf("exit status %d, want 0", got)
		}
		for range stuckInAll {
			if got := <-clients; got == "alert 90" {
				t.Fatal("the time of clients was over when the signals were taken")
			}
		}
	}
	for range 8 {
		all.Go(func() { t.Run("", run) })
	}
}

// Goal: a request that a file system has taken, and does not answer, is beyond any signal: until
// it is answered, Linux keeps the thread, and with it the process. So a stop leaves nothing else:
// clients are told, those that were served have ended, the port is free.
func TestStuckStopTaken(t *testing.T) {
	t.Parallel()
	ownMounts(t)
	d := start(t)
	l := d.host("live.example")
	client, backend := d.pair(l, "live.example")
	fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
	fs.hold()
	fs.serve(0)
	d.leadAll(fs.dir)
	clients := d.askAll()
	expectTold(t, clients, stuckTooMany, "alert 80")
	d.signal(syscall.SIGTERM)
	d.awaitFree()
	ping(t, client, backend)
	ping(t, backend, client)
	client.Close()
	if got, err := io.ReadAll(backend); len(got) > 0 || err != nil {
		t.Errorf("the backend got %q, error %v, want the end", got, err)
	}
	backend.Close()
	expectTold(t, clients, stuckInAll, "alert 90")
	fs.abort()
	d.expectExit(0)
}

// Goal: the marker is looked at where it is, and not where it leads: a host whose marker leads
// into a stuck file system is served, with the header.
func TestStuckMarker(t *testing.T) {
	ownMounts(t)
	d := start(t)
	d.serve("a.example", greetBehindHeader)
	fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
	symlink(t, filepath.Join(fs.dir, "x"), d.hostPath("a.example", "send-proxy-v1"))
	expectTold(t, d.ask(100, "a.example"), 100, `"this is a.example behind a header"`)
}

// Goal: a file system that takes its time is waited for, at each step, while others are served.
// Directory and socket are looked up in it for each connection, and the marker.
func TestStuckSlow(t *testing.T) {
	for _, marker := range []bool{false, true} {
		t.Run(fmt.Sprintf("marker %v", marker), func(t *testing.T) {
			ownMounts(t)
			d := start(t)
			d.serve("good.example", greet)
			fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
			fs.add(rootNode, "link", unix.S_IFLNK|0o777, "x")
			dir := fs.add(rootNode, "x", unix.S_IFDIR|0o755, "")
			handle, want := greet, `"this is slow.example"`
			if marker {
				fs.add(dir, "send-proxy-v1", unix.S_IFREG|0o644, "")
				handle, want = greetBehindHeader, `"this is slow.example behind a header"`
			}
			fs.serve(0)
			symlink(t, filepath.Join(fs.dir, "link"), d.hostDir("slow.example"))
			serveSocket(t, filepath.Join(fs.dir, "x", "tls-socket"), handle)

			fs.hold()
			answer := d.ask(1, "slow.example")
			asked := make(map[string]bool)
			for done := false; !done; {
				select {
				case r := <-fs.held:
					asked[r.String()] = true
					if err := d.greeted("good.example"); err != nil {
						t.Error(err)
					}
					fs.answer(r)
				case got := <-answer:
					done = true
					if got != want {
						t.Errorf("the client got %s, want %s", got, want)
					}
				}
			}
			for _, want := range []string{"look-up of link", "look-up of x", "look-up of tls-socket", "look-up of send-proxy-v1"} {
				if !asked[want] {
					t.Errorf("there was no %s, but %v", want, asked)
				}
			}
		})
	}
}

// Goal: a good host is served wherever it is: on another mount of the same file system, or of
// one in memory; by a symlink, or because its directory, or its socket, is a mount point; with the
// marker beside it, and whatever the length of its name.
func TestStuckNot(t *testing.T) {
	none := func(*testing.T, string) {}
	bind := func(t *testing.T, dir string) { mountOn(t, hostsDir(t), dir, "", unix.MS_BIND, "") }
	tmpfs := func(t *testing.T, dir string) { mountOn(t, "none", dir, "tmpfs", 0, "mode=755") }
	ways := map[string]func(t *testing.T, elsewhere, dir string){
		"symlink": symlink,
		"mount": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			mountOn(t, elsewhere, dir, "", unix.MS_BIND, "")
		},
		"socket-symlink": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			symlink(t, filepath.Join(elsewhere, "tls-socket"), filepath.Join(dir, "tls-socket"))
		},
		"socket-mount": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			if err := os.WriteFile(filepath.Join(dir, "tls-socket"), nil, 0o777); err != nil {
				t.Fatal(err)
			}
			mountOn(t, filepath.Join(elsewhere, "tls-socket"), filepath.Join(dir, "tls-socket"), "", unix.MS_BIND, "")
		},
	}
	for _, tt := range []struct {
		name        string
		hosts, host func(t *testing.T, dir string) // what is mounted on the hosts directory, and elsewhere
	}{
		{"host on the same mount", none, none},
		{"host on another mount", none, bind},
		{"host on a tmpfs", none, tmpfs},
		{"hosts on another mount", bind, none},
		{"hosts on a tmpfs", tmpfs, none},
		{"both on a tmpfs", tmpfs, tmpfs},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ownMounts(t)
			hosts := hostsDir(t)
			tt.hosts(t, hosts)
			d := startOn(t, listen(t, "tcp4", "127.0.0.1:0"), hosts)
			for way, do := range ways {
				for _, marker := range []bool{false, true} {
					for _, size := range []int{0, 250} {
						name := fmt.Sprintf("%s.marker-%v.example", way, marker)
						name = strings.Repeat(strings.Repeat("a", 40)+".", 6)[:max(0, size-len(name))] + name
						if dir := hostDir("", name); !anyName && len(dir+"/tls-socket") > 107 {
							continue
						}
						elsewhere := hostsDir(t)
						tt.host(t, elsewhere)
						handle, want := greet, fmt.Sprintf("%q", "this is "+name)
						if marker {
							handle, want = greetBehindHeader, fmt.Sprintf("%q", "this is "+name+" behind a header")
						}
						serveSocket(t, filepath.Join(elsewhere, "tls-socket"), handle)
						do(t, elsewhere, d.hostDir(name))
						if marker {
							writeMarker(t, d.hostPath(name, "send-proxy-v1"))
						}
						expectTold(t, d.ask(10, name), 10, want)
					}
				}
			}
		})
	}
}

// Goal: many clients at once of a host that is on another file system are not mistaken for clients
// of one that is stuck.
func TestStuckNotBurst(t *testing.T) {
	ownMounts(t)
	d := start(t)
	elsewhere := hostsDir(t)
	mountOn(t, "none", elsewhere, "tmpfs", 0, "mode=755")
	serveSocket(t, filepath.Join(elsewhere, "tls-socket"), greet)
	symlink(t, elsewhere, d.hostDir("a.example"))
	for range 4 {
		expectTold(t, d.ask(500, "a.example"), 500, `"this is a.example"`)
	}
}

// ask has n clients ask for a host, all at once, and returns what each was told, as it comes.
func (d *daemon) ask(n int, name string) <-chan string {
	return d.askEach(n, func(int) string { return name })
}

// askEach is ask for a host of each client's own.
func (d *daemon) askEach(n int, name func(i int) string) <-chan string {
	told := make(chan string, n)
	for i := range n {
		go func() {
			got, err := d.exchange(hello(name(i)))
			switch {
			case err != nil:
				told <- fmt.Sprintf("%q, error %v", got, err)
			case alert(got) >= 0:
				told <- fmt.Sprintf("alert %d", alert(got))
			default:
				told <- fmt.Sprintf("%q", got)
			}
		}()
	}
	return told
}

// stickAll has as many look-ups stuck as there can be, and returns what their clients are told.
func (d *daemon) stickAll(t *testing.T) <-chan string {
	t.Helper()
	fs := mountUserFS(t, hostsDir(t), unix.S_IFDIR)
	d.leadAll(fs.dir)
	clients := d.askAll()
	expectTold(t, clients, stuckTooMany, "alert 80")
	return clients
}

// leadAll makes the hosts that askAll asks for, as symlinks to what is in dir.
func (d *daemon) leadAll(dir string) {
	d.t.Helper()
	for i := range stuckHosts {
		if err := os.Symlink(filepath.Join(dir, fmt.Sprint(i)), d.hostDir(fmt.Sprintf("stuck%d.example", i))); err != nil {
			d.t.Fatal(err)
		}
	}
}

// askAll is ask for stuckHosts hosts, as many clients for each as may wait.
func (d *daemon) askAll() <-chan string {
	all := make(chan string, stuckHosts*stuckPerHost)
	for i := range stuckHosts {
		told := d.ask(stuckPerHost, fmt.Sprintf("stuck%d.example", i))
		go func() {
			for range stuckPerHost {
				all <- <-told
			}
		}()
	}
	return all
}

// expectTold fails the test unless the next n clients are told what is wanted.
func expectTold(t *testing.T, told <-chan string, n int, want string) {
	t.Helper()
	others := make(map[string]int)
	for range n {
		if got := <-told; got != want {
			others[got]++
		}
	}
	if len(others) > 0 {
		t.Errorf("the next %d clients were to be told %s, but these were not: %v", n, want, others)
	}
}

// steady keeps clients coming, up to a hundred a second, that ask for a host served by greet, until
// stop is called. The test fails if one of them is not served, or is kept waiting for about as
// long as one whose host is stuck.
func (d *daemon) steady(name string) (stop func()) {
	const most = limits.Hello / 2
	over := make(chan struct{})
	var served, slowest atomic.Int64
	var clients sync.WaitGroup
	h := hello(name)
	for range 4 {
		clients.Go(func() {
			tick := time.NewTicker(40 * time.Millisecond)
			defer tick.Stop()
			for {
				begin := time.Now()
				got, err := d.exchangeWithin(h, most)
				if want := "this is " + name; err != nil || string(got) != want {
					d.t.Errorf("after %d connections: got %q, error %v, want %q", served.Load(), got, err, want)
					return
				}
				served.Add(1)
				for took := int64(time.Since(begin)); ; {
					was := slowest.Load()
					if took <= was || slowest.CompareAndSwap(was, took) {
						break
					}
				}
				select {
				case <-tick.C:
				case <-over:
					return
				}
			}
		})
	}
	return sync.OnceFunc(func() {
		close(over)
		clients.Wait()
		d.t.Logf("%d clients were served meanwhile, the slowest within %v", served.Load(), time.Duration(slowest.Load()))
	})
}

// exchangeWithin is exchange with a limit on the time.
func (d *daemon) exchangeWithin(b []byte, most time.Duration) ([]byte, error) {
	deadline := time.Now().Add(most)
	c, err := net.DialTimeout("tcp", d.addr, most)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(deadline)
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return io.ReadAll(c)
}

// threads returns how many threads the daemon has.
func (d *daemon) threads() int {
	d.t.Helper()
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.cmd.Process.Pid))
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	return len(tasks)
}

// expectThreads waits until the daemon has about as many threads as it had. Go's runtime keeps
// some that it once needed.
func (d *daemon) expectThreads(base int) {
	d.t.Helper()
	await(d.t, fmt.Sprintf("the daemon to have about %d threads again", base), func() bool { return d.threads() <= base+8 })
}

// greetBehindHeader is greet for a backend that gets a PROXY header first.
func greetBehindHeader(c *net.UnixConn) {
	b := make([]byte, 1)
	for header := ""; b[0] != '\n'; header += string(b) {
		if _, err := c.Read(b); err != nil || len(header) == 6 && header != "PROXY " {
			fmt.Fprintf(c, "no header but %q, error %v", header, err)
			return
		}
	}
	greet(c)
	io.WriteString(c, " behind a header")
}

// serveSocket calls handle for each connection to the socket that it makes at path.
func serveSocket(t *testing.T, path string, handle func(*net.UnixConn)) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // the file system may be stuck by then
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(4 * patience))
				handle(c)
			}()
		}
	}()
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

// look has the kernel look a path up, and ask what it wants to know of it.
func look(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
}

// ownMounts gives the thread of the test a mount namespace: what is mounted by it is seen by the
// daemons that it starts and by nobody else, and ends with them, whatever happens.
func ownMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // for good, so that the thread ends with the test
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Skipf("no mount namespace: %v", err)
	}
}

// mountOn mounts something until the end of the test.
func mountOn(t *testing.T, source, path, kind string, flags uintptr, options string) {
	t.Helper()
	if err := unix.Mount(source, path, kind, flags, options); err != nil {
		t.Skipf("mount of %s on %s: %v", source, path, err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH|unix.MNT_FORCE) })
}

// A userFS is a file system in user space (FUSE): the kernel asks this process for what is in it,
// and waits for the answers. See fuse(4), and linux/fuse.h for what is said.
type userFS struct {
	dir    string   // where it is mounted
	dev    *os.File // where the kernel asks
	served sync.WaitGroup

	mu       sync.Mutex
	nodes    []node        // by their numbers, which begin with 1
	validity uint64        // for how many seconds answers may be remembered
	delay    time.Duration // of look-ups, but for those of files that are in the root
	lazy     bool          // the kernel keeps what is written until the last who has the file closes it

	holding atomic.Uint64 // operations that are not answered, as bits
	held    chan *request // what is not answered
}

type node struct {
	parent uint64
	name   string
	mode   uint32
	target string // of a symlink
}

const rootNode = 1

// mountUserFS mounts a file system of which the root has a type. The kernel gets no answer to
// anything until serve is called.
func mountUserFS(t *testing.T, dir string, kind uint32, options ...string) *userFS {
	t.Helper()
	// Non-blocking, so that it can be closed while somebody waits for something to read.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("/dev/fuse: %v", err)
	}
	options = append(options, fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other", fd, kind))
	err = unix.Mount("stuck", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, strings.Join(options, ","))
	if err != nil {
		unix.Close(fd)
		t.Skipf("mount of a file system in user space: %v", err)
	}
	fs := &userFS{
		dir:   dir,
		dev:   os.NewFile(uintptr(fd), "/dev/fuse"),
		nodes: []node{{mode: kind | 0o755}},
		held:  make(chan *request, 100),
	}
	t.Cleanup(fs.abort)
	return fs
}

// add adds a file, and returns the number of its node.
func (fs *userFS) add(parent uint64, name string, mode uint32, target string) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.nodes = append(fs.nodes, node{parent, name, mode, target})
	return uint64(len(fs.nodes))
}

// find returns the number of the node of a file, 0 if there is none.
func (fs *userFS) find(parent uint64, name string) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for i, n := range fs.nodes {
		if n.parent == parent && n.name == name {
			return uint64(i + 1)
		}
	}
	return 0
}

func (fs *userFS) node(n uint64) node {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.nodes[n-1]
}

// serve answers the kernel from now on, which may remember the answers for some time.
func (fs *userFS) serve(validity time.Duration) {
	fs.validity = uint64(validity / time.Second)
	fs.served.Go(func() {
		buf := make([]byte, 128<<10)
		for {
			n, err := fs.dev.Read(buf)
			switch {
			case errors.Is(err, unix.ENOENT): // what was asked has been withdrawn
			case err != nil:
				return
			default:
				r := parseRequest(buf[:n])
				switch {
				case fs.holding.Load()&(1<<r.Opcode) != 0:
					fs.held <- r
				case fs.delay > 0 && r.Opcode == opLookup && (r.Node != rootNode || fs.find(r.Node, r.name()) == 0):
					time.AfterFunc(fs.delay, func() { fs.answer(r) })
				default:
					fs.answer(r)
				}
			}
		}
	})
}

// hold keeps what is asked from now on without an answer.
func (fs *userFS) hold() { fs.holding.Store(^uint64(1<<opInit | 1<<opInterrupt)) }

// holdWrites does so with what is written.
func (fs *userFS) holdWrites() { fs.holding.Store(1 << opWrite) }

// ignore stops reading what is asked.
func (fs *userFS) ignore() {
	fs.dev.SetReadDeadline(time.Now())
	fs.served.Wait()
}

// abort ends the file system: whoever waits for an answer gets an error.
func (fs *userFS) abort() {
	if fs.dev.Close() == nil {
		fs.served.Wait()
		unix.Unmount(fs.dir, unix.MNT_DETACH|unix.MNT_FORCE)
	}
}

// What the kernel asks: enum fuse_opcode of linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opReadlink    = 5
	opMknod       = 8
	opOpen        = 14
	opWrite       = 16
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opAccess      = 34
	opInterrupt   = 36
	opBatchForget = 42
)

// FUSE_WRITEBACK_CACHE, and FUSE_PARALLEL_DIROPS: the kernel looks up several names at once.
const (
	writebackCache = 1 << 16
	parallelDirops = 1 << 18
)

// A request is something that the kernel asks.
type request struct {
	requestHeader
	body []byte
}

// The structures of linux/fuse.h.
type (
	requestHeader struct { // fuse_in_header
		Len, Opcode   uint32
		Unique, Node  uint64
		UID, GID, PID uint32
		_             uint32
	}
	answerHeader struct { // fuse_out_header
		Len    uint32
		Error  int32
		Unique uint64
	}
	initAnswer struct { // fuse_init_out
		Major, Minor, MaxReadahead, Flags  uint32
		MaxBackground, CongestionThreshold uint16
		MaxWrite, TimeGran                 uint32
		_                                  [9]uint32
	}
	attr struct { // fuse_attr
		Ino, Size, Blocks uint64
		Times             [3]uint64
		Nanoseconds       [3]uint32
		Mode, Links       uint32
		UID, GID, Rdev    uint32
		BlockSize, Flags  uint32
	}
	openAnswer struct { // fuse_open_out
		Handle uint64
		_      [2]uint32
	}
	writeAnswer struct { // fuse_write_out
		Size, _ uint32
	}
	attrAnswer struct { // fuse_attr_out
		Valid uint64
		_     [2]uint32
		attr
	}
	entryAnswer struct { // fuse_entry_out
		Node, Generation      uint64
		EntryValid, AttrValid uint64
		_                     [2]uint32
		attr
	}
)

func parseRequest(b []byte) *request {
	r := new(request)
	binary.Decode(b, binary.NativeEndian, &r.requestHeader)
	r.body = bytes.Clone(b[binary.Size(r.requestHeader):])
	return r
}

// name returns the name of a file in a request, which is a C string.
func (r *request) name() string {
	b := r.body
	if r.Opcode == opMknod {
		b = b[16:] // fuse_mknod_in
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

func (r *request) String() string {
	if r.Opcode == opLookup {
		return "look-up of " + r.name()
	}
	return fmt.Sprintf("operation %d on node %d", r.Opcode, r.Node)
}

// answer answers a request.
func (fs *userFS) answer(r *request) {
	entry := func(n uint64) any {
		return &entryAnswer{Node: n, EntryValid: fs.validity, AttrValid: fs.validity, attr: fs.attr(n)}
	}
	switch r.Opcode {
	case opForget, opBatchForget, opInterrupt:
		// These want no answer.
	case opInit:
		a := initAnswer{Major: 7, Minor: 31, MaxWrite: 4096}
		if fs.lazy {
			a.Flags |= writebackCache
		}
		if fs.delay > 0 {
			a.Flags |= parallelDirops
		}
		fs.write(r, 0, &a)
	case opLookup:
		if n := fs.find(r.Node, r.name()); n != 0 {
			fs.write(r, 0, entry(n))
		} else {
			fs.write(r, unix.ENOENT, nil)
		}
	case opOpen:
		fs.write(r, 0, &openAnswer{Handle: r.Node})
	case opWrite:
		in := r.body[16:] // fuse_write_in: the size comes behind the handle and the offset
		fs.write(r, 0, &writeAnswer{Size: binary.NativeEndian.Uint32(in)})
	case opGetattr, opSetattr:
		fs.write(r, 0, &attrAnswer{Valid: fs.validity, attr: fs.attr(r.Node)})
	case opReadlink:
		fs.write(r, 0, []byte(fs.node(r.Node).target))
	case opMknod:
		mode := binary.NativeEndian.Uint32(r.body)
		fs.write(r, 0, entry(fs.add(r.Node, r.name(), mode, "")))
	case opAccess, opFlush, opRelease:
		fs.write(r, 0, nil)
	default:
		fs.write(r, unix.ENOSYS, nil)
	}
}

func (fs *userFS) attr(n uint64) attr {
	return attr{Ino: n, Mode: fs.node(n).mode, Links: 1, BlockSize: 4096}
}

// write writes an answer. It fails if nobody waits for it any more.
func (fs *userFS) write(r *request, errno unix.Errno, body any) {
	var b bytes.Buffer
	h := answerHeader{Error: -int32(errno), Unique: r.Unique}
	h.Len = uint32(binary.Size(h))
	if body != nil {
		h.Len += uint32(binary.Size(body))
	}
	binary.Write(&b, binary.NativeEndian, h)
	if body != nil {
		binary.Write(&b, binary.NativeEndian, body)
	}
	fs.dev.Write(b.Bytes())
}
