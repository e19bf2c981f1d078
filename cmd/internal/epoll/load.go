//go:build linux

package epoll

import "golang.org/x/sys/unix"

// A load is how busy a thread is.
type load struct {
	samples   int32
	wall, cpu int64 // at the last sample, in nanoseconds
}

// restart begins anew, for another thread.
func (m *load) restart(now int64) {
	m.wall, m.cpu = now, threadTime()
}

// sample returns which part of the time since the last sample the calling thread has worked. It
// fails if measurePeriod has not passed.
func (m *load) sample(now int64) (busy float64, ok bool) {
	passed := now - m.wall
	if passed < int64(measurePeriod) {
		return 0, false
	}
	cpu := threadTime()
	busy = float64(cpu-m.cpu) / float64(passed)
	m.wall, m.cpu = now, cpu
	m.samples++
	return busy, true
}

// threadTime returns the processor time of the calling thread, in nanoseconds.
func threadTime() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return ts.Nano()
}
