//go:build linux

package epoll

import (
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/report"
	"sniproxy/cmd/internal/shares"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
)

// An Engine is a number of loops, one for each processor that the program may use. A connection is
// in one loop, and no lock is taken for it.
//
// Only the first loop always accepts. A busy loop invites the next; a second idle loop would cost a
// sixth more CPU in wake-ups. A busy loop also moves long-lived relays to the next.
type Engine struct {
	hosts     *hostdir.Hosts
	listeners []*inherit.Listener
	loops     []*loop
	shares    *shares.Shares
	watch     watch
	logAll    *report.LogAll
	front     *report.AcceptProxy
	keys      *report.Keys

	bulkBuffer int32 // how much a backend's socket takes of a bulk upload that is not read

	Counters report.All    // of all loops
	Failed   chan error    // gets the reason if the engine cannot go on
	Drained  chan struct{} // closed when the last connection has ended after Stop

	accepting, running sync.WaitGroup // loops that are not stopped, and loops that run
}

// Start starts an engine that accepts from the listeners, or serves the one client that is there
// already. Own is how many descriptors the program has besides those of connections.
func Start(hosts *hostdir.Hosts, listeners []*inherit.Listener, clients []int, own int64) (*Engine, error) {
	var err error
	e := &Engine{
		hosts:     hosts,
		listeners: listeners,
		logAll:    report.NewLogAll(hosts),
		front:     report.NewAcceptProxy(hosts),
		keys:      report.NewKeys(hosts),
		Failed:    make(chan error, 1),
		Drained:   make(chan struct{}),
	}
	if e.bulkBuffer, err = sendBuffer(); err != nil {
		return nil, err
	}
	e.bulkBuffer += bulkMore
	n := loopsFor(len(listeners))
	// Loops do not give their processors back; the rest of the program has one of its own.
	runtime.GOMAXPROCS(n + 1)
	for range n {
		l, err := newLoop(e)
		if err != nil {
			return nil, err
		}
		e.loops = append(e.loops, l)
		e.Counters = append(e.Counters, &l.counters)
	}
	e.shares = shares.New(hosts, own, len(listeners) == 0, e.Counters)
	e.watch.loops = e.loops
	for i, l := range e.loops {
		l.next = e.loops[(i+1)%n]
	}
	first := e.loops[0]
	first.invited.Store(true)
	if len(clients) > 0 {
		e.logAll.Await()
	}
	for _, fd := range clients {
		first.shared = int32(fd)
		c := first.add(first.shared, socket.Peer(fd))
		c.register(client, unix.EPOLLIN)
	}
	started := make(chan error, n)
	for _, l := range e.loops {
		e.accepting.Add(1)
		e.running.Add(1)
		go l.start(started)
	}
	for range n {
		if err := <-started; err != nil {
			return nil, err
		}
	}
	return e, nil
}

// loopsFor returns how many loops there are. A single connection takes one.
func loopsFor(listeners int) int {
	if listeners == 0 {
		return 1
	}
	return runtime.GOMAXPROCS(0)
}

// Descriptors returns how many descriptors an engine has besides those of connections.
func Descriptors(listeners int) int64 { return int64(loopDescriptors * loopsFor(listeners)) }

// Stop ends accepting, and closes the listening sockets. It returns when that is done.
func (e *Engine) Stop() {
	for _, l := range e.loops {
		l.stopping.Store(true)
		l.poller.wakeUp()
	}
	e.accepting.Wait()
	for _, l := range e.listeners {
		unix.Close(l.FD)
	}
	go func() {
		e.running.Wait()
		close(e.Drained)
	}()
}

// Cut ends all connections, as far as that is possible at once.
func (e *Engine) Cut() {
	for _, l := range e.loops {
		l.cutting.Store(true)
		l.poller.wakeUp()
	}
}
