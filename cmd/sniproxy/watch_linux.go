//go:build !portable

package main

import (
	"runtime"
	"sync/atomic"
	"time"

	"sniproxy/hostdir"
)

// A runner is a goroutine, with a thread of its own, that runs a loop. It can be stuck in a
// look-up after all: a tenant can exchange a socket for a symlink to a file system that does not
// answer, just between the moment when it is looked at and the moment when it is connected to.
// Then the loop gets another runner, and the first has just that look-up left.
type runner struct {
	dialer *hostdir.Dialer

	// Odd while a look-up is made. To go on with the loop after one is to make it even.
	lookups atomic.Uint64
	conn    *conn // that it is for
	name    []byte
	hello   []byte
	lost    chan *lookup // gets it, if the loop went on without this runner
}

func newRunner(e *engine) *runner {
	runtime.LockOSThread() // for good, as the dialer wants it
	r := &runner{dialer: hostdir.NewDialer(), lost: make(chan *lookup, 1)}
	r.dialer.Distrusted = &e.watch.distrusted
	return r
}

func (r *runner) end() { r.dialer.Close() }

// dialNow connects to a backend without waiting for a file system, as far as that can be known
// beforehand.
func (l *loop) dialNow(c *conn, name, hello []byte) (fd int, marks hostdir.Marks, err error) {
	r := l.runner
	r.conn, r.name, r.hello = c, name, hello
	this := r.lookups.Add(1)
	l.engine.watch.wakeUp()
	fd, marks, err = r.dialer.DialNow(name)
	if !r.lookups.CompareAndSwap(this, this+1) {
		k := <-r.lost
		k.fd, k.marks, k.err = fd, marks, err
		k.loop.engine.lookups.end(k.name)
		k.deliver()
		runtime.Goexit()
	}
	return fd, marks, err
}

// rescue goes on with the loop in place of a runner that is stuck.
func (l *loop) rescue(r *runner) {
	next := newRunner(l.engine)
	k := &lookup{loop: l, conn: r.conn, name: string(r.name)}
	l.engine.lookups.adopt(k)
	l.keep(r.conn, lookingUp, r.name, r.hello)
	r.conn.early.lookup = k
	r.lost <- k
	l.runWith(next)
}

func (l *loop) setRunner(r *runner) {
	l.runner = r
	l.engine.watch.runners[l.index].Store(r)
}

// A watch finds runners that are stuck. It is awake only while there are look-ups.
type watch struct {
	engine     *engine
	awake      atomic.Bool
	start      chan struct{}
	runners    []atomic.Pointer[runner] // of each loop
	distrusted hostdir.Owners           // of directories where a runner was stuck
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
	seen := make([]sight, len(w.runners))
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

// A sight is the look-up that a runner was seen at, and how often in a row.
type sight struct {
	lookup uint64
	times  int
}

// look has runners replaced that are stuck. It reports whether there was any look-up since the
// last time.
func (w *watch) look(seen []sight) (some bool) {
	for i := range w.runners {
		r := w.runners[i].Load()
		if r == nil {
			continue
		}
		now := r.lookups.Load()
		some = some || now != seen[i].lookup || now%2 == 1
		if now != seen[i].lookup {
			seen[i] = sight{lookup: now}
		}
		if seen[i].times++; now%2 == 1 && seen[i].times >= watchStuck {
			w.replace(w.engine.loops[i], r, now)
		}
	}
	return some
}

func (w *watch) replace(l *loop, r *runner, lookup uint64) {
	owner, ok := r.dialer.Owner()
	if !r.lookups.CompareAndSwap(lookup, lookup+1) {
		return // it has ended
	}
	if ok {
		w.distrusted.Add(owner, distrustTime)
	}
	go l.rescue(r)
}
