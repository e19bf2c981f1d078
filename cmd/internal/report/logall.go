package report

import (
	"sync"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
)

const (
	// LogAllPeriod is how often it is found out at most whether all connections are logged.
	LogAllPeriod = time.Second

	// logAllLines lines about connections that have ended meanwhile wait for the answer.
	logAllLines = 1000

	// logAllPatience is how long a program that serves one connection waits for the answer.
	logAllPatience = 100 * time.Millisecond
)

// LogAll knows whether the connections of all hosts are logged: whether there is a log-connections
// of the administrator's in the directory *. A symlink of the administrator's there can lead to a
// tenant's file system, which may never answer. It is asked once in LogAllPeriod while there are
// connections.
type LogAll struct {
	asker
	again atomic.Int64 // when to ask again, by the clock of limits

	mu    sync.Mutex
	lines []func() // about connections that have ended before the answer was known
}

// NewLogAll returns a LogAll.
func NewLogAll(hosts *hostdir.Hosts) *LogAll {
	a := &LogAll{}
	a.start(hosts.LogAll, a.printLines)
	return a
}

// printLines prints the lines that have waited for the answer.
func (a *LogAll) printLines() {
	a.again.Store(limits.Now() + int64(LogAllPeriod))
	a.mu.Lock()
	a.busy.Store(false)
	lines := a.lines
	a.lines = nil
	a.mu.Unlock()
	for _, print := range lines {
		if a.yes.Load() {
			print()
		}
	}
}

// Await waits a moment for the answer, for a program that ends with its one connection.
func (a *LogAll) Await() {
	a.logs(limits.Now())
	for late := time.After(logAllPatience); a.busy.Load(); {
		select {
		case <-time.After(time.Millisecond):
		case <-late:
			return
		}
	}
}

// logs tells whether connections are logged, and if not, whether that is being found out.
func (a *LogAll) logs(now int64) (yes, maybe bool) {
	if now >= a.again.Load() {
		a.ask()
	}
	maybe = a.busy.Load()
	yes = a.yes.Load()
	return yes, maybe && !yes
}

// ifYes calls print if connections are logged, once that is known. If the answer takes so long that
// too many lines wait, the others go by the last answer.
func (a *LogAll) ifYes(print func()) {
	a.mu.Lock()
	if a.busy.Load() && len(a.lines) < logAllLines {
		a.lines = append(a.lines, print)
		a.mu.Unlock()
		return
	}
	a.mu.Unlock()
	if a.yes.Load() {
		print()
	}
}
