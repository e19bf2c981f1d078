package hostdir_test

import (
	"runtime"
	"testing"

	"sniproxy/hostdir"
)

// entryDialers returns the ways to dial an entry.
func entryDialers(t *testing.T) map[string]func([]byte) (int, hostdir.Marks, error) {
	runtime.LockOSThread() // for good: it gets a working directory of its own
	d := hostdir.NewDialer()
	t.Cleanup(d.Close)
	return map[string]func([]byte) (int, hostdir.Marks, error){
		"DialEntry":           hostdir.DialEntry,
		"Dialer.DialEntry":    func(entry []byte) (int, hostdir.Marks, error) { defer d.Leave(); return d.DialEntry(entry) },
		"Dialer.DialEntryNow": func(entry []byte) (int, hostdir.Marks, error) { defer d.Leave(); return d.DialEntryNow(entry) },
	}
}
