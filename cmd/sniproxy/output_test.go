package main

import (
	"fmt"
	"testing"
	"time"
)

// Goal: connections that still run while the program ends may print: that neither ends it with
// a panic nor waits, and what was printed before is written.
func TestOutputAfterFlush(t *testing.T) {
	r, w := openPipe(t)
	saved, savedErr := stdout, stderr
	stdout, stderr = newOutput(int(w.Fd())), newOutput(int(w.Fd()))
	defer func() { stdout, stderr = saved, savedErr }()
	stdout.print("before\n")
	flushOutput()
	for i := range 1000 {
		stdout.print(fmt.Sprintf("after %d\n", i))
	}
	got := make([]byte, 100)
	r.SetReadDeadline(time.Now().Add(patience))
	if n, err := r.Read(got); string(got[:n]) != "before\n" {
		t.Errorf("got %q, error %v", got[:n], err)
	}
}
