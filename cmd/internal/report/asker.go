package report

import (
	"errors"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/limits"
)

// An asker asks a question about the hosts directory, and knows the last answer. Looking there may
// take any time, so a goroutine does it, which has no connections to serve, and nobody waits for
// it. If it cannot find out, the last answer stays.
type asker struct {
	yes  atomic.Bool
	busy atomic.Bool // the goroutine is looking
	look chan struct{}
}

// start starts the goroutine. Each time that it has asked, it calls answered, which says when it is
// not busy any more.
func (a *asker) start(ask func() (bool, error), answered func()) {
	a.look = make(chan struct{}, 1)
	go func() {
		for range a.look {
			if yes, err := ask(); err == nil {
				a.yes.Store(yes)
			}
			answered()
		}
	}()
}

// ask has the goroutine ask, unless it is busy.
func (a *asker) ask() {
	if !a.busy.Swap(true) {
		a.look <- struct{}{}
	}
}

// atStart waits for the first answer about the hosts directory, and returns its error. Whoever
// keeps the directory locked must not keep the program from starting.
func atStart(first <-chan error) error {
	select {
	case err := <-first:
		return err
	case <-time.After(limits.TaskPatience):
		return errors.New("the hosts directory does not answer")
	}
}
