package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

const silentClients = 1000

// silentRate returns how many new connections a second silent clients make, all of them
// together. The race detector makes that of the portable engine as much work as one processor
// can do, and what is to be seen here is not a daemon that has no processor.
func silentRate() int {
	if raceEnabled {
		return 1000
	}
	return 4000
}

// flood begins a flood of silent clients, each of which comes back as soon as it is dropped,
// but all of them together silentRate times a second at most. They send the beginnings in turn,
// and no more. count tells how many connections they have made; stop ends the flood, and their
// connections.
func (d *daemon) flood(beginnings ...[]byte) (count func() int64, stop func()) {
	var made atomic.Int64
	tokens := make(chan []byte)
	over, end := context.WithCancel(d.t.Context())
	var clients sync.WaitGroup
	clients.Go(func() {
		perTick := silentRate() / 1000
		tick := time.NewTicker(time.Millisecond) // drops ticks rather than make up for them
		defer tick.Stop()
		for i := 0; ; i++ {
			if i%perTick == 0 {
				<-tick.C
			}
			select {
			case tokens <- beginnings[i%len(beginnings)]:
			case <-over.Done():
				return
			}
		}
	})
	silent := func(beginning []byte) {
		nc, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
		if err != nil {
			return
		}
		c := nc.(*net.TCPConn)
		defer abort(c)
		defer context.AfterFunc(over, func() { c.SetDeadline(time.Now()) })()
		made.Add(1)
		c.Write(beginning)
		io.Copy(io.Discard, c)
	}
	for range silentClients {
		clients.Go(func() {
			for {
				select {
				case beginning := <-tokens:
					silent(beginning)
				case <-over.Done():
					return
				}
			}
		})
	}
	stop = func() {
		end()
		clients.Wait()
	}
	d.t.Cleanup(stop)
	return made.Load, stop
}

// Visits are what became of good clients.
type visits struct {
	mu     sync.Mutex
	served int
	failed []error // of those who were not
	late   int     // that took longer than punctual to send their hello
}

// punctual is how soon after it began to connect a good client has sent its hello. One that
// takes longer, on a machine that has other things to do, the daemon may take for a silent one:
// in a flood it drops those after 60 ms.
const punctual = 20 * time.Millisecond

// visit has n good clients that are punctual come to a host that is served by Greet: a few at
// once, with pauses.
func (d *daemon) visit(name string, n int) *visits {
	const width, pause = 4, 10 * time.Millisecond
	h := snitest.Hello(name)
	var v visits
	var ended atomic.Int64
	late := time.Now().Add(2 * hostdirtest.Patience)
	var clients sync.WaitGroup
	for range width {
		clients.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for ended.Load() < int64(n) && time.Now().Before(late) {
				<-tick.C
				if v.add(d.visitOnce(h, "this is "+name)) {
					ended.Add(1)
				}
			}
		})
	}
	clients.Wait()
	return &v
}

// visitOnce returns how long a good client took to send its hello, and why it was not served.
func (d *daemon) visitOnce(h []byte, want string) (sent time.Duration, err error) {
	begin := time.Now()
	c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(begin.Add(hostdirtest.Patience))
	_, err = c.Write(h)
	sent = time.Since(begin)
	if err != nil {
		return sent, err
	}
	got, err := io.ReadAll(c)
	if err == nil && string(got) != want {
		err = fmt.Errorf("the answer is %q", got)
	}
	return sent, err
}

// add reports whether the client was punctual. Those that were not do not count.
func (v *visits) add(sent time.Duration, err error) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case sent > punctual:
		v.late++
		return false
	case err != nil:
		v.failed = append(v.failed, err)
	default:
		v.served++
	}
	return true
}

// floods runs a test with a daemon that has 256 descriptors and a relay, for one processor and
// for two. When the test is over, the flood that it is to begin must be over too.
func floods(t *testing.T, test func(t *testing.T, d *daemon, expectRelay func())) {
	for _, processors := range []string{"1", "2"} {
		t.Run("GOMAXPROCS="+processors, func(t *testing.T) {
			d := start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS="+processors) }, limitFiles(256))
			d.serve("a.example", hostdirtest.Greet)
			d.serve("echo.example", hostdirtest.Echo)
			relay := d.dial()
			relay.Write(snitest.Hello("echo.example"))
			expectRelay := func() {
				t.Helper()
				ping(t, relay, relay)
			}
			expectRelay()
			base := d.fds()
			test(t, d, expectRelay)
			d.awaitFds(base)
			expectRelay()
			d.expectRest()
			if err := d.greeted("a.example"); err != nil {
				t.Error(err)
			}
		})
	}
}

// awaitFlood waits until a daemon that floods has started has used up its descriptors but for
// those that are free for a moment after it has made room.
func (d *daemon) awaitFlood() {
	d.t.Helper()
	hostdirtest.Await(d.t, "the daemon to run out of descriptors", func() bool { return d.allFds() >= 250 })
}

// visitDuring visits a host as n good clients during a flood, beside the relay, which must survive
// it.
func (d *daemon) visitDuring(n int, count func() int64, expectRelay func()) (during *visits) {
	d.t.Helper()
	made := count()
	visited := make(chan *visits, 1)
	go func() { visited <- d.visit("a.example", n) }()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for during == nil {
		select {
		case <-tick.C:
			expectRelay()
		case during = <-visited:
		}
	}
	d.t.Logf("during %d connections of the flood: %d good clients served, %d not, %d sent their hello late",
		count()-made, during.served, len(during.failed), during.late)
	return during
}

// Goal: with 256 descriptors, 1,000 silent clients that come back whenever they are dropped, 4,000
// times a second, lock out nobody: at least 99 % of good clients are served, and a relay survives.
func TestFlood(t *testing.T) {
	floods(t, func(t *testing.T, d *daemon, expectRelay func()) {
		h := snitest.Hello("a.example")
		count, stop := d.flood(nil, h[:1], h[:bytes.Index(h, []byte("a.example"))])
		d.awaitFlood()
		during := d.visitDuring(800, count, expectRelay)
		stop()

		failed, all := len(during.failed), len(during.failed)+during.served
		such := errors.Join(during.failed[:min(5, failed)]...)
		switch {
		case failed*100 > all:
			t.Errorf("%d of %d good clients were not served, such as: %v", failed, all, such)
		case failed > 0:
			t.Logf("those not served: %v", such)
		}
	})
}

// Goal: a daemon that had no processor for a while comes back to more clients than it has
// descriptors for. It serves the good ones among them, whose hellos are all there; the portable
// engine serves most, since it may make room before the system lets a goroutine look for its hello.
func TestFloodBacklog(t *testing.T) {
	floods(t, func(t *testing.T, d *daemon, _ func()) {
		count, stop := d.flood(nil)
		d.awaitFlood()
		d.signal(syscall.SIGSTOP)
		more := func(n int64) {
			t.Helper()
			made := count()
			hostdirtest.Await(t, "more silent clients", func() bool { return count() >= made+n })
		}
		more(100)
		good := d.crowd(20, snitest.Hello("a.example"))
		more(300)
		d.signal(syscall.SIGCONT)
		dropped := 0
		for _, c := range good {
			switch got, err := io.ReadAll(c); {
			case err != nil || len(got) > 0 && string(got) != "this is a.example":
				t.Errorf("the answer is %q, error %v", got, err)
			case len(got) == 0:
				dropped++
			}
			c.Close()
		}
		if most := len(good) / 4; dropped > most || dropped > 0 && !isPortable(t) {
			t.Errorf("%d of %d were dropped", dropped, len(good))
		}
		stop()
	})
}
