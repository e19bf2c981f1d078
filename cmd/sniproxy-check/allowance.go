package main

import (
	"sync"
	"time"
)

// How long a look-up that waits, for a backend that accepts nobody or for a file system, is waited for. If many took the whole
// time, others are not waited for as long: those with the same owner, since he may have made them to
// keep us waiting, and in the end all, as each that waits for a file system keeps a thread.
const (
	lookupLimit = 10 * time.Second // the limit that sniproxy has
	shortLimit  = time.Second

	ownerShort, ownerNone = 8, 64    // with so many hosts of an owner the others have shortLimit, or none
	allShort, allNone     = 128, 256 // the same of all owners
)

// An allowance counts the hosts that took the whole time.
type allowance struct {
	mu  sync.Mutex
	all int
	of  map[uint32]int // by owner of the entry
}

// limit returns how long a host may be waited for, given the owner of its entry. If it is 0 no look-up that may wait is
// begun.
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

// limitWords says how long a host was waited for.
func limitWords(limit time.Duration) string {
	switch limit {
	case lookupLimit:
		return "for ten seconds"
	case shortLimit:
		return "for a second, and is not waited for any longer, as many others have kept this waiting"
	}
	return "at the first try, and is not waited for, as many others have kept this waiting"
}
