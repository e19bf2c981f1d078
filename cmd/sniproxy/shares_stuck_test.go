//go:build linux

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// stuckPerTenant limits the look-ups of a tenant that wait for a file system.
const stuckPerTenant = 16

// slowHost makes a host that cannot be looked up without asking a file system, which answers.
func (d *daemon) slowHost(t *testing.T, name string) {
	t.Helper()
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	fs.Add(hostdirtest.RootNode, "x", unix.S_IFDIR|0o755, "")
	fs.Serve(0)
	symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
	hostdirtest.Serve(t, filepath.Join(fs.Dir, "x"), hostdirtest.Greet)
}

// Goal: however many names below a wildcard, or hosts of one tenant, lead into a file system that
// never answers, no more look-ups wait for it than one entry, and one tenant, may have. So a host
// that must be looked up in the same way is served.
func TestSharesStuck(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup
	defer all.Wait()
	for _, tt := range []struct {
		what    string
		clients int
		stuck   int // of which so many wait
		do      func(t *testing.T, d *daemon, fs string) (name func(i int) string)
	}{
		{"names below a wildcard", stuckInAll, stuckPerHost, func(t *testing.T, d *daemon, fs string) func(int) string {
			symlink(t, filepath.Join(fs, "x"), d.hostDir("*.stuck.example"))
			return func(i int) string { return fmt.Sprintf("a%d.stuck.example", i) }
		}},
		{"names below a wildcard that leads to a tenant's directory", stuckInAll, stuckPerHost, func(t *testing.T, d *daemon, fs string) func(int) string {
			symlink(t, filepath.Join(fs, "x"), d.hostDir("stuck.example"))
			symlink(t, hostDir("", "stuck.example"), d.hostDir("*.stuck.example"))
			d.give("stuck.example", greedy)
			return func(i int) string { return fmt.Sprintf("a%d.stuck.example", i) }
		}},
		{"all names", stuckInAll, stuckPerHost, func(t *testing.T, d *daemon, fs string) func(int) string {
			symlink(t, filepath.Join(fs, "x"), d.hostDir("*"))
			return func(i int) string { return fmt.Sprintf("a%d.stuck.example", i) }
		}},
		{"hosts of a tenant", stuckHosts * stuckPerHost, stuckPerTenant, func(t *testing.T, d *daemon, fs string) func(int) string {
			d.leadAll(fs)
			for i := range stuckHosts {
				d.give(fmt.Sprintf("stuck%d.example", i), greedy)
			}
			return func(i int) string { return fmt.Sprintf("stuck%d.example", i%stuckHosts) }
		}},
		{"sockets of a tenant", stuckHosts * stuckPerHost, stuckPerTenant, func(t *testing.T, d *daemon, fs string) func(int) string {
			for i := range stuckHosts {
				name := fmt.Sprintf("stuck%d.example", i)
				symlink(t, filepath.Join(fs, "x"), d.hostPath(name, "tls-socket"))
				d.give(name, greedy)
			}
			return func(i int) string { return fmt.Sprintf("stuck%d.example", i%stuckHosts) }
		}},
	} {
		run := func(t *testing.T) {
			hostdirtest.NeedRoot(t)
			hostdirtest.OwnMounts(t)
			d := start(t)
			d.slowHost(t, "slow.example")
			d.give("slow.example", modest)
			hostdirtest.Must(t, d.greeted("slow.example"))
			base := d.fds()
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			stuck := d.askEach(tt.clients, tt.do(t, d, fs.Dir))
			stop := d.steady("slow.example")
			defer stop()
			expectTold(t, stuck, tt.clients-tt.stuck, "alert 80")
			expectTold(t, stuck, tt.stuck, "alert 90")
			stop()
			fs.Abort()
			d.awaitFds(base)
		}
		all.Go(func() { t.Run(tt.what, run) })
	}
}

// stuckTenants is how many tenants exchange their sockets for symlinks into a stuck file system:
// more than there may be threads that are stuck.
const stuckTenants = 100

// Goal: tenants exchange their sockets for symlinks into a stuck file system at any moment, so
// threads get stuck that nobody expected to. They are limited as all look-ups are, however many
// tenants do that, and others are served. Where the system limits the daemon's threads, running out
// of them does not end it.
func TestSharesStuckThreads(t *testing.T) {
	t.Parallel()
	// The limit counts the threads of a user, so nobody else may run as these, such as another run
	// of this test.
	uid := uint32(1<<30 + 2*os.Getpid())
	for _, tt := range []struct {
		name  string
		uid   uint32
		limit int // of threads
	}{
		{"threads", uid, 0},
		{"limited threads", uid + 1, 30},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			hostdirtest.NeedRoot(t)
			hostdirtest.OwnMounts(t)
			setups := []setup{ordinaryUser(t), func(cmd *exec.Cmd) {
				cmd.SysProcAttr.Credential = &syscall.Credential{Uid: tt.uid, Gid: tt.uid}
			}}
			if tt.limit > 0 {
				setups = append(setups, limitThreads(tt.limit))
			}
			d := start(t, setups...)
			d.serve("victim.example", hostdirtest.Greet)
			hostdirtest.Must(t, d.greeted("victim.example"))
			base, threads := d.fds(), d.threads()
			fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
			for i := range stuckTenants {
				name := fmt.Sprintf("t%d.example", i)
				hostdirtest.Serve(t, d.hostDir(name), hostdirtest.Greet)
				symlink(t, filepath.Join(fs.Dir, "x"), d.hostPath(name, "other"))
				d.give(name, 100_000+i)
			}
			stop := func() {}
			if anyName && !isPortable(t) {
				stop = d.steady("victim.example") // as in TestStuckManyHosts
			}
			defer stop()
			most := 0
			for i := range stuckTenants {
				d.exchangeSockets(t, fmt.Sprintf("t%d.example", i))
				if !d.running() {
					t.Fatal("the daemon has ended")
				}
				most = max(most, d.threads())
			}
			stop()
			t.Logf("the daemon had up to %d threads, and %d before", most, threads)
			if limit := threads + stuckInAll + 16; most > limit {
				t.Errorf("the daemon had up to %d threads, and %d before, want at most %d", most, threads, limit)
			}
			fs.Abort()
			d.awaitFds(base)
			hostdirtest.Await(t, "all hosts to be served", func() bool { return d.greeted("victim.example") == nil })
			d.signal(unix.SIGTERM)
			d.expectExit(0)
		})
	}
}

// exchangeSockets exchanges the socket of a host for what is beside it, and back, while clients ask
// for it, for about the time that it takes until a look-up is between the two.
func (d *daemon) exchangeSockets(t *testing.T, name string) {
	stop := keepSwapping(t, d.hostDir(name), "tls-socket", "other")
	defer stop()
	h := snitest.Hello(name)
	var clients sync.WaitGroup
	defer clients.Wait()
	over := time.After(100 * time.Millisecond)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		for range 4 {
			nc, err := net.DialTimeout("tcp", d.addr, time.Second)
			if err != nil {
				return // which the steady clients tell of
			}
			nc.Write(h)
			clients.Go(func() {
				defer nc.Close()
				<-time.After(30 * time.Millisecond)
			})
		}
		select {
		case <-tick.C:
		case <-over:
			return
		}
	}
}
