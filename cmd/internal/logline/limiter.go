package logline

import (
	"sync"
	"time"
)

// A Limiter allows one event per period, and after a time with fewer some more at once: a burst.
type Limiter struct {
	period time.Duration
	burst  int

	mu   sync.Mutex
	used time.Time // all periods before this have had their event
}

// NewLimiter returns a Limiter.
func NewLimiter(period time.Duration, burst int) *Limiter {
	return &Limiter{period: period, burst: burst}
}

// full reports whether it is as a new one.
func (l *Limiter) full() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.used.Before(time.Now())
}

// Allow reports whether an event may happen now, and counts it if so.
func (l *Limiter) Allow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.used.Before(now) {
		l.used = now
	}
	next := l.used.Add(l.period)
	if next.After(now.Add(time.Duration(l.burst) * l.period)) {
		return false
	}
	l.used = next
	return true
}
