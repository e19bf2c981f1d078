package main

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sniproxy/hostdir"
)

// A task is something that may wait for a file system, and so for ever: a tenant's symlink can lead to
// one that hangs. It is done in a thread that has the time. A task owns all that it touches.
type task struct {
	tenant *tenant
	entry  string // of the hosts directory
	do     func(*hostdir.Dialer)
	giveUp func() // called in place of do if those that the task waits for are stuck; nil if it can wait

	queue *entryTasks
	late  *time.Timer // while it waits for its turn
	seen  int         // how many others had ended when that was set
}

// A tally is how many tasks are under way, and how many have ended.
type tally struct{ running, ended int }

// entryTasks are the tasks of an entry of a tenant.
type entryTasks struct {
	tenant  *tenant
	name    string
	tally   tally
	waiting []*task
}

// threads do the tasks of all tenants: so many at once for an entry, for a tenant and in all. Threads of loops
// that are stuck, and were left behind, count among them.
type threads struct {
	hosts *hostdir.Hosts

	mu      sync.Mutex
	all     tally
	waiting []*tenant // those with tasks that wait
	idle    int       // threads without a task
	next    chan *task
	more    chan func() // what is to get a thread of its own

	underWay atomic.Int64 // all.running, for others to read
	closing  atomic.Int64 // descriptors that wait to be closed
}

func newThreads(hosts *hostdir.Hosts) *threads {
	s := &threads{hosts: hosts, next: make(chan *task, tasksMost), more: make(chan func(), tasksMost+runtime.GOMAXPROCS(0))}
	// From the start, when the system has room for them, so there is always one.
	for range threadsIdle {
		s.idle++
		startThread(s.work)
	}
	go s.supply()
	return s
}

// start has a task done, as soon as that is allowed.
func (s *threads) start(k *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.enter(k)
	if s.allowed(q) {
		s.run(k)
		return
	}
	if len(q.waiting) == 0 {
		if len(k.tenant.waiting) == 0 {
			s.waiting = append(s.waiting, k.tenant)
		}
		k.tenant.waiting = append(k.tenant.waiting, q)
	}
	q.waiting = append(q.waiting, k)
	if k.giveUp != nil {
		k.seen = s.ended(q)
		k.late = time.AfterFunc(taskPatience, func() { s.late(k) })
	}
}

// enter finds the place of a task.
func (s *threads) enter(k *task) *entryTasks {
	q := k.tenant.entries[k.entry]
	if q == nil {
		if k.tenant.entries == nil {
			k.tenant.entries = map[string]*entryTasks{}
		}
		q = &entryTasks{tenant: k.tenant, name: k.entry}
		k.tenant.entries[k.entry] = q
	}
	k.queue = q
	k.tenant.users.Add(1)
	return q
}

// leave is for a task that enter has found the place of.
func (s *threads) leave(k *task) {
	if q := k.queue; q.tally.running == 0 && len(q.waiting) == 0 {
		delete(k.tenant.entries, q.name)
	}
	k.tenant.release()
}

func (s *threads) allowed(q *entryTasks) bool {
	return s.all.running < tasksMost && q.tenant.tasks.running < tasksOfTenant && q.tally.running < tasksOfEntry
}

// ended returns how many tasks have ended of those that the ones in q wait for.
func (s *threads) ended(q *entryTasks) int {
	switch {
	case q.tally.running >= tasksOfEntry:
		return q.tally.ended
	case q.tenant.tasks.running >= tasksOfTenant:
		return q.tenant.tasks.ended
	}
	return s.all.ended
}

// begin counts a task.
func (s *threads) begin(k *task) {
	for _, t := range []*tally{&k.queue.tally, &k.tenant.tasks, &s.all} {
		t.running++
	}
	s.underWay.Add(1)
}

func (s *threads) run(k *task) {
	s.begin(k)
	s.next <- k // has room for all
	if s.idle > 0 {
		s.idle--
	} else {
		s.more <- s.work
	}
}

// end counts a task as done, and begins one that waits for that.
func (s *threads) end(k *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range []*tally{&k.queue.tally, &k.tenant.tasks, &s.all} {
		t.running--
		t.ended++
	}
	s.underWay.Add(-1)
	s.leave(k)
	s.runNext()
}

// runNext begins a task that waits and is allowed now. Tenants, and each tenant's entries, take turns. No
// more of them than there are tasks under way can be found not to be allowed.
func (s *threads) runNext() {
	for i, t := range s.waiting {
		for j, q := range t.waiting {
			if !s.allowed(q) {
				continue
			}
			k := q.waiting[0]
			s.remove(k, 0)
			if len(q.waiting) > 0 {
				t.waiting = append(slices.Delete(t.waiting, j, j+1), q)
			}
			if len(t.waiting) > 0 {
				s.waiting = append(slices.Delete(s.waiting, i, i+1), t)
			}
			if k.late != nil {
				k.late.Stop()
			}
			s.run(k)
			return
		}
	}
}

// remove takes a task from those that wait. It is the ith of its entry.
func (s *threads) remove(k *task, i int) {
	q, t := k.queue, k.tenant
	if q.waiting = slices.Delete(q.waiting, i, i+1); len(q.waiting) > 0 {
		return
	}
	j := slices.Index(t.waiting, q)
	if t.waiting = slices.Delete(t.waiting, j, j+1); len(t.waiting) > 0 {
		return
	}
	j = slices.Index(s.waiting, t)
	s.waiting = slices.Delete(s.waiting, j, j+1)
}

// late gives a task up that still waits for its turn, if those that it waits for are stuck.
func (s *threads) late(k *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(k.queue.waiting, k)
	if i < 0 {
		return
	}
	if ended := s.ended(k.queue); ended != k.seen {
		k.seen = ended
		k.late.Reset(taskPatience)
		return
	}
	s.remove(k, i)
	s.leave(k)
	k.giveUp()
}

// work does tasks, until there are enough others who can.
func (s *threads) work() {
	dialer, err := s.hosts.NewDialer()
	if err != nil {
		complainThread(err)
		time.Sleep(threadPause)
		s.more <- s.work
		return
	}
	defer dialer.Close()
	for more := true; more; {
		k := <-s.next
		k.do(dialer)
		dialer.Leave()
		more = s.stay()
		s.end(k)
	}
}

func complainThread(err error) {
	complainOften(func() string { return fmt.Sprintf("cannot look up hosts in a thread of its own: %v", err) })
}

// stay counts a thread that can do another task. It fails if there are enough.
func (s *threads) stay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == threadsIdle {
		return false
	}
	s.idle++
	return true
}

// descriptors returns how many there may be that look-ups have open, and tasks are to close.
func (s *threads) descriptors() int64 { return 2*s.underWay.Load() + s.closing.Load() }

// supply gives threads to those who want one, while the system lets the program have some more: Go's runtime may want one
// at any moment as well, and ends the program when it is refused.
func (s *threads) supply() {
	for f := range s.more {
		for !roomForThreads() {
			time.Sleep(threadPause)
		}
		startThread(f)
	}
}

// startThread calls f in a thread of its own, which ends with it.
func startThread(f func()) {
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(started)
		f()
	}()
	<-started
}
