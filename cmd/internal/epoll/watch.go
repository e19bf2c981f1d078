//go:build !portable

package main

import (
	"slices"
	"sync/atomic"
	"time"
)

// A watch finds runners that are stuck. It is awake only while there are look-ups.
type watch struct {
	engine  *engine
	awake   atomic.Bool
	start   chan struct{}
	runners []atomic.Pointer[runner] // of each loop
}

func newWatch(e *engine) *watch {
	w := &watch{engine: e, start: make(chan struct{}, 1), runners: make([]atomic.Pointer[runner], len(e.loops))}
	go w.run()
	return w
}

// wakeUp is called with each look-up.
func (w *watch) wakeUp() {
	if !w.awake.Load() && !w.awake.Swap(true) {
		w.start <- struct{}{}
	}
}

func (w *watch) run() {
	seen := make([]sighting, len(w.runners))
	for range w.start {
		tick := time.NewTicker(watchPeriod)
		for idle := 0; idle < watchIdle; {
			<-tick.C
			if idle++; w.look(seen) {
				idle = 0
			}
		}
		tick.Stop()
		w.awake.Store(false)
		if w.look(seen) {
			w.wakeUp() // one has begun just now
		}
	}
}

// A sighting is the look-up that a runner was seen at, and how often in a row.
type sighting struct {
	lookup uint64
	times  int
}

// look has runners replaced that are stuck. It reports whether there was any look-up since the last time.
func (w *watch) look(seen []sighting) (some bool) {
	for i := range w.runners {
		r := w.runners[i].Load()
		if r == nil {
			continue
		}
		now := r.lookups.Load()
		some = some || now != seen[i].lookup || now%2 == 1
		if now != seen[i].lookup {
			seen[i] = sighting{lookup: now}
		}
		if seen[i].times++; now%2 == 1 && seen[i].times >= watchStuck {
			w.engine.loops[i].replace(r, now)
		}
	}
	return some
}

// A relief is a runner that stands by to go on with a loop. There is one before the loop looks up what is a
// tenant's, so that a thread need not be had just when one is stuck.
type relief chan *runner // gets the one that is stuck

// wantRelief has a relief made for the loop, if it may have one and none is being made.
func (l *loop) wantRelief(may bool) {
	if may && !l.wanted.Swap(true) {
		l.engine.threads.more <- l.standBy
	}
}

func (l *loop) standBy() {
	next, err := newRunner(l.engine)
	if err != nil {
		complainThread(err)
		time.Sleep(threadPause)
		l.wanted.Store(false)
		return
	}
	stuck := make(relief)
	l.relief.Store(&stuck)
	l.wanted.Store(false)
	l.rescue(<-stuck, next)
}

// replace has the relief go on with the loop in place of r, which is stuck.
func (l *loop) replace(r *runner, lookup uint64) {
	next := l.relief.Swap(nil)
	if next == nil {
		l.wantRelief(true)
		return
	}
	if !r.lookups.CompareAndSwap(lookup, lookup+1) { // it has ended
		l.relief.Store(next)
		return
	}
	*next <- r
}

// rescue goes on with the loop in place of r.
func (l *loop) rescue(r, next *runner) {
	k := &lookup{loop: l, conn: r.conn, name: slices.Clone(r.name)}
	if r.tenant != nil {
		k.tenant, k.entry = r.tenant, string(r.entry)
		l.engine.leaveBehind(&k.task)
	} else { // it was stuck before it knew whose the host is
		k.tenant, k.entry = l.engine.tenants.get(0, r.name), string(r.name)
		l.engine.leaveBehind(&k.task)
		k.tenant.release()
	}
	l.keep(r.conn, lookingUp, r.name, r.hello)
	r.conn.early.lookup = k
	r.lost <- k
	l.runWith(next)
}

// leaveBehind counts a thread that is stuck with a task.
func (e *engine) leaveBehind(k *task) {
	k.tenant.hung.Add(1)
	e.behind.Add(1)
	s := e.threads
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enter(k)
	s.begin(k)
}

// comeBack counts a thread that was left behind, and has ended its task.
func (e *engine) comeBack(k *task) {
	k.tenant.untrusted.Store(now() + int64(distrustTime))
	k.tenant.hung.Add(-1)
	e.behind.Add(-1)
	e.threads.end(k)
}

func (l *loop) setRunner(r *runner) {
	l.runner = r
	l.engine.watch.runners[l.index].Store(r)
}
