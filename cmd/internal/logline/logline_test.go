package logline

import (
	"os"
	"testing"
	"time"
)

// Goal: connections that still run while the program ends may print: that neither ends it with a
// panic nor waits, and what was printed before is written.
func TestPrintAfterFlush(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	saved, savedErr := stdout, stderr
	stdout, stderr = newOutput(int(w.Fd())), newOutput(int(w.Fd()))
	defer func() { stdout, stderr = saved, savedErr }()
	Out("before")
	Flush()
	for i := range 1000 {
		Out("after %d", i)
	}
	got := make([]byte, 100)
	r.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := r.Read(got); string(got[:n]) != "before\n" {
		t.Errorf("got %q, error %v", got[:n], err)
	}
}
