package logline

import (
	"fmt"
	"testing"
	"time"
)

// Goal: a burst is allowed at once, and no more before its period is over.
func TestLimiter(t *testing.T) {
	l := NewLimiter(time.Hour, 3)
	for i := range 3 {
		if !l.Allow() {
			t.Errorf("event %d of a burst of 3 is not allowed", i+1)
		}
	}
	if l.Allow() {
		t.Error("a fourth event is allowed")
	}
	l.used = l.used.Add(-time.Hour) // as after an hour
	if !l.Allow() || l.Allow() {
		t.Error("after a period not exactly one event is allowed")
	}
}

// Goal: rations of tenants who have theirs whole again are forgotten, others are not.
func TestRationsForgotten(t *testing.T) {
	s := rationsOf{all: map[string]*ration{}, sweep: rationsLeast}
	used, silenced := s.of("used"), s.of("silenced")
	used.often.Allow()
	silenced.omitted.n.Store(1)
	for i := range 10 * rationsLeast {
		s.of(fmt.Sprint(i))
	}
	if n := len(s.all); n > rationsLeast {
		t.Errorf("%d rations are kept, want at most %d", n, rationsLeast)
	}
	if s.of("used") != used || s.of("silenced") != silenced {
		t.Error("a ration that is used was forgotten")
	}
}
