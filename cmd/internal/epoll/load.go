//go:build linux

package epoll

import "golang.org/x/sys/unix"

// A load is how busy a thread is.
type load struct {
	samples   int32
	wall, cpu int64 // at the last sample, in nanoseconds
}

// sample returns which part of the time since the last sample the calling thread has worked. It fails
// if measurePeriod has not passed.
func (m *load) sample(now int64) (busy float64, ok bool) {
	passed := now - m.wall
	if passed < int64(measurePeriod) {
		return 0, false
	}
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	busy = float64(ts.Nano()-m.cpu) / float64(passed)
	m.wall, m.cpu = now, ts.Nano()
	m.samples++
	return busy, true
}
