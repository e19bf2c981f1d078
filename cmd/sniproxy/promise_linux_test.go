package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// inside has the daemon enter its hosts directory by itself. Starting a process in a directory that
// this one has to answer for can take the only processor.
func inside(cmd *exec.Cmd) {
	cmd.Args = []string{"sh", "-c", fmt.Sprintf(`cd '%s' && exec "$0"`, cmd.Dir), cmd.Path}
	cmd.Path, cmd.Dir = "/bin/sh", "/"
}

// Goal: on a hosts directory in a slow file system, where look-ups go on without the loop that
// began them, every client gets to the host that it asked for.
func TestPromiseSlowHosts(t *testing.T) {
	t.Parallel()
	const clients = 60
	words := []string{"foo", "bar", "baz"}
	hostdirtest.OwnMounts(t)
	hosts := hostdirtest.Dir(t)
	fs := hostdirtest.MountUserFS(t, hosts, unix.S_IFDIR)
	fs.Delay = 200 * time.Millisecond
	elsewhere := hostdirtest.Dir(t)
	for _, word := range words {
		hostdirtest.Serve(t, hostDir(elsewhere, word), saying(word))
		fs.Add(hostdirtest.RootNode, hostDir("", "*."+word+".example"), unix.S_IFLNK|0o777, hostDir(elsewhere, word))
	}
	fs.Serve(0)
	d := startOn(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hosts, inside)
	// They come during the look-ups of those before, with a hello that begins like theirs.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			word := words[i*7%5%len(words)]
			got, err := d.exchange(snitest.Hello(fmt.Sprintf("c%d.%s.example", i, word)))
			if err != nil || string(got) != word {
				t.Errorf("a client that asked for *.%s.example got %q, error %v", word, got, err)
			}
		})
		<-tick.C
	}
	all.Wait()
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
}

// leadAstray makes * root's symlink to a tenant's directory, with a marker of root's in it that has
// the connections of all hosts logged, and has one logged. Then the tenant puts a symlink into a
// stuck file system in the place of its directory.
func (d *daemon) leadAstray(t *testing.T) *hostdirtest.UserFS {
	t.Helper()
	d.serve("one.example", hostdirtest.Greet)
	d.give("one.example", greedy)
	hostdirtest.Touch(t, d.hostPath("one.example", "log-connections"))
	symlink(t, hostDir("", "one.example"), d.hostDir("*"))
	d.awaitLogging("victim.example", true)
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	hostdirtest.Must(t, os.Rename(d.hostDir("one.example"), filepath.Join(d.dir, "old")))
	symlink(t, filepath.Join(fs.Dir, "x"), d.hostDir("one.example"))
	return fs
}

// logs tells whether the connection of a client that asks for a host served by Greet is logged.
func (d *daemon) logs(name string) bool {
	d.t.Helper()
	c := d.dial()
	say(d.t, c, snitest.Hello(name))
	if got, err := io.ReadAll(c); err != nil || string(got) != "this is "+name {
		d.t.Errorf("got %q, error %v", got, err)
	}
	addr := c.LocalAddr().String()
	c.Close()
	// What is printed after the connection has ended comes behind the line about it.
	hostdirtest.Await(d.t, "the connection to end", func() bool { return d.counters().open == 0 })
	d.counters()
	return strings.Contains(d.err.String(), "served "+addr+" ")
}

// awaitLogging waits until connections are logged, or are not.
func (d *daemon) awaitLogging(name string, want bool) {
	d.t.Helper()
	hostdirtest.Await(d.t, fmt.Sprintf("logging of all hosts to be %v", want), func() bool { return d.t.Failed() || d.logs(name) == want })
}

// Goal: when * leads to a tenant's directory, and that into a file system that never answers, only
// clients that ask for * notice. Connections of all hosts are logged as before.
func TestPromiseLogAllStuck(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	for _, signals := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d signals", signals), func(t *testing.T) {
			t.Parallel()
			hostdirtest.OwnMounts(t)
			d := start(t)
			d.serve("victim.example", hostdirtest.Greet)
			d.leadAstray(t)
			h := snitest.Hello("victim.example")
			unknown := d.ask(1, "unknown.example")
			for i := range 200 {
				got, err := d.exchangeWithin(h, limits.Hello/2)
				if err != nil || string(got) != "this is victim.example" {
					t.Errorf("client %d of another host: got %q, error %v", i, got, err)
					break
				}
			}
			if !t.Failed() {
				if signals == 1 {
					expectTold(t, unknown, 1, "alert 90")
				}
				hostdirtest.Await(t, "200 connections to be logged", func() bool { return strings.Count(d.err.String(), "served ") >= 200 })
			}
			d.signal(syscall.SIGTERM)
			if signals == 2 {
				d.out.Await(t, "shutting down")
				d.cmd.Process.Signal(syscall.SIGTERM) // unless the client's time was over, and so the daemon's
			}
			if status := d.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
			// It is told which came first.
			if cut := strings.Contains(d.err.String(), "cut what was still open after"); cut && signals == 2 {
				t.Error("the second signal did not end it")
			}
		})
	}
}

// Goal: while connections come, the daemon soon notices that a marker in * is made or removed,
// without a restart.
func TestPromiseLogAllNoticed(t *testing.T) {
	t.Parallel() // it waits for the marker to be noticed
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	marker := d.hostPath("*", "log-connections")
	if d.logs("a.example") {
		t.Error("a connection is logged that is not to be")
	}
	for range 2 {
		hostdirtest.Touch(t, marker)
		d.awaitLogging("a.example", true)
		hostdirtest.Must(t, os.Remove(marker))
		d.awaitLogging("a.example", false)
	}
}

// Goal: connections of all hosts are logged even while silent clients keep descriptors short.
func TestPromiseLogAllShort(t *testing.T) {
	t.Parallel()
	d := start(t, limitFiles(64))
	d.serve("a.example", hostdirtest.Greet)
	l := d.host("long.example")
	d.logAll()
	d.awaitLogging("a.example", true)
	base := d.fds()
	silent := d.crowd(60, nil)
	d.err.Await(t, "to make room: no descriptor is left")
	var clients []*net.TCPConn
	for range 10 {
		silent = append(silent, d.crowd(20, nil)...)
		client, backend := d.pair(l, "long.example")
		ping(t, client, backend)
		clients = append(clients, client)
		go func() {
			io.Copy(io.Discard, backend)
			backend.Close()
		}()
		silent = append(silent, d.crowd(20, nil)...)
		<-time.After(50 * time.Millisecond) // longer than any answer may be relied upon
	}
	for _, c := range append(silent, clients...) {
		c.Close()
	}
	d.awaitFds(base)
	d.awaitLogging("a.example", true)
	for i, c := range clients {
		if !strings.Contains(d.err.String(), "served "+c.LocalAddr().String()+" ") {
			t.Errorf("client %d is not in the log", i)
		}
	}
}

// Goal: in a user namespace that knows nobody but the daemon, everybody else seems to be one user.
// The daemon does not take that user for the administrator: neither wildcards nor log markers of
// tenants count. A line at the start says to whom the hosts directory seems to belong.
func TestPromiseUserNamespace(t *testing.T) {
	hostdirtest.NeedRoot(t)
	hosts := hostdirtest.Dir(t)
	for _, name := range []string{"*.shop.example", "evil.example"} {
		hostdirtest.Serve(t, hostDir(hosts, name), hostdirtest.Greet)
		hostdirtest.Touch(t, hostPath(t, hosts, name, "log-connections"))
		for _, path := range []string{hostDir(hosts, name), hostPath(t, hosts, name, "log-connections")} {
			hostdirtest.Must(t, os.Chown(path, greedy, greedy))
		}
	}
	hostdirtest.Must(t, os.Chmod(hosts, 0o777|os.ModeSticky))
	const uid = 64999
	self := ordinaryUser(t)
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	attr := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
		Credential:  &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true},
	}
	if err := (&exec.Cmd{Path: hostdirtest.Need(t, "true"), SysProcAttr: attr}).Run(); err != nil {
		t.Skipf("no user namespace: %v", err)
	}
	d := startOn(t, l, hosts, self, func(cmd *exec.Cmd) { cmd.SysProcAttr = attr })
	if err := d.greeted("evil.example"); err != nil {
		t.Error(err)
	}
	d.expectAlert(snitest.Hello("www.shop.example"), 112)
	d.signal(syscall.SIGTERM)
	d.expectExit(0)
	text := d.err.String()
	if strings.Contains(text, "served ") {
		t.Error("a tenant's marker has connections logged")
	}
	first, _, _ := strings.Cut(text, "\n")
	if !strings.Contains(first, "hosts directory") || !strings.Contains(first, "user namespace") {
		t.Errorf("the first line is %q, want one about the owner of the hosts directory in the user namespace", first)
	}
}

// Goal: a tenant may rename what root has put into its directory into the hosts directory. That
// makes no wildcard: an entry that is neither a directory nor a symlink is none, whoever owns it,
// and the next wildcard serves.
func TestPromiseMovedMarker(t *testing.T) {
	hostdirtest.NeedRoot(t)
	for what, do := range map[string]func(path string) error{
		"marker": func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"FIFO":   func(path string) error { return unix.Mkfifo(path, 0o644) },
		"socket": func(path string) error { return bindUnix(path, unix.SOCK_STREAM) },
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))) },
	} {
		t.Run(what, func(t *testing.T) {
			d := start(t)
			d.serve("default.example", saying("default"))
			symlink(t, hostDir("", "default.example"), d.hostDir("*"))
			d.serve("evil.example", hostdirtest.Greet)
			d.give("evil.example", greedy)
			moved := d.hostPath("evil.example", "log-connections")
			if err := do(moved); err != nil {
				t.Skip(err)
			}
			expectWord(t, d, "www.shop.example", "default")
			hostdirtest.Must(t, os.Rename(moved, d.hostDir("*.shop.example")))
			expectWord(t, d, "www.shop.example", "default")
			hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
			d.expectAlert(snitest.Hello("www.shop.example"), 112)
			// An entry of that very name is another matter: it is there, and cannot serve.
			symlink(t, hostDir("", "default.example"), d.hostDir("*"))
			hostdirtest.Must(t, os.Rename(d.hostDir("*.shop.example"), d.hostDir("*")+"~"))
			hostdirtest.Must(t, os.Rename(d.hostDir("*")+"~", d.hostDir("www.shop.example")))
			d.expectAlert(snitest.Hello("www.shop.example"), 112)
		})
	}
}
