// Package report says and counts what happens to connections: who is refused and why, lines about
// connections at their end (access lines), and counters.
package report

import (
	"errors"
	"fmt"
	"time"

	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

// Refusals that do not come from the hello itself.
var (
	ErrEOF     = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before the server name"}
	ErrTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "no complete server name within the time limit"}

	ErrClogged       = sni.Alert{Description: sni.InternalError, Reason: "too many descriptors that backends of this tenant have passed wait to be closed"}
	ErrLookups       = sni.Alert{Description: sni.InternalError, Reason: "too many look-ups wait for a file system"}
	ErrLookupTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "the look-up has waited for a file system until the time limit"}
)

// Alert turns the failure of a connection that has no backend into the alert for its client. The
// name is empty if the client sent none, or none that is canonical.
func Alert(name []byte, err error) sni.Alert {
	var alert sni.Alert
	if errors.As(err, &alert) {
		return alert
	}
	description := sni.InternalError
	var host *hostdir.Error
	if errors.As(err, &host) {
		switch host.Problem {
		case hostdir.NoDirectory:
			if len(name) == 0 {
				return nameless(host.Ignored)
			}
			description = sni.UnrecognizedName
		case hostdir.Other:
		default:
			description = sni.UnrecognizedName
		}
	}
	return sni.Alert{Description: description, Reason: err.Error()}
}

// nameless is for a client that named no host, when there is none for such clients, or one that
// does not count.
func nameless(ignored bool) sni.Alert {
	alert := sni.Alert{Description: sni.UnrecognizedName, Reason: "no server name"}
	if ignored {
		alert.Reason += ", and the directory * belongs neither to root nor to the owner of the hosts directory"
	}
	return alert
}

// Refused logs that the client with the socket fd is refused, and why. The name is empty if the
// client did not send a canonical one: what it did send may be anything, and is never printed.
func Refused(fd int, name []byte, alert sni.Alert) {
	logline.Rationed(func() string {
		if len(name) == 0 {
			return fmt.Sprintf("refused %s: %v", socket.Peer(fd), alert)
		}
		return fmt.Sprintf("refused %s for %s: %v", socket.Peer(fd), name, alert)
	})
}

// Dropped logs that a client that waits is dropped to make room.
func Dropped(fd int) {
	logline.Rationed(func() string {
		return fmt.Sprintf("dropped %s to make room: no descriptor is left, and it has waited longest; raise the limit (ulimit -n, LimitNOFILE=)", socket.Peer(fd))
	})
}

// Reset logs that a relay of a tenant is ended to make room for another tenant's.
func Reset(fd int, tenant fmt.Stringer) {
	logline.Rationed(func() string {
		return fmt.Sprintf("reset %s to make room: no descriptor is left, and %v has the most connections; raise the limit (ulimit -n, LimitNOFILE=)", socket.Peer(fd), tenant)
	})
}

// Passed logs that a backend of a tenant has passed n descriptors.
func Passed(n int, tenant fmt.Stringer) {
	logline.Rationed(func() string {
		return fmt.Sprintf("a backend of %v has passed %d descriptors, so its connection was ended; nothing but bytes is forwarded", tenant, n)
	})
}

// NoThread logs that a thread for look-ups cannot work.
func NoThread(err error) {
	logline.Rationed(func() string { return fmt.Sprintf("cannot look up hosts in a thread of its own: %v", err) })
}

var acceptFailures = logline.NewLimiter(10*time.Second, 1)

// AcceptFailed logs that connections cannot be accepted for the moment.
func AcceptFailed(err error) {
	if acceptFailures.Allow() {
		logline.Err("cannot accept connections for the moment: %v", err)
	}
}
