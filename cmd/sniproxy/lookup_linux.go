//go:build !portable

package main

import (
	"runtime"
	"slices"
	"sync/atomic"

	"sniproxy/hostdir"
)

// A runner is a goroutine, with a thread of its own, that runs a loop and makes the look-ups of its
// connections, as far as they wait for nothing. It can be stuck in one all the same: a tenant can exchange a
// socket for a symlink to a file system that does not answer, just between the moment when it is looked at
// and the moment when it is connected to. Then another runner goes on with the loop, and this one has just
// that look-up left. So all that a look-up works with is the runner's own.
type runner struct {
	dialer *hostdir.Dialer

	// Odd during a look-up. Whoever moves it from odd to even owns the loop.
	lookups atomic.Uint64
	lost    chan *lookup // gets the look-up, if the loop went on without this runner

	name   []byte
	entry  []byte  // that serves it, and whose that is, once they are found
	tenant *tenant // otherwise nil

	// For whoever goes on with the loop.
	conn  *conn
	hello []byte
}

// newRunner returns a runner for the calling goroutine, which has its thread for good.
func newRunner(e *engine) (*runner, error) {
	runtime.LockOSThread()
	dialer, err := e.hosts.NewDialer()
	if err != nil {
		return nil, err
	}
	return &runner{dialer: dialer, lost: make(chan *lookup, 1)}, nil
}

func (r *runner) end() { r.dialer.Close() }

// A lookup is one that another thread makes for a connection of a loop.
type lookup struct {
	task
	loop *loop
	conn *conn // nil if that has ended; the loop's
	name []byte

	backend hostdir.Backend
	found   *tenant // whose entry it was that served the name
	err     error
}

// dial connects to the backend, and begins the relay. Hello is all that was read so far, behind headroom.
func (l *loop) dial(c *conn, name, hello []byte) {
	r, room := l.runner, l.engine.room
	r.name = append(r.name[:0], name...)
	r.conn, r.hello, r.tenant = c, hello, nil

	entry, err := l.find()
	for noRoom(err) && room.forRelay(l, c, nil, true) {
		entry, err = l.find()
	}
	if err != nil && !mayWait(err) {
		l.dialled(c, name, hello, hostdir.Backend{}, err)
		return
	}
	t := l.engine.tenants.of(entry)
	c.belongTo(t)
	switch {
	case t.clogged():
		l.refuse(c, name, errClogged)
		return
	case !room.forRelay(l, c, t, false):
		l.wait(c, t.key(), errNoRoom, name, hello)
		return
	case err != nil || !l.mayConnect(t, entry):
		l.lookUp(c, t, entry.Name, name, hello)
		return
	}

	r.entry, r.tenant = entry.Name, t
	b, err := l.connect()
	for noRoom(err) && room.forRelay(l, c, t, true) {
		b, err = l.connect()
	}
	if mayWait(err) {
		l.lookUp(c, t, entry.Name, name, hello)
		return
	}
	l.dialled(c, name, hello, b, err)
}

// find finds the entry for what the runner is to look up. Like connect it does not return if the loop goes on with another
// runner meanwhile.
func (l *loop) find() (hostdir.Entry, error) {
	r := l.runner
	this := l.beginLookup()
	entry, err := r.dialer.Find(r.name, false)
	if !r.lookups.CompareAndSwap(this, this+1) {
		r.finish(entry, hostdir.Backend{}, err)
	}
	return entry, err
}

// connect connects to the backend of the entry that was found.
func (l *loop) connect() (hostdir.Backend, error) {
	r := l.runner
	this := l.beginLookup()
	b, err := r.dialer.Connect(false)
	if !r.lookups.CompareAndSwap(this, this+1) {
		r.finish(hostdir.Entry{}, b, err)
	}
	return b, err
}

func mayWait(err error) bool { return err == hostdir.MayWait }

// beginLookup begins a look-up of the loop's runner.
func (l *loop) beginLookup() uint64 {
	this := l.runner.lookups.Add(1)
	l.engine.watch.wakeUp()
	return this
}

// finish is for a runner that was given up in a look-up. If that was to find the entry, what it has come to is entry and
// err, and the runner goes on from there; if it was to connect, that has come to b and err. It does not return.
func (r *runner) finish(entry hostdir.Entry, b hostdir.Backend, err error) {
	k := <-r.lost
	switch {
	case r.tenant == nil && err == nil:
		k.found = k.loop.engine.tenants.of(entry)
		k.backend, k.err = r.dialer.Connect(true)
	case r.tenant == nil && mayWait(err):
		k.connect(r.dialer)
	default:
		k.backend, k.err = b, err
	}
	k.loop.engine.comeBack(&k.task)
	k.deliver()
	runtime.Goexit()
}

// mayConnect tells whether the loop may connect to a backend itself.
func (l *loop) mayConnect(t *tenant, entry hostdir.Entry) bool {
	switch {
	case !t.trusted():
		return false
	case entry.Foreign && l.relief.Load() == nil:
		l.wantRelief(l.engine.behind.Load() <= behindMost)
		return false
	}
	return true
}

// lookUp has the host of c looked up by a thread that has the time.
func (l *loop) lookUp(c *conn, t *tenant, entry, name, hello []byte) {
	l.keep(c, lookingUp, name, hello)
	k := &lookup{task: task{tenant: t, entry: string(entry)}, loop: l, conn: c, name: slices.Clone(name)}
	k.do = func(d *hostdir.Dialer) {
		k.connect(d)
		k.deliver()
	}
	k.giveUp = func() {
		k.err = errLookups
		k.deliver()
	}
	c.early.lookup = k
	l.engine.threads.start(&k.task)
}

// connect makes the look-up, and waits for whatever there is to wait for.
func (k *lookup) connect(d *hostdir.Dialer) {
	k.backend, k.found, k.err = reach(d, k.loop.engine.tenants, k.name)
}

// deliver gives a look-up that has ended to its loop.
func (k *lookup) deliver() {
	if k.loop.give(func(g *given) { g.lookups = append(g.lookups, k) }) {
		k.loop.wakeUp()
	} else {
		k.discard()
	}
}

// discard is for what nobody waits for any more.
func (k *lookup) discard() {
	if k.err == nil {
		t := k.found
		if t == nil {
			t = k.tenant
		}
		t.closeAway(k.loop.engine.threads, k.backend.FD)
	}
	if k.found != nil {
		k.found.release()
	}
}

// found goes on with the connection that a look-up was for.
func (l *loop) found(k *lookup) {
	c := k.conn
	if c == nil {
		k.discard()
		return
	}
	c.early.lookup = nil
	if k.found != nil {
		c.belongTo(k.found)
	}
	l.runner.entry, l.runner.tenant = []byte(k.entry), k.tenant
	q := c.early.line
	l.dialled(c, c.early.name, c.early.hello, k.backend, k.err)
	// It may have made room for the next one in its line.
	if q == nil {
		return
	}
	if e := q.first(); e != nil && e.conn != c && e.conn.phase == redialing {
		l.dial(e.conn, e.name, e.hello)
	}
}

// dialled goes on with what came of an attempt to connect to the backend.
func (l *loop) dialled(c *conn, name, hello []byte, b hostdir.Backend, err error) {
	switch {
	case err == nil:
		l.begin(c, b, name, hello)
	case noRoom(err), backlogFull(err), exchanged(err):
		var entry tenantKey // of all whose entry could not be found
		if t := l.runner.tenant; t != nil {
			entry = tenantKey{t.uid, string(l.runner.entry)}
		}
		l.wait(c, entry, err, name, hello)
	default:
		l.refuse(c, name, err)
	}
}
