package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: where the system forbids a thread a working directory of its own, hosts, markers, wildcards
// and symlinks work as elsewhere. One line at the start says what is forbidden, and that this
// limits the length of names.
func TestDenyUnshare(t *testing.T) {
	d := start(t, deny("unshare"))
	d.serve("a.example", hostdirtest.Greet)
	d.serve("marked.example", greetBehindHeader)
	hostdirtest.Touch(t, d.hostPath("marked.example", "send-proxy-v1"))
	d.serve("*.wild.example", hostdirtest.Greet)
	d.serve("*", hostdirtest.Greet)
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "x"), hostdirtest.Greet)
	symlink(t, hostDir(elsewhere, "x"), d.hostDir("linked.example"))
	symlink(t, hostDir("", "a.example"), d.hostDir("near.example"))
	for _, name := range []string{"a.example", "b.wild.example", "a.b.wild.example", "linked.example", "near.example"} {
		if err := d.greeted(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	expectTold(t, d.ask(1, "marked.example"), 1, `"this is marked.example behind a header"`)
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
	d.expectAlert(snitest.Hello("absent.example"), 112)

	d.signal(unix.SIGTERM)
	d.expectExit(0)
	if isPortable(t) {
		return // it does without
	}
	told := regexp.MustCompile(`(?m)^sniproxy: .*unshare.*sun_path.*$`).FindAllString(d.err.String(), -1)
	if len(told) != 1 || !strings.HasPrefix(d.err.String(), told[0]) {
		t.Errorf("of unshare and sun_path these lines tell: %q, want one, before all others", told)
	}
}

// Goal: where that is forbidden, a tenant who replaces its symlink all the time, while clients ask
// for it, keeps no other host from being served, and costs no thread.
func TestDenyUnshareSwitched(t *testing.T) {
	t.Parallel()
	d := start(t, deny("unshare"), oneLoop)
	d.serve("victim.example", hostdirtest.Greet)
	for _, name := range []string{"a", "b"} {
		d.serve(name, hostdirtest.Greet)
	}
	hostdirtest.Must(t, d.greeted("victim.example"))
	threads := d.threads()
	var over atomic.Bool
	var tenant sync.WaitGroup
	defer tenant.Wait()
	defer over.Store(true)
	tenant.Go(func() {
		tick := time.NewTicker(4 * time.Millisecond)
		defer tick.Stop()
		next, link := filepath.Join(d.dir, "next"), d.hostDir("evil.example")
		for i := 0; !over.Load(); i++ {
			<-tick.C
			symlink(t, hostDir("", string("ab"[i%2])), next)
			if err := os.Rename(next, link); err != nil {
				t.Error(err)
				return
			}
		}
	})
	hostdirtest.Await(t, "the first symlink", func() bool {
		_, err := os.Lstat(d.hostDir("evil.example"))
		return err == nil
	})
	told := d.ask(100, "evil.example")
	stop := d.steady("victim.example")
	most := 0
	for range 100 {
		// Whether a client of it is served is a matter of luck. That it waits as long as one
		// may wait is not.
		<-told
		most = max(most, d.threads())
	}
	stop()
	if limit := threads + limits.TasksOfEntry + 8; !isPortable(t) && most > limit {
		t.Errorf("the daemon had %d threads, and %d before, want at most %d", most, threads, limit)
	}
}

// Goal: where that is forbidden, no more look-ups are stuck in a file system than elsewhere: 4 for
// an entry, whatever names clients ask for. Other hosts are served, wherever they are.
func TestDenyUnshareStuck(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	d := start(t, deny("unshare"))
	d.serve("good.example", hostdirtest.Greet)
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "x"), hostdirtest.Greet)
	symlink(t, hostDir(elsewhere, "x"), d.hostDir("linked.example"))
	base := d.fds()
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir("*.stuck.example"))
	symlink(t, filepath.Join(fs.Dir, "y"), d.hostDir("stuck.example"))
	stops := []func(){d.steady("good.example"), d.steady("linked.example")}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	entry, wildcard := d.ask(20, "stuck.example"), d.askEach(20, func(i int) string { return fmt.Sprintf("a%d.stuck.example", i) })
	for _, clients := range []<-chan string{entry, wildcard} {
		expectTold(t, clients, 20-stuckPerHost, "alert 80")
		expectTold(t, clients, stuckPerHost, "alert 90")
	}
	for _, stop := range stops {
		stop()
	}
	fs.Abort()
	d.awaitFds(base)
	d.signal(unix.SIGTERM)
	d.expectExit(0)
}
