package main

import (
	"fmt"
	"time"
)

// An account is for the line about a connection at its end, if its host's connections are logged.
type account struct {
	client string
	name   string // empty if the client named none
	maybe  bool   // there is a line only if all connections turn out to be logged
}

// The ways that connections end.
const (
	closedByBoth     = "closed"
	closedByBackend  = "closed by the backend before it had read all"
	resetByClient    = "reset by the client"
	resetByBackend   = "reset by the backend"
	silentHalfClosed = "silent after one side had ended"
	cutForMemory     = "cut, for want of memory"
	resetForRoom     = "reset to make room for another host"
	passedByBackend  = "cut, since the backend has passed descriptors"
	cutAtStop        = "cut at the stop"
)

// account returns that of the client with the socket fd, whose relay begins at t, or nil if there will be no line about it.
func (a *logAll) account(t int64, fd int, name []byte, marked bool) *account {
	yes, maybe := a.logs(t)
	if !marked && !yes && !maybe {
		return nil
	}
	return &account{client: peer(fd), name: string(name), maybe: !marked && !yes}
}

// tell prints the line, if there is to be one.
func (a *account) tell(all *logAll, sent traffic, took time.Duration, how string) {
	switch {
	case a == nil:
		return
	case a.maybe:
		a.maybe = false
		all.ifYes(func() { a.tell(all, sent, took, how) })
		return
	}
	name := " without a name"
	if a.name != "" {
		name = " for " + a.name
	}
	complainEach(fmt.Sprintf("served %s%s: bytes up %d, bytes down %d, %.3f s, %s",
		a.client, name, max(0, sent[up]), max(0, sent[down]), took.Seconds(), how))
}
