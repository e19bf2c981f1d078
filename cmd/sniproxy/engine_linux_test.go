//go:build !portable

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"sniproxy/cmd/internal/epoll"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// With this variable a daemon's loops move relays although they are not busy.
func init() {
	if os.Getenv(impersonate) != "" && os.Getenv("SNIPROXY_TEST_SHARE") != "" {
		epoll.MoveFrom = 0
	}
}

// Goal: relays that keep one loop busy are shared among all loops, even if they began while one
// loop was enough, and lose nothing on the way.
func TestLoopsShareRelays(t *testing.T) {
	const loops = 3
	d := start(t, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "SNIPROXY_TEST_SHARE=1", fmt.Sprintf("GOMAXPROCS=%d", loops))
	})
	d.serve("echo.example", hostdirtest.Echo)
	clients := d.crowd(60, snitest.Hello("echo.example"))
	var over atomic.Bool
	var load sync.WaitGroup
	for i, c := range clients {
		want := randomBytes(100 + i*i*40) // some are bulk
		got := make([]byte, len(want))
		load.Go(func() {
			for !over.Load() {
				go c.Write(want)
				if _, err := io.ReadFull(c, got); err != nil || string(got) != string(want) {
					t.Errorf("what came back is not what was sent, error %v", err)
					return
				}
			}
		})
	}
	hostdirtest.Await(t, "all loops to have worked", func() bool { return t.Failed() || d.workers() >= loops })
	over.Store(true)
	load.Wait()
	for _, c := range clients {
		ping(t, c, c)
	}
}

// workers returns how many threads of the daemon took at least a tenth of a second of
// processor time.
func (d *daemon) workers() (n int) {
	d.t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, stat := range stats {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue // the thread has ended
		}
		// The fields behind the name, which is in parentheses: state is the third of all,
		// the times in user and kernel mode are the 14th and 15th, in hundredths of a second.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		user, _ := strconv.Atoi(f[14-3])
		kernel, _ := strconv.Atoi(f[15-3])
		if user+kernel >= 10 {
			n++
		}
	}
	return n
}

// Goal: relays move to other loops only once no second hello can come, and those that began with an
// encrypted hello lose nothing on the way.
func TestLoopsShareECH(t *testing.T) {
	const loops = 3
	d := startHidden(t, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, "SNIPROXY_TEST_SHARE=1", fmt.Sprintf("GOMAXPROCS=%d", loops))
	})
	l := d.hiddenBackend()
	var asked, relays []*hiddenTalk
	for range 10 {
		k := d.talk(l, nil)
		k.passes("the request", k.backend, k.client, retryRequest)
		asked = append(asked, k)
	}
	for range 40 {
		k := d.talk(l, nil)
		k.passes("the answer", k.backend, k.client, snitest.ServerHello(false))
		relays = append(relays, k)
	}
	var over atomic.Bool
	var load sync.WaitGroup
	for i, k := range relays {
		want := randomBytes(100 + i*i*40) // some are bulk
		got := make([]byte, len(want))
		load.Go(func() {
			for !over.Load() {
				go k.client.Write(want)
				if _, err := io.ReadFull(k.backend, got); err != nil || string(got) != string(want) {
					t.Errorf("what came is not what was sent, error %v", err)
					return
				}
			}
		})
	}
	hostdirtest.Await(t, "all loops to have worked", func() bool { return t.Failed() || d.workers() >= loops })
	for _, k := range asked {
		say(t, k.client, seal(k.sealer, "hidden.example"))
		k.gets(k.backend, "the second hello", innerStream("hidden.example", 3))
		k.passes("what follows", k.client, k.backend, randomBytes(1000))
	}
	over.Store(true)
	load.Wait()
}
