// Package descriptors counts the descriptors of the process, and knows their limit. It needs no
// /proc, which a chroot does not have.
package descriptors

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// Limit returns the limit of open files (RLIMIT_NOFILE), which is the limit of their numbers.
func Limit() int64 {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || uint64(l.Cur) > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(l.Cur)
}

// pathsMost is more than there can be above all other descriptors that are for paths alone.
const pathsMost = 256

// InUse returns how many descriptors below the limit are in use. (Inherited ones can be above it;
// they take nobody's place.) It tries the numbers. But a limit can be a thousand million, and the
// system always gives the lowest number that is free: so it stops at a block of numbers none of
// which is in use.
func InUse(block int64) (n int64) {
	limit := Limit()
	fds := make([]unix.PollFd, min(block, limit))
	for first := int64(0); first < limit; first += int64(len(fds)) {
		some := fds[:min(int64(len(fds)), limit-first)]
		for i := range some {
			some[i].Fd = int32(first) + int32(i)
		}
		if _, err := unix.Poll(some, 0); err != nil {
			break // which does not happen
		}
		open, last := int64(0), 0
		for i, fd := range some {
			if fd.Revents&unix.POLLNVAL == 0 {
				open, last = open+1, i
			}
		}
		// poll(2) does not know those that are for paths alone (O_PATH). There are few numbers
		// left for these.
		for _, fd := range some[:min(last+pathsMost, len(some))] {
			if fd.Revents&unix.POLLNVAL != 0 {
				if _, err := unix.FcntlInt(uintptr(fd.Fd), unix.F_GETFD, 0); err == nil {
					open++
				}
			}
		}
		if open == 0 {
			break
		}
		n += open
	}
	return n
}

// OpenPoller has Go's runtime open its poller now, which takes two descriptors, and reports whether
// it could. If none are left when the first timer is set, the runtime ends the program.
func OpenPoller() bool {
	if InUse(1024)+2 > Limit() {
		return false
	}
	time.AfterFunc(time.Hour, func() {}).Stop()
	return true
}

// Enough fails if the limit is less than it takes.
func Enough(least int64) error {
	if limit := Limit(); limit < least {
		return fmt.Errorf("the limit of open files (ulimit -n, LimitNOFILE=) is %d, too low: at least %d descriptors are needed", limit, least)
	}
	return nil
}
