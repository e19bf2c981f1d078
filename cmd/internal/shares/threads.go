package shares

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/report"
	"sniproxy/hostdir"
)

const (
	// threadsIdle threads stay when they have no task. When the system has no room for
	// threadsRoom threads more, it is asked again after ThreadPause: some are for Go's runtime.
	threadsIdle = 2
	threadsRoom = 8
	ThreadPause = 500 * time.Millisecond
)

// A Task is something that may wait for a file system, and so for ever: a tenant's symlink can lead
// to one that hangs. It runs in a thread that has the time. A task owns all that it touches.
type Task struct {
	Tenant *Tenant
	Entry  string // of the hosts directory
	Do     func(*hostdir.Dialer)
	GiveUp func() // called instead of Do if no task before it ends for limits.TaskPatience; nil if it can wait

	closing bool // it closes descriptors, which are counted one by one

	group *group      // of its entry
	late  *time.Timer // while it waits for its turn
	seen  int         // how many others had ended when that was set
}

// A group is the tasks of an entry, those of a tenant, or all.
type group struct {
	parent  *group // nil of all
	most    int    // tasks that may run at once
	running int
	ended   int
	waiting []*group // those in it with tasks that wait, in the order of their turns
	tasks   []*Task  // of an entry, that wait
}

// full returns the smallest group that g is, or is in, of which no more tasks may run. It returns
// all if there is none.
func (g *group) full() *group {
	for g.running < g.most && g.parent != nil {
		g = g.parent
	}
	return g
}

// count counts tasks that begin, or end if the number is negative.
func (g *group) count(n int) {
	for ; g != nil; g = g.parent {
		g.running += n
		g.ended += max(0, -n)
	}
}

// push has a task wait.
func (g *group) push(k *Task) {
	first := len(g.tasks) == 0
	g.tasks = append(g.tasks, k)
	for ; first && g.parent != nil; g = g.parent {
		first = len(g.parent.waiting) == 0
		g.parent.waiting = append(g.parent.waiting, g)
	}
}

// next returns a task that waits and may run, nil if there is none. It passes over no more groups
// than there are tasks under way.
func (g *group) next() *Task {
	if g.running >= g.most {
		return nil
	}
	if len(g.tasks) > 0 {
		return g.tasks[0]
	}
	for _, in := range g.waiting {
		if k := in.next(); k != nil {
			return k
		}
	}
	return nil
}

// take takes a task from those that wait. It was the turn of the groups that it is in.
func (k *Task) take() {
	g := k.group
	i := slices.Index(g.tasks, k)
	g.tasks = slices.Delete(g.tasks, i, i+1)
	for ; g.parent != nil; g = g.parent {
		i = slices.Index(g.parent.waiting, g)
		g.parent.waiting = slices.Delete(g.parent.waiting, i, i+1)
		if len(g.tasks)+len(g.waiting) > 0 {
			g.parent.waiting = append(g.parent.waiting, g)
		}
	}
}

// Threads run the tasks of all tenants: so many at once for an entry, for a tenant and in all.
// Threads of event loops that are stuck, and were left behind, count among them.
type Threads struct {
	hosts *hostdir.Hosts

	mu   sync.Mutex
	all  group
	next chan *Task
	more chan func() // those that are to get a thread of their own

	threads  int
	starting int // those that were asked for and have not begun

	lookups atomic.Int64 // tasks under way that are look-ups
	behind  atomic.Int64 // threads that were left behind
	closing atomic.Int64 // descriptors that wait to be closed

	room func() bool // roomForThreads; tests have another
}

func newThreads(hosts *hostdir.Hosts) *Threads {
	s := &Threads{hosts: hosts, room: roomForThreads, next: make(chan *Task, limits.Tasks), more: make(chan func(), limits.Tasks+runtime.GOMAXPROCS(0))}
	s.all.most = limits.Tasks
	// At the start the system has room for them, so there is always one.
	s.starting = threadsIdle
	for range threadsIdle {
		startThread(s.work)
	}
	go s.supply()
	return s
}

// Start runs a task, as soon as that is allowed.
func (s *Threads) Start(k *Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enter(k)
	full := k.group.full()
	if full.running < full.most {
		s.run(k)
		return
	}
	k.group.push(k)
	if k.GiveUp != nil {
		k.seen = full.ended
		k.late = time.AfterFunc(limits.TaskPatience, func() { s.late(k) })
	}
}

// enter finds the group of a task.
func (s *Threads) enter(k *Task) {
	t := k.Tenant
	if t.entries == nil {
		t.tasks.parent, t.tasks.most = &s.all, limits.TasksOfTenant
		t.entries = map[string]*group{}
	}
	if k.group = t.entries[k.Entry]; k.group == nil {
		k.group = &group{parent: &t.tasks, most: limits.TasksOfEntry}
		t.entries[k.Entry] = k.group
	}
	t.users.Add(1)
}

// leave undoes enter.
func (s *Threads) leave(k *Task) {
	if k.group.running+len(k.group.tasks) == 0 {
		delete(k.Tenant.entries, k.Entry)
	}
	k.Tenant.Release()
}

// count counts tasks that begin, or end if the number is negative.
func (s *Threads) count(k *Task, n int) {
	k.group.count(n)
	if !k.closing {
		s.lookups.Add(int64(n))
	}
}

func (s *Threads) run(k *Task) {
	s.count(k, 1)
	s.next <- k // has room for all
	if s.threads+s.starting < s.tasks() {
		s.starting++
		s.more <- s.work
	}
}

// tasks returns how many tasks threads have, or are to have.
func (s *Threads) tasks() int { return s.all.running - int(s.behind.Load()) }

// end counts a task as done, and runs one that waits for that.
func (s *Threads) end(k *Task) {
	s.count(k, -1)
	s.leave(k)
	if k = s.all.next(); k == nil {
		return
	}
	k.take()
	if k.late != nil {
		k.late.Stop()
	}
	s.run(k)
}

// late gives up a task that still waits for its turn, if those that it waits for are stuck.
func (s *Threads) late(k *Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(k.group.tasks, k) {
		return
	}
	if full := k.group.full(); full.ended != k.seen {
		k.seen = full.ended
		k.late.Reset(limits.TaskPatience)
		return
	}
	k.take()
	s.leave(k)
	k.GiveUp()
}

// work runs tasks, until enough other threads are idle.
func (s *Threads) work() {
	dialer, err := s.hosts.NewDialer()
	if err != nil {
		report.NoThread(err)
		time.Sleep(ThreadPause)
		s.more <- s.work
		return
	}
	defer dialer.Close()
	s.mu.Lock()
	s.starting--
	s.threads++
	more := s.stay()
	s.mu.Unlock()
	for more {
		k := <-s.next
		k.Do(dialer)
		dialer.Leave()
		s.mu.Lock()
		s.end(k)
		more = s.stay()
		s.mu.Unlock()
	}
}

// stay tells whether the calling thread is needed, for a task or as an idle one.
func (s *Threads) stay() bool {
	if s.threads-s.tasks() > threadsIdle {
		s.threads--
		return false
	}
	return true
}

// descriptors returns how many look-ups may have open, and how many wait to be closed.
func (s *Threads) descriptors() int64 { return 2*s.lookups.Load() + s.closing.Load() }

// LeaveBehind counts a thread of an event loop that is stuck in a look-up as one that runs the
// task.
func (s *Threads) LeaveBehind(k *Task) {
	k.Tenant.hung.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behind.Add(1)
	s.enter(k)
	s.count(k, 1)
}

// ComeBack counts the task of a thread that was left behind as done. Its tenant is not trusted for
// a while.
func (s *Threads) ComeBack(k *Task) {
	k.Tenant.untrusted.Store(limits.Now() + int64(limits.Distrust))
	k.Tenant.hung.Add(-1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.behind.Add(-1)
	s.end(k)
}

// Behind returns how many threads were left behind and have not come back.
func (s *Threads) Behind() int64 { return s.behind.Load() }

// Extra gives f a thread of its own, which ends with it, as soon as the system has room for one.
func (s *Threads) Extra(f func()) { s.more <- f }

// supply starts threads while the system lets the program have some more: Go's runtime may want one
// at any moment as well, and ends the program when it is refused.
func (s *Threads) supply() {
	for f := range s.more {
		for !s.room() {
			time.Sleep(ThreadPause)
		}
		startThread(f)
	}
}

// startThread calls f in a thread that ends with it.
func startThread(f func()) {
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(started)
		f()
	}()
	<-started
}

// A closing has what is left to close for a tenant where close(2) may take any time, or never
// return. His backends can pass descriptors, and a file on a file system of his own may never be
// closed; a socket may hold such a descriptor. One thread at a time closes them.
type closing struct {
	mu      sync.Mutex
	fds     []int
	running bool
	left    atomic.Int64
}

// CloseAway closes descriptors in another thread.
func (t *Tenant) CloseAway(threads *Threads, fds ...int) {
	c := &t.closing
	c.left.Add(int64(len(fds)))
	threads.closing.Add(int64(len(fds)))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fds = append(c.fds, fds...)
	if c.running {
		return
	}
	c.running = true
	t.users.Add(1)
	threads.Start(&Task{Tenant: t, closing: true, Do: func(*hostdir.Dialer) {
		for t.closeSome(threads) {
		}
		t.Release()
	}})
}

func (t *Tenant) closeSome(threads *Threads) bool {
	c := &t.closing
	c.mu.Lock()
	fds := c.fds
	c.fds = nil
	c.running = len(fds) > 0
	c.mu.Unlock()
	for _, fd := range fds {
		unix.Close(fd)
		c.left.Add(-1)
		threads.closing.Add(-1)
	}
	return len(fds) > 0
}

// Clogged tells whether so much is left to close for him that he gets no connection more.
func (t *Tenant) Clogged() bool { return t.closing.left.Load() > limits.Closing }
