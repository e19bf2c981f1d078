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

	slow map[uint32]time.Duration // time of slow answers, less than what is counted, by the owner
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
	a.count(owner)
}

func (a *allowance) count(owner uint32) {
	if a.of == nil {
		a.of, a.slow = map[uint32]int{}, map[uint32]time.Duration{}
	}
	a.all++
	a.of[owner]++
}

// slowAnswer is how long a handshake takes that is none of many quick ones.
const slowAnswer = 250 * time.Millisecond

// took adds up handshakes that nearly took the whole time: together they count as if some had.
func (a *allowance) took(owner uint32, t time.Duration) {
	if t < slowAnswer {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.slow == nil {
		a.of, a.slow = map[uint32]int{}, map[uint32]time.Duration{}
	}
	for a.slow[owner] += t; a.slow[owner] >= lookupLimit; a.slow[owner] -= lookupLimit {
		a.count(owner)
	}
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
