//go:build portable || !linux

package main

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// lookups are all that are under way. They are limited, since each that waits for a file system
// has a thread: a tenant's symlink can lead to one that never answers.
type lookups struct {
	all slots

	mu    sync.Mutex
	hosts map[string]*host
}

// A host is one that connections are looking for.
type host struct {
	name  string
	users int // connections and look-ups, counted by lookups

	lookups slots
	redial  chan struct{} // has something while a client tries again and again
}

func newLookups() *lookups {
	return &lookups{all: newSlots(lookupsMost), hosts: map[string]*host{}}
}

// host returns the host with a name, for use until leave is called.
func (s *lookups) host(name string) *host {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hosts[name]
	if h == nil {
		h = &host{name: name, lookups: newSlots(lookupsOfHost), redial: make(chan struct{}, 1)}
		s.hosts[name] = h
	}
	h.users++
	return h
}

func (s *lookups) leave(h *host) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.users--; h.users == 0 {
		delete(s.hosts, h.name)
	}
}

// slots are for a limited number of look-ups.
type slots struct {
	taken chan struct{} // has something for each look-up
	ended *atomic.Int64 // how many have ended
}

func newSlots(n int) slots { return slots{make(chan struct{}, n), new(atomic.Int64)} }

// take takes a slot. It fails if all others are stuck: none of them ends for lookupPatience.
func (s slots) take() bool {
	for {
		seen := s.ended.Load()
		if offer(s.taken, time.After(lookupPatience)) {
			return true
		}
		if s.ended.Load() == seen {
			return false
		}
	}
}

func (s slots) give() {
	s.ended.Add(1)
	<-s.taken
}

// offer puts something into a channel, if there is room for it in time.
func offer(c chan<- struct{}, late <-chan time.Time) bool {
	select {
	case c <- struct{}{}:
		return true
	case <-late:
		return false
	}
}

// connect is [hostdir.Connect], but fails with errLookups if too many look-ups are stuck, and
// with errLookupTimeout if this one does not end before the deadline. After a failure fd is
// closed.
func (s *lookups) connect(fd int, h *host, deadline time.Time) (marks hostdir.Marks, err error) {
	if !h.lookups.take() {
		unix.Close(fd)
		return hostdir.Marks{}, errLookups
	}
	if !s.all.take() {
		h.lookups.give()
		unix.Close(fd)
		return hostdir.Marks{}, errLookups
	}
	type result struct {
		marks hostdir.Marks
		err   error
	}
	done, over := make(chan result), make(chan struct{})
	s.host(h.name)
	go func() {
		var r result
		r.marks, r.err = hostdir.Connect(fd, []byte(h.name))
		if r.err != nil {
			unix.Close(fd)
		}
		s.all.give()
		h.lookups.give()
		s.leave(h)
		select {
		case done <- r:
		case <-over:
			if r.err == nil {
				unix.Close(fd)
			}
		}
	}()
	late := time.NewTimer(time.Until(deadline))
	defer late.Stop()
	select {
	case r := <-done:
		return r.marks, r.err
	case <-late.C:
		close(over)
		return hostdir.Marks{}, errLookupTimeout
	}
}
