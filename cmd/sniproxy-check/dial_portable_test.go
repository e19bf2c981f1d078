//go:build portable || !linux

package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// Goal: a look-up of a directory that was exchanged a moment ago ends, so that it is known why it is made again.
func TestDialOnce(t *testing.T) {
	hosts := directory(t)
	good(t)(filepath.Join(hosts, entryOf("backend.example")))
	t.Chdir(hosts)
	entry := entryOf("one.example")
	for late := time.Now().Add(patience); ; {
		must(t, os.Symlink(entryOf("backend.example"), entry))
		fd, _, err := dialOnce([]byte("one.example"))
		if isProblem(err, hostdir.Exchanged) {
			return
		}
		// The moment had passed.
		must(t, err)
		unix.Close(fd)
		if time.Now().After(late) {
			t.Fatal("the look-up never ended with that")
		}
		must(t, os.Remove(entry))
	}
}
