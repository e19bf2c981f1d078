//go:build !portable

package main

import (
	"runtime"
	"slices"
	"sync"
	"time"

	"sniproxy/hostdir"
)

// A lookup is made by a thread that has the time, since it may wait for a file system: a
// tenant's symlink can lead to one that hangs. Loops make those that need not wait themselves.
type lookup struct {
	loop *loop
	conn *conn // that waits for it, nil if that has ended; the loop's
	name string
	late *time.Timer // while it waits for its turn
	seen int         // how many others had ended when that was set

	fd    int
	marks hostdir.Marks
	err   error
}

// lookups are all that are under way, for all loops. They are limited, as each has a thread.
type lookups struct {
	mu      sync.Mutex
	all     tally
	of      map[string]*tally // by host, if there are any
	waiting []*lookup         // for others to end
	idle    int               // threads without one
	next    chan *lookup
}

// A tally is how many lookups are under way, and how many have ended.
type tally struct{ running, ended int }

func newLookups() *lookups {
	return &lookups{of: map[string]*tally{}, next: make(chan *lookup, lookupsMost)}
}

// start begins a lookup, as soon as that is allowed. Its loop is given it when it has ended.
func (s *lookups) start(k *lookup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.allowed(k) {
		s.run(k)
		return
	}
	s.waiting = append(s.waiting, k)
	k.seen = s.ended(k)
	k.late = time.AfterFunc(lookupPatience, func() { s.giveUp(k) })
}

func (s *lookups) allowed(k *lookup) bool {
	of := s.of[k.name]
	return s.all.running < lookupsMost && (of == nil || of.running < lookupsOfHost)
}

// begun counts one lookup more.
func (s *lookups) begun(name string) {
	of := s.of[name]
	if of == nil {
		of = &tally{}
		s.of[name] = of
	}
	of.running++
	s.all.running++
}

// adopt counts a lookup that a loop has begun, and could not end.
func (s *lookups) adopt(k *lookup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begun(k.name)
}

func (s *lookups) run(k *lookup) {
	s.begun(k.name)
	s.next <- k // has room for all
	if s.idle > 0 {
		s.idle--
	} else {
		go s.work()
	}
}

// giveUp ends a lookup that still waits for its turn, if those that it waits for are stuck.
func (s *lookups) giveUp(k *lookup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.waiting, k)
	if i < 0 {
		return
	}
	if ended := s.ended(k); ended != k.seen {
		k.seen = ended
		k.late.Reset(lookupPatience)
		return
	}
	s.waiting = slices.Delete(s.waiting, i, i+1)
	k.err = errLookups
	k.deliver()
}

// ended returns how many have ended of those that k waits for.
func (s *lookups) ended(k *lookup) int {
	if of := s.of[k.name]; of != nil && of.running >= lookupsOfHost {
		return of.ended
	}
	return s.all.ended
}

// work makes lookups, until there are enough others that can.
func (s *lookups) work() {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	dialer := hostdir.NewDialer()
	defer dialer.Close()
	for more := true; more; {
		k := <-s.next
		k.fd, k.marks, k.err = dialer.Dial([]byte(k.name))
		dialer.Leave()
		more = s.stay()
		s.end(k.name)
		k.deliver()
	}
}

// stay counts a thread that can make another lookup. It fails if there are enough.
func (s *lookups) stay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == lookupsIdle {
		return false
	}
	s.idle++
	return true
}

// end counts one lookup less, and begins one that waits for that.
func (s *lookups) end(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := s.of[name]
	for _, t := range []*tally{of, &s.all} {
		t.running--
		t.ended++
	}
	if of.running == 0 {
		delete(s.of, name)
	}
	if i := slices.IndexFunc(s.waiting, s.allowed); i >= 0 {
		k := s.waiting[i]
		s.waiting = slices.Delete(s.waiting, i, i+1)
		k.late.Stop()
		s.run(k)
	}
}

// deliver gives a lookup that has ended to its loop.
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
		closeFd(int32(k.fd))
	}
}

func mayWait(err error) bool { return isProblem(err, hostdir.MayWait) }

// lookUp has the host of c looked up by a thread that has the time.
func (l *loop) lookUp(c *conn, name, hello []byte) {
	l.keep(c, lookingUp, name, hello)
	c.early.lookup = &lookup{loop: l, conn: c, name: string(name)}
	l.engine.lookups.start(c.early.lookup)
}

// found goes on with the connection that a lookup was for.
func (l *loop) found(k *lookup) {
	c := k.conn
	if c == nil {
		k.discard()
		return
	}
	c.early.lookup = nil
	if mayWait(k.err) || noRoom(k.err) && l.makeRoom(c) {
		l.lookUp(c, c.early.name, c.early.hello)
		return
	}
	if k.err == nil && l.redial != 0 {
		l.redial, l.redialWait = now(), 0 // maybe the backlog has room for the next, too
	}
	l.dialled(c, c.early.name, c.early.hello, k.fd, k.marks, k.err)
}
