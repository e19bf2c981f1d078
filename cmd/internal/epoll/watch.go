//go:build linux

package epoll

import (
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
)

// A watch finds runners that are stuck. It is awake only while there are look-ups.
type watch struct {
	loops []*loop
	awake atomic.Bool
}

// wakeUp is called with each look-up.
func (w *watch) wakeUp() {
	if !w.awake.Load() && !w.awake.Swap(true) {
		go w.run()
	}
}

func (w *watch) run() {
	seen := make([]check, len(w.loops))
	tick := time.NewTicker(watchPeriod)
	defer tick.Stop()
	for idle := 0; idle < watchIdle; {
		<-tick.C
		if idle++; w.look(seen) {
			idle = 0
		}
	}
	w.awake.Store(false)
	if w.look(seen) {
		w.wakeUp() // one has begun just now
	}
}

// A check is the look-up that a runner was found at, and how often in a row.
type check struct {
	runner *runner
	lookup uint64
	times  int
}

// look replaces runners that are stuck. It reports whether there was any look-up since the last
// time.
func (w *watch) look(seen []check) (some bool) {
	for i, l := range w.loops {
		r := l.runner.Load()
		if r == nil {
			continue
		}
		now := r.lookups.Load()
		same := r == seen[i].runner && now == seen[i].lookup
		some = some || !same || now%2 == 1
		if !same {
			seen[i] = check{runner: r, lookup: now}
		}
		if seen[i].times++; now%2 == 1 && seen[i].times >= watchStuck {
			l.replace(r, now)
		}
	}
	return some
}

// A standby is a runner that is ready to go on with a loop. The loop has one before it looks up
// what is a tenant's: a thread may be hard to get just when one is stuck.
type standby chan *runner // gets the one that is stuck, nil if it is not needed any more

// hire has a standby made for the loop, if it may have one and none is being made.
func (l *loop) hire(may bool) {
	if may && !l.hiring.Swap(true) {
		l.engine.shares.Threads.Extra(l.standBy)
	}
}

// standBy is what the goroutine of a standby does.
func (l *loop) standBy() {
	r, err := newRunner(l.engine.hosts)
	if err != nil {
		report.NoThread(err)
		time.Sleep(shares.ThreadPause)
		l.hiring.Store(false)
		return
	}
	stuck := make(standby)
	l.standby.Store(&stuck)
	l.hiring.Store(false)
	if other := <-stuck; other != nil {
		l.rescue(other, r)
	}
	r.dialer.Close()
}

// replace has the standby go on with the loop in place of r, which is stuck.
func (l *loop) replace(r *runner, lookup uint64) {
	next := l.standby.Swap(nil)
	if next == nil {
		l.hire(true)
		return
	}
	if !r.lookups.CompareAndSwap(lookup, lookup+1) { // it has ended
		if !l.standby.CompareAndSwap(nil, next) { // and the loop has another standby by now
			*next <- nil
		}
		return
	}
	*next <- r
}

// rescue goes on with the loop in place of stuck, in the middle of a round.
func (l *loop) rescue(stuck, r *runner) {
	s := l.engine.shares
	t, entry := stuck.tenant, stuck.entry
	if t == nil { // it does not know yet whose the host is
		t, entry = s.Tenants.Unknown(stuck.name), stuck.name
	}
	q := stuck.conn.ask(stuck.name, stuck.hello, t, string(entry))
	s.Threads.LeaveBehind(&q.Task)
	if stuck.tenant == nil {
		shares.Hold(&stuck.conn.tenant, t) // it may have to wait for room before anybody knows more
	}
	stuck.left <- q
	l.run(r)
}
