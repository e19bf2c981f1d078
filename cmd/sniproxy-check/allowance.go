package main

import (
	"sync"
	"time"
)

// How long to wait for a look-up, while the backend accepts nobody or a file system does not
// answer. After many have taken the whole time, others get less: first those of the same owner, who
// may have made them for that purpose, and in the end all, since each wait for a file system keeps
// a thread.
const (
	lookupLimit = 10 * time.Second // as in sniproxy
	shortLimit  = time.Second

	ownerShort, ownerNone = 8, 64    // so many hosts of one owner; the others get shortLimit, or none
	allShort, allNone     = 128, 256 // the same for all owners together
)

// An allowance counts the hosts that took the whole time.
type allowance struct {
	mu  sync.Mutex
	all int
	of  map[uint32]int // by the owner of the entry
}

// limit returns how long to wait for a host whose entry has this owner. 0 means to make no look-up
// that may wait.
func (a *allowance) limit(owner uint32) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch of := a.of[owner]; {
	case of >= ownerNone || a.all >= allNone:
		return 0
	case of >= ownerShort || a.all >= allShort:
		return shortLimit
	}
	return lookupLimit
}

// spent counts a host that took the whole time.
func (a *allowance) spent(owner uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.of == nil {
		a.of = map[uint32]int{}
	}
	a.all++
	a.of[owner]++
}

// limitWords says how long the wait for a host was.
func limitWords(limit time.Duration) string {
	switch limit {
	case lookupLimit:
		return "for ten seconds"
	case shortLimit:
		return "for a second, and is not waited for any longer, as many others have kept this waiting"
	}
	return "at the first try, and is not waited for, as many others have kept this waiting"
}
