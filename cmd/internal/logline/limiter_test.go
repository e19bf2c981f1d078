package logline

import (
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
