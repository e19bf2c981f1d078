//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

const (
	// Limits on look-ups that wait for a file system: for one host, and in all.
	stuckPerHost = 4
	stuckInAll   = 64

	// Hosts that together exceed the limit, and by how much, if each has as many as it may.
	stuckHosts   = 20
	stuckTooMany = stuckHosts*stuckPerHost - stuckInAll
)

// Goal: however a tenant's host leads into a file system that never answers, all others are served.
// Of the clients that ask for that host, those who may wait get user_canceled when their time is
// over, and the rest get internal_error at once. When the file system goes away, the daemon frees
// everything that it held for it, and serves the host as soon as it is a good one.
func TestStuck(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup // all at once, since they do little but wait
	defer all.Wait()
	for _, tt := range []struct {
		way string
		do  func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS
	}{
		{"symlink into a mount that was never set up", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to the root of a mount", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			symlink(t, fs.Dir, d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that has to be asked for", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			fs.Add(hostdirtest.RootNode, "x", unix.S_IFDIR|0o755, "")
			fs.Serve(0)
			look(t, filepath.Join(fs.Dir, "x"))
			fs.Ignore()
			symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that is asked for in vain", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			fs.Hold()
			fs.Serve(0)
			symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
			return fs
		}},
		{"symlink to a directory that is in the cache", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			fs.Add(hostdirtest.RootNode, "x", unix.S_IFDIR|0o755, "")
			fs.Serve(time.Hour)
			look(t, filepath.Join(fs.Dir, "x"))
			fs.Ignore()
			symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
			return fs
		}},
		{"mount point", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			return hostdirtest.MountUserFS(t, filepath.Dir(d.hostPath(name, "x")), unix.S_IFDIR)
		}},
		{"mount point that is in the cache", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, filepath.Dir(d.hostPath(name, "x")), unix.S_IFDIR)
			fs.Serve(time.Hour)
			look(t, fs.Dir)
			fs.Ignore()
			return fs
		}},
		{"socket that is a symlink", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			symlink(t, filepath.Join(fs.Dir, "x"), d.hostPath(name, "tls-socket"))
			return fs
		}},
		{"socket that is a symlink through the cache", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			fs.Add(hostdirtest.RootNode, "x", unix.S_IFDIR|0o755, "")
			fs.Serve(time.Hour)
			look(t, filepath.Join(fs.Dir, "x"))
			fs.Ignore()
			symlink(t, filepath.Join(fs.Dir, "x", "y"), d.hostPath(name, "tls-socket"))
			return fs
		}},
		{"socket that is a mount point", func(t *testing.T, d *daemon, name string) *hostdirtest.UserFS {
			path := d.hostPath(name, "tls-socket")
			hostdirtest.Must(t, os.WriteFile(path, nil, 0o777))
			// The kernel has to ask for the permissions, which it was not told yet.
			return hostdirtest.MountUserFS(t, path, unix.S_IFSOCK, "default_permissions")
		}},
	} {
		run := func(t *testing.T) {
			hostdirtest.OwnMounts(t)
			d := start(t)
			d.serve("good.example", hostdirtest.Greet)
			hostdirtest.Must(t, d.greeted("good.example"))
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

			fs.Abort()
			hostdirtest.Must(t, os.RemoveAll(d.hostDir(name)))
			d.serve(name, hostdirtest.Greet)
			hostdirtest.Await(t, "the host to be served", func() bool { return d.greeted(name) == nil })
			d.awaitFds(base)
			d.expectThreads(threads)
		}
		all.Go(func() { t.Run(tt.way, run) })
	}
}

// Goal: what all stuck hosts together hold is limited as well. Descriptors and threads do not add
// up when file systems get stuck and go away, again and again. When they go away, waiting clients
// get their alert at once.
func TestStuckManyHosts(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	d := start(t)
	d.serve("good.example", hostdirtest.Greet)
	hostdirtest.Must(t, d.greeted("good.example"))
	base, all, threads := d.fds(), d.allFds(), d.threads()
	stop := func() {}
	if anyName && !isPortable(t) {
		// The portable engine cannot tell beforehand which look-ups take time, so with all
		// places taken it refuses every host.
		stop = d.steady("good.example")
	}
	defer stop()
	dir := hostdirtest.Dir(t)
	d.leadAll(dir)
	for round := range 4 {
		fs := hostdirtest.MountUserFS(t, dir, unix.S_IFDIR)
		clients := d.askAll()
		expectTold(t, clients, stuckTooMany, "alert 80")
		if round == 0 {
			expectTold(t, clients, stuckInAll, "alert 90")
			fs.Abort()
			continue
		}
		fs.Abort()
		for range stuckInAll {
			if got := <-clients; got != "alert 80" && got != "alert 112" {
				t.Errorf("a client got %s when the file system was gone", got)
			}
		}
		// Not before its look-up has ended can another one wait in its place.
		hostdirtest.Await(t, "the look-ups to have ended", func() bool {
			return <-d.ask(1, "stuck0.example") == "alert 112"
		})
	}
	stop()
	d.awaitFds(base)
	hostdirtest.Await(t, "all descriptors to be closed", func() bool { return d.allFds() <= all+8 })
	if !anyName {
		threads += stuckInAll // the portable engine leaves them to Go's runtime, which keeps them for later
	}
	d.expectThreads(threads)
}

// Goal: a tenant gains nothing by exchanging its socket for a symlink into a stuck file system, and
// back, at any moment. What the daemon found out about a path may be wrong when it uses it.
func TestStuckExchange(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	d := start(t)
	d.serve("good.example", hostdirtest.Greet)
	d.serve("stuck.example", hostdirtest.Greet)
	base := d.fds()
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	socket, link := d.hostPath("stuck.example", "tls-socket"), d.hostPath("stuck.example", "link")
	symlink(t, filepath.Join(fs.Dir, "x"), link)
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
	fs.Abort()
	d.awaitFds(base)
}

// Goal: nobody gains anything by locking for ever a directory that he may change, either: his own,
// one of the administrator's, or the hosts directory. Go's garbage collector must know of each
// thread that waits.
func TestStuckLocked(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	const tenant = 12345
	group := func(dir string) error {
		return errors.Join(os.Chown(dir, 0, tenant), unix.Chmod(dir, 0o2775))
	}
	for what, change := range map[string]func(dir string) error{
		"a tenant's":                      func(dir string) error { return os.Chown(dir, tenant, tenant) },
		"one that a group may change":     group,
		"the hosts directory for a group": nil,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			hosts := hostdirtest.Dir(t)
			if change == nil {
				hostdirtest.Must(t, unix.Chmod(hosts, 0o1775))
			}
			l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
			d := startOn(t, l, hosts, oneLoop, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Environ(), "GOGC=1", "GODEBUG=gctrace=1") })
			l.Close()
			d.serve("good.example", hostdirtest.Greet)
			d.serve("locked.example", hostdirtest.Greet)
			d.serve("next.example", hostdirtest.Greet)
			dir, next := d.hostDir("locked.example"), d.hostDir("next.example")
			base := d.fds()
			var unlock func()
			clients, ask := 8, func(i int) string { return <-d.ask(1, "locked.example") }
			if change == nil {
				hostdirtest.Must(t, d.greeted("good.example"))
				unlock = hostdirtest.LockDirectory(t, d.dir)
				clients, ask = 150, func(i int) string { return <-d.ask(1, fmt.Sprintf("unknown%d.example", i)) }
			} else {
				hostdirtest.Must(t, errors.Join(change(dir), change(next)))
				// Then the loop looks the host up itself.
				for range 10 {
					if got := <-d.ask(1, "locked.example"); got != `"this is locked.example"` {
						t.Fatalf("a client got %s", got)
					}
				}
				unlock = hostdirtest.LockDirectory(t, next)
				hostdirtest.Must(t, unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, next, unix.RENAME_EXCHANGE))
			}
			locked := make(chan string)
			for i := range clients {
				go func() { locked <- ask(i) }()
			}
			stop := d.steady("good.example")
			collected := func() int { return strings.Count(d.err.String(), "gc ") }
			before := collected()
			hostdirtest.Await(t, "the daemon to collect its garbage", func() bool {
				c := d.dial() // what is kept for it, and then garbage, is some KiB
				defer c.Close()
				c.Write([]byte{22})
				c.CloseWrite()
				io.ReadAll(c)
				return collected() > before
			})
			if n := d.threads(); n > 120 {
				t.Errorf("%d threads for %d clients, want a bounded number", n, clients)
			}
			for range clients {
				if got := <-locked; got != "alert 80" && got != "alert 90" {
					t.Errorf("a client of the locked directory got %s", got)
				}
			}
			stop()
			unlock()
			d.awaitFds(base)
		})
	}
}

// Goal: nor does the start wait for that. What it could not find out is said.
func TestStuckLockedStart(t *testing.T) {
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(hosts, "good.example"), hostdirtest.Greet)
	hostdirtest.Must(t, unix.Chmod(hosts, 0o1777))
	unlock := hostdirtest.LockDirectory(t, hosts)
	defer time.AfterFunc(hostdirtest.Patience, unlock).Stop() // a daemon that waits for it cannot end before
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := startOn(t, l, hosts)
	l.Close()
	hostdirtest.Must(t, d.greeted("good.example"))
	for _, what := range []string{"find out whether there is an .accept-proxy in the hosts directory", "look at .ech in the hosts directory"} {
		if line := d.err.Await(t, "cannot "+what); !strings.HasSuffix(line, ": the hosts directory does not answer") {
			t.Errorf("it says %q", line)
		}
	}
	unlock()
	hostdirtest.Touch(t, hostPath(t, hosts, "good.example", "log-connections"))
	d.awaitLogging("good.example", true)
}

// Goal: a stop does not wait for stuck look-ups once their clients have got their alerts.
func TestStuckStop(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	d := start(t)
	clients := d.stickAll(t)
	d.signal(syscall.SIGTERM)
	d.out.Await(t, "shutting down")
	expectTold(t, clients, stuckInAll, "alert 90")
	d.expectExit(0)
}

// Goal: a second signal ends the program at once, in spite of stuck look-ups, before their clients'
// time is over. The system may give a signal to any thread, and prefers the first, but a stuck
// thread takes none. Which threads are stuck is chance, so the test starts several daemons.
func TestStuckSignals(t *testing.T) {
	var all sync.WaitGroup
	defer all.Wait()
	run := func(t *testing.T) {
		hostdirtest.OwnMounts(t)
		d := start(t)
		clients := d.stickAll(t)
		d.signal(syscall.SIGTERM)
		d.out.Await(t, "shutting down")
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

// Goal: no signal ends a request that a file system has taken and not answered: until it does,
// Linux keeps the thread, and so the process. A stop leaves nothing else behind: waiting clients
// have their alerts, served ones have ended, and the port is free.
func TestStuckStopTaken(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	d := start(t)
	l := d.host("live.example")
	client, backend := d.pair(l, "live.example")
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	fs.Hold()
	fs.Serve(0)
	d.leadAll(fs.Dir)
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
	fs.Abort()
	d.expectExit(0)
}

// Goal: the daemon looks at the marker itself, not at what it leads to: a host whose marker leads
// into a stuck file system is served, with the header.
func TestStuckMarker(t *testing.T) {
	hostdirtest.OwnMounts(t)
	d := start(t)
	d.serve("a.example", greetBehindHeader)
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	symlink(t, filepath.Join(fs.Dir, "x"), d.hostPath("a.example", "send-proxy-v1"))
	expectTold(t, d.ask(100, "a.example"), 100, `"this is a.example behind a header"`)
}

// Goal: the daemon waits for a slow file system at each step, and serves others meanwhile. It looks
// up directory, socket and marker in it for each connection.
func TestStuckSlow(t *testing.T) {
	for _, marker := range []bool{false, true} {
		t.Run(fmt.Sprintf("marker %v", marker), func(t *testing.T) {
			hostdirtest.OwnMounts(t)
			d := start(t)
			d.serve("good.example", hostdirtest.Greet)
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			fs.Add(hostdirtest.RootNode, "link", unix.S_IFLNK|0o777, "x")
			dir := fs.Add(hostdirtest.RootNode, "x", unix.S_IFDIR|0o755, "")
			handle, want := hostdirtest.Greet, `"this is slow.example"`
			if marker {
				fs.Add(dir, "send-proxy-v1", unix.S_IFREG|0o644, "")
				handle, want = greetBehindHeader, `"this is slow.example behind a header"`
			}
			fs.Serve(0)
			symlink(t, filepath.Join(fs.Dir, "link"), d.hostDir("slow.example"))
			hostdirtest.Serve(t, filepath.Join(fs.Dir, "x"), handle)

			fs.Hold()
			answer := d.ask(1, "slow.example")
			asked := make(map[string]bool)
			for done := false; !done; {
				select {
				case r := <-fs.Held:
					asked[r.String()] = true
					if err := d.greeted("good.example"); err != nil {
						t.Error(err)
					}
					fs.Answer(r)
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

// Goal: a good host is served wherever it is: on another mount of the same file system, or of one
// in memory; through a symlink; if its directory or socket is a mount point; with the marker beside
// it; whatever the length of its name.
func TestStuckNot(t *testing.T) {
	none := func(*testing.T, string) {}
	bind := func(t *testing.T, dir string) { hostdirtest.Mount(t, hostdirtest.Dir(t), dir, "", unix.MS_BIND, "") }
	tmpfs := func(t *testing.T, dir string) { hostdirtest.Mount(t, "none", dir, "tmpfs", 0, "mode=755") }
	ways := map[string]func(t *testing.T, elsewhere, dir string){
		"symlink": symlink,
		"mount": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			hostdirtest.Mount(t, elsewhere, dir, "", unix.MS_BIND, "")
		},
		"socket-symlink": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			symlink(t, filepath.Join(elsewhere, "tls-socket"), filepath.Join(dir, "tls-socket"))
		},
		"socket-mount": func(t *testing.T, elsewhere, dir string) {
			mkdir(t, dir)
			hostdirtest.Must(t, os.WriteFile(filepath.Join(dir, "tls-socket"), nil, 0o777))
			hostdirtest.Mount(t, filepath.Join(elsewhere, "tls-socket"), filepath.Join(dir, "tls-socket"), "", unix.MS_BIND, "")
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
			hostdirtest.OwnMounts(t)
			hosts := hostdirtest.Dir(t)
			tt.hosts(t, hosts)
			d := startOn(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hosts)
			for way, do := range ways {
				for _, marker := range []bool{false, true} {
					for _, size := range []int{0, 250} {
						name := fmt.Sprintf("%s.marker-%v.example", way, marker)
						name = strings.Repeat(strings.Repeat("a", 40)+".", 6)[:max(0, size-len(name))] + name
						if dir := hostDir("", name); !anyName && len(dir+"/tls-socket") > 107 {
							continue
						}
						elsewhere := hostdirtest.Dir(t)
						tt.host(t, elsewhere)
						handle, want := hostdirtest.Greet, fmt.Sprintf("%q", "this is "+name)
						if marker {
							handle, want = greetBehindHeader, fmt.Sprintf("%q", "this is "+name+" behind a header")
						}
						hostdirtest.Serve(t, elsewhere, handle)
						do(t, elsewhere, d.hostDir(name))
						if marker {
							hostdirtest.Touch(t, d.hostPath(name, "send-proxy-v1"))
						}
						expectTold(t, d.ask(10, name), 10, want)
					}
				}
			}
		})
	}
}

// Goal: the daemon does not take many clients at once of a host on another file system for clients
// of a stuck host.
func TestStuckNotBurst(t *testing.T) {
	hostdirtest.OwnMounts(t)
	d := start(t)
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Mount(t, "none", elsewhere, "tmpfs", 0, "mode=755")
	hostdirtest.Serve(t, elsewhere, hostdirtest.Greet)
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
			got, err := d.exchange(snitest.Hello(name(i)))
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
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	d.leadAll(fs.Dir)
	clients := d.askAll()
	expectTold(t, clients, stuckTooMany, "alert 80")
	return clients
}

// leadAll makes the hosts that askAll asks for, as symlinks to what is in dir.
func (d *daemon) leadAll(dir string) {
	d.t.Helper()
	for i := range stuckHosts {
		hostdirtest.Must(d.t, os.Symlink(filepath.Join(dir, fmt.Sprint(i)), d.hostDir(fmt.Sprintf("stuck%d.example", i))))
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

// steady keeps clients coming, up to a hundred a second, that ask for a host served by Greet, until
// stop is called. The test fails if one of them is not served, or waits for about as long as
// clients of a stuck host do, which get their alerts after limits.Hello.
func (d *daemon) steady(name string) (stop func()) {
	const most = limits.Hello * 9 / 10
	over := make(chan struct{})
	var served atomic.Int64
	var clients sync.WaitGroup
	h := snitest.Hello(name)
	for range 4 {
		clients.Go(func() {
			tick := time.NewTicker(40 * time.Millisecond)
			defer tick.Stop()
			for {
				got, err := d.exchangeWithin(h, most)
				if want := "this is " + name; err != nil || string(got) != want {
					d.t.Errorf("after %d connections: got %q, error %v, want %q", served.Load(), got, err, want)
					return
				}
				served.Add(1)
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
		d.t.Logf("%d clients were served meanwhile", served.Load())
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
	hostdirtest.Await(d.t, fmt.Sprintf("the daemon to have about %d threads again", base), func() bool { return d.threads() <= base+8 })
}

// greetBehindHeader is Greet for a backend that gets a PROXY header first.
func greetBehindHeader(c *net.UnixConn) {
	b := make([]byte, 1)
	for header := ""; b[0] != '\n'; header += string(b) {
		if _, err := c.Read(b); err != nil || len(header) == 6 && header != "PROXY " {
			fmt.Fprintf(c, "no header but %q, error %v", header, err)
			return
		}
	}
	hostdirtest.Greet(c)
	io.WriteString(c, " behind a header")
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	hostdirtest.Must(t, os.Symlink(target, path))
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	hostdirtest.Must(t, os.Mkdir(path, 0o755))
}

// look has the kernel look a path up, and ask what it wants to know of it.
func look(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
}

// Goal: a loop that was stuck before it knew whose the host is, and finds no descriptor when it
// goes on, has the client wait.
func TestStuckWithoutRoom(t *testing.T) {
	hostdirtest.NeedRoot(t)
	if isPortable(t) {
		t.Skip("the portable engine looks up nothing in a loop")
	}
	d := start(t, oneLoop)
	d.serve("*", hostdirtest.Greet)
	d.serve("good.example", hostdirtest.Greet)
	hostdirtest.Must(t, d.greeted("good.example"))
	var limit unix.Rlimit
	pid := d.cmd.Process.Pid
	hostdirtest.Must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit))
	unlock := hostdirtest.LockDirectory(t, d.dir)
	told := d.ask(1, "unknown.example")
	<-time.After(700 * time.Millisecond) // the loop goes on without the look-up meanwhile
	hostdirtest.Must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 6, Max: limit.Max}, nil))
	unlock()
	<-time.After(300 * time.Millisecond) // it comes back meanwhile, and finds no room
	hostdirtest.Must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil))
	if got := <-told; !strings.HasPrefix(got, `"this is `) {
		t.Errorf("the client got %s", got)
	}
}
