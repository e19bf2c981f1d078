package report

import (
	"fmt"
	"time"

	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/socket"
)

// An AccessLine is the line about a connection at its end, if the connections of its host are
// logged. A nil AccessLine is never printed.
type AccessLine struct {
	all    *LogAll
	client socket.Address
	name   string // empty if the client named none
	maybe  bool   // it is printed only if the connections of all hosts turn out to be logged
}

// The ways that connections end.
const (
	ClosedByBoth     = "closed"
	ClosedByBackend  = "closed by the backend before it had read all"
	ResetByClient    = "reset by the client"
	ResetByBackend   = "reset by the backend"
	SilentHalfClosed = "silent after one side had ended"
	CutForMemory     = "cut, for want of memory"
	ResetForRoom     = "reset to make room for another host"
	PassedByBackend  = "cut, since the backend has passed descriptors"
	Refused          = "refused within the handshake"
	CutAtStop        = "cut at the stop"
	HandedOver       = "handed over"
)

// AccessLine returns the line about a client, nil if there will be none. The relay begins now, and
// marked tells whether the connections of its host are logged.
func (a *LogAll) AccessLine(now int64, client socket.Address, name []byte, marked bool) *AccessLine {
	yes, maybe := a.logs(now)
	if !marked && !yes && !maybe {
		return nil
	}
	return &AccessLine{all: a, client: client, name: string(name), maybe: !marked && !yes}
}

// Print prints the line, if there is to be one.
func (l *AccessLine) Print(sent Traffic, took time.Duration, how string) {
	switch {
	case l == nil:
		return
	case l.maybe:
		l.maybe = false
		l.all.ifYes(func() { l.Print(sent, took, how) })
		return
	}
	name := " without a name"
	if l.name != "" {
		name = " for " + l.name
	}
	logline.Asked(fmt.Sprintf("served %s%s: bytes up %d, bytes down %d, %.3f s, %s",
		l.client, name, sent[Up], sent[Down], took.Seconds(), how))
}
