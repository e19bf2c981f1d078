package main

import (
	"sync/atomic"

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
}

func newLogAll(hosts *hostdir.Hosts) *logAll {
	a := &logAll{ask: make(chan struct{}, 1)}
	go func() {
		for range a.ask {
			if yes, err := hosts.LogAll(); err == nil {
				a.yes.Store(yes)
			}
			a.again.Store(now() + int64(logAllPeriod))
			a.asking.Store(false)
		}
	}()
	return a
}

// logs tells whether a connection that begins at t is logged, and if not, whether it may be: the answer may be
// out of date, and is known when the connection ends.
func (a *logAll) logs(t int64) (yes, maybe bool) {
	if t >= a.again.Load() && !a.asking.Swap(true) {
		a.ask <- struct{}{}
	}
	maybe = a.asking.Load()
	yes = a.yes.Load()
	return yes, maybe && !yes
}
