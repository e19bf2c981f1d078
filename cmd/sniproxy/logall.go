package main

import (
	"sync"
	"sync/atomic"
	"time"

	"sniproxy/hostdir"
)

// A logAll knows whether the connections of all hosts are logged: whether there is a log-connections of the
// administrator's in the directory *. To look there may take any time, since what a symlink of the administrator's
// leads to is the tenant's all the same. So a goroutine does that, once in logAllPeriod while there are connections, and
// nobody waits for it. If it cannot find out, the last answer stays.
type logAll struct {
	yes    atomic.Bool
	asking atomic.Bool
	again  atomic.Int64 // when to ask again, by the clock of now
	ask    chan struct{}

	mu    sync.Mutex
	lines []func() // of connections that have ended before it was known whether they are logged
}

func newLogAll(hosts *hostdir.Hosts) *logAll {
	a := &logAll{ask: make(chan struct{}, 1)}
	go func() {
		for range a.ask {
			if yes, err := hosts.LogAll(); err == nil {
				a.yes.Store(yes)
			}
			a.again.Store(now() + int64(logAllPeriod))
			a.mu.Lock()
			a.asking.Store(false)
			lines := a.lines
			a.lines = nil
			a.mu.Unlock()
			for _, print := range lines {
				if a.yes.Load() {
					print()
				}
			}
		}
	}()
	return a
}

// await waits a moment until it is known, for a program that ends with its one connection.
func (a *logAll) await() {
	a.logs(now())
	for late := time.After(logAllPatience); a.asking.Load(); {
		select {
		case <-time.After(time.Millisecond):
		case <-late:
			return
		}
	}
}

// logs tells whether a connection that begins at t is logged, and if not, whether it may be: that is being found out.
func (a *logAll) logs(t int64) (yes, maybe bool) {
	if t >= a.again.Load() && !a.asking.Swap(true) {
		a.ask <- struct{}{}
	}
	maybe = a.asking.Load()
	yes = a.yes.Load()
	return yes, maybe && !yes
}

// ifYes calls print if all connections are logged, once that is known. Few have to wait for that: if it takes long, others
// go by the last answer.
func (a *logAll) ifYes(print func()) {
	a.mu.Lock()
	if a.asking.Load() && len(a.lines) < logAllLines {
		a.lines = append(a.lines, print)
		a.mu.Unlock()
		return
	}
	a.mu.Unlock()
	if a.yes.Load() {
		print()
	}
}
