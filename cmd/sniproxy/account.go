package main

import (
	"fmt"
	"time"
)

// An account is for the line about a connection at its end, if its host's connections are logged.
type account struct {
	client string
	name   string // empty if the client named none
}

// The ways that connections end.
const (
	closedByBoth     = "closed"
	closedByBackend  = "closed by the backend before it had read all"
	resetByClient    = "reset by the client"
	resetByBackend   = "reset by the backend"
	silentHalfClosed = "silent after one side had ended"
	cutForMemory     = "cut, for want of memory"
	cutAtStop        = "cut at the stop"
)

func newAccount(fd int, name []byte) *account { return &account{peer(fd), string(name)} }

// tell prints the line.
func (a *account) tell(sent traffic, took time.Duration, how string) {
	name := " without a name"
	if a.name != "" {
		name = " for " + a.name
	}
	complainEach(fmt.Sprintf("served %s%s: bytes up %d, bytes down %d, %.3f s, %s",
		a.client, name, max(0, sent[up]), max(0, sent[down]), took.Seconds(), how))
}
