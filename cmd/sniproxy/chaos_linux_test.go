package main

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

func init() {
	chaosActors = []func(*chaos){
		func(ch *chaos) {
			ch.hosts = append(ch.hosts[:len(ch.hosts):len(ch.hosts)], chaosHost{"passing.example", careless})
			ch.actors = append(ch.actors, ch.pass)
		},
		func(ch *chaos) {
			if os.Geteuid() != 0 {
				ch.t.Log("without file systems in user space, which only root can mount here")
				return
			}
			hostdirtest.OwnMounts(ch.t)
			ch.hosts = append(ch.hosts, chaosHost{"stuck.example", maybe}, chaosHost{"*.stuck.example", maybe},
				chaosHost{"exchanged.example", maybe}, chaosHost{"slow.example", maybe}, chaosHost{"*.slow.example", maybe})
			ch.actors = append(ch.actors, ch.stick, ch.dawdle)
		},
	}
}

// pass has a backend pass descriptors.
func (ch *chaos) pass() (stop func()) {
	l := hostdirtest.Listen(ch.t, hostDir(ch.daemons[0].dir, "passing.example"))
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if rand.IntN(2) == 0 {
					c.SetDeadline(time.Now().Add(rand.N(time.Second)))
					c.Read(make([]byte, rand.IntN(2000)))
				}
				fds := make([]int, 1+rand.IntN(mostPassed))
				for range rand.IntN(4) {
					// They are all of standard input, which somebody else has, too.
					if passTo(c, make([]byte, 1+rand.IntN(100)), 0, fds...) != nil {
						break
					}
				}
				if rand.IntN(2) == 0 {
					c.SetDeadline(time.Now().Add(rand.N(time.Second))) // the client may wait for the end
					io.Copy(io.Discard, c)
				}
			}()
		}
	}()
	return func() { l.Close() }
}

// stick has hosts lead into a file system that never answers: an entry, a wildcard, and a socket
// that takes turns with a symlink. They are a tenant's but for the wildcard, which would not count.
func (ch *chaos) stick() (stop func()) {
	d := ch.daemons[0]
	fs := hostdirtest.MountUserFS(ch.t, hostdirtest.Dir(ch.t), unix.S_IFDIR)
	for _, name := range []string{"stuck.example", "*.stuck.example"} {
		symlink(ch.t, filepath.Join(fs.Dir, "x"), d.hostDir(name))
	}
	d.give("stuck.example", greedy)
	ch.serve(d.dir, "exchanged.example", "exchanged.example", false)
	d.give("exchanged.example", modest)
	socket, link := d.hostPath("exchanged.example", "tls-socket"), d.hostPath("exchanged.example", "link")
	symlink(ch.t, filepath.Join(fs.Dir, "x"), link)
	over := make(chan struct{})
	var tenant sync.WaitGroup
	tenant.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			for range 1 + rand.IntN(50) {
				if err := swap(socket, link); err != nil {
					ch.t.Error(err)
				}
			}
			select {
			case <-tick.C:
			case <-over:
				return
			}
		}
	})
	return func() {
		close(over)
		tenant.Wait()
		fs.Abort()
		for _, name := range []string{"stuck.example", "*.stuck.example", "exchanged.example"} {
			if err := os.RemoveAll(d.hostDir(name)); err != nil {
				ch.t.Error(err)
			}
		}
	}
}

// dawdle has hosts on a file system that takes its time.
func (ch *chaos) dawdle() (stop func()) {
	d := ch.daemons[0]
	fs := hostdirtest.MountUserFS(ch.t, hostdirtest.Dir(ch.t), unix.S_IFDIR)
	fs.Delay = 20 * time.Millisecond
	sub := fs.Add(hostdirtest.RootNode, "sub", unix.S_IFDIR|0o755, "")
	entries := []string{"slow.example", "*.slow.example"}
	for i, entry := range entries {
		dir := string(rune('a' + i))
		fs.Add(sub, dir, unix.S_IFDIR|0o755, "")
		if i == 0 {
			fs.Serve(0)
		}
		hostdirtest.Serve(ch.t, filepath.Join(fs.Dir, "sub", dir), ch.backend(entry, false))
		symlink(ch.t, filepath.Join(fs.Dir, "sub", dir), d.hostDir(entry))
	}
	return func() {
		for _, entry := range entries {
			os.Remove(d.hostDir(entry))
		}
		fs.Abort()
	}
}
