//go:build portable || !linux

package main

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// lookups are all that are under way. They are limited, since each that waits for a file system
// has a thread: a tenant's symlink can lead to one that never answers.
type lookups struct {
	slots chan struct{} // has something for each

	mu    sync.Mutex
	hosts map[string]*host
}

// A host is one that connections are looking for.
type host struct {
	name  string
	users int // connections and look-ups, counted by lookups

	slots  chan struct{} // has something for each look-up of it
	redial chan struct{} // has something while a client tries again and again
}

func newLookups() *lookups {
	return &lookups{slots: make(chan struct{}, lookupsMost), hosts: map[string]*host{}}
}

// host returns the host with a name, for use until leave is called.
func (s *lookups) host(name string) *host {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hosts[name]
	if h == nil {
		h = &host{name: name, slots: make(chan struct{}, lookupsOfHost), redial: make(chan struct{}, 1)}
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

// take puts something into slots, if there is room for it in time.
func take(slots chan struct{}, late <-chan time.Time) bool {
	select {
	case slots <- struct{}{}:
		return true
	case <-late:
		return false
	}
}

// connect is [hostdir.Connect], but fails with errLookups if too many look-ups do not end, and
// with errLookupTimeout if this one does not before the deadline. After a failure fd is closed.
func (s *lookups) connect(fd int, h *host, deadline time.Time) (proxyV1 bool, err error) {
	late := time.NewTimer(lookupPatience)
	defer late.Stop()
	if !take(h.slots, late.C) {
		unix.Close(fd)
		return false, errLookups
	}
	if !take(s.slots, late.C) {
		<-h.slots
		unix.Close(fd)
		return false, errLookups
	}
	type result struct {
		proxyV1 bool
		err     error
	}
	done, over := make(chan result), make(chan struct{})
	s.host(h.name)
	go func() {
		var r result
		r.proxyV1, r.err = hostdir.Connect(fd, []byte(h.name))
		if r.err != nil {
			unix.Close(fd)
		}
		<-s.slots
		<-h.slots
		s.leave(h)
		select {
		case done <- r:
		case <-over:
			if r.err == nil {
				unix.Close(fd)
			}
		}
	}()
	late.Reset(time.Until(deadline))
	select {
	case r := <-done:
		return r.proxyV1, r.err
	case <-late.C:
		close(over)
		return false, errLookupTimeout
	}
}
