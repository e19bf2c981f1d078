package main

import (
	"io"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// Goal: connections that are cut at the stop get a reset, so that no client mistakes what it has
// for all there is; one whose backend has ended gets a clean end.
func TestCut(t *testing.T) {
	d := start(t)
	l := d.host("a.example")
	open, openBackend := d.pair(l, "a.example")
	ping(t, openBackend, open)
	half, halfBackend := d.pair(l, "a.example")
	halfBackend.CloseWrite()
	if got, err := io.ReadAll(half); err != nil || len(got) > 0 {
		t.Fatalf("after the end of the backend the client got %q, error %v", got, err)
	}
	d.signal(syscall.SIGTERM)
	d.out.Await(t, "shutting down")
	d.signal(syscall.SIGTERM)
	if status := d.wait(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	if got, err := io.ReadAll(open); !isReset(err) {
		t.Errorf("a client whose backend has not ended got %q, error %v, want a reset", got, err)
	}
}

// Goal: a relay that was silent for long before one side ended may still move bytes the other way:
// its time limit begins with that end.
func TestHalfClosedAfterSilence(t *testing.T) {
	t.Parallel()
	const limit = 800 * time.Millisecond
	d := start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "SNIPROXY_TEST_HALFCLOSED="+limit.String()) })
	client, backend := d.pair(d.host("a.example"), "a.example")
	<-time.After(2 * limit)
	client.CloseWrite()
	if _, err := backend.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("after the end of the client the backend got error %v", err)
	}
	ping(t, backend, client)
	client.Close()
}
