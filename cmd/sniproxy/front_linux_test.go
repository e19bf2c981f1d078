package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"sniproxy/cmd/internal/report"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: while it cannot be found out whether all connections are logged, since a tenant has led *
// into a file system that never answers, it is noticed as ever whether there must be PROXY headers.
func TestFrontLogAllStuck(t *testing.T) {
	t.Parallel() // it waits for the marker to be noticed
	hostdirtest.NeedRoot(t)
	hostdirtest.OwnMounts(t)
	d := start(t)
	d.serve("victim.example", hostdirtest.Greet)
	d.leadAstray(t)
	for late := time.Now().Add(2 * report.LogAllPeriod); time.Now().Before(late); { // somebody has asked, and waits
		hostdirtest.Must(t, d.greeted("victim.example"))
	}
	hostdirtest.Must(t, os.Mkdir(filepath.Join(d.dir, acceptProxy), 0o755))
	hostdirtest.Await(t, "a header to be expected", func() bool {
		got, _ := d.exchange(append([]byte(headerV1), snitest.Hello("victim.example")...))
		return string(got) == "this is victim.example"
	})
}
