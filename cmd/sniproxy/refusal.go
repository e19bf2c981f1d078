package main

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// Refusals that do not come from the hello itself.
var (
	errEOF     = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before the server name"}
	errTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "no complete server name within the time limit"}

	errNoRoom        = hostdir.NoRoom
	errClogged       = sni.Alert{Description: sni.InternalError, Reason: "too many descriptors that backends of this tenant have passed wait to be closed"}
	errLookups       = sni.Alert{Description: sni.InternalError, Reason: "too many look-ups wait for a file system"}
	errLookupTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "the look-up has waited for a file system until the time limit"}
)

// refusal turns the failure of a connection that has no backend into the alert that the
// client is told. The name is empty if the client sent none, or none that is canonical.
func refusal(name []byte, err error) sni.Alert {
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

// complainRefused says whom the client with the socket fd is refused, and why. There is no
// name if it did not send a canonical one, since what it did send may be anything.
func complainRefused(fd int, name []byte, alert sni.Alert) {
	complainOften(func() string {
		if len(name) == 0 {
			return fmt.Sprintf("refused %s: %v", peer(fd), alert)
		}
		return fmt.Sprintf("refused %s for %s: %v", peer(fd), name, alert)
	})
}

func complainDropped(fd int) {
	complainOften(func() string {
		return fmt.Sprintf("dropped %s to make room: no descriptor is left, and it has waited longest; raise the limit (ulimit -n, LimitNOFILE=)", peer(fd))
	})
}

// complainReset says that a relay of a tenant's is ended to make room for another tenant's.
func complainReset(fd int, t *tenant) {
	complainOften(func() string {
		return fmt.Sprintf("reset %s to make room: no descriptor is left, and %v has the most connections; raise the limit (ulimit -n, LimitNOFILE=)", peer(fd), t)
	})
}

// complainPassed says that a backend has passed descriptors.
func complainPassed(n int, t *tenant) {
	complainOften(func() string {
		return fmt.Sprintf("a backend of %v has passed %d descriptors, so its connection was ended; nothing but bytes is forwarded", t, n)
	})
}

// peer returns the address of the client with the socket fd.
func peer(fd int) string {
	if sa, err := unix.Getpeername(fd); err == nil {
		if addr := addrPort(sa); addr.IsValid() {
			return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()).String()
		}
	}
	return "a client that is gone"
}

// Errors of a look-up that are not the last word.
func backlogFull(err error) bool { return err == hostdir.BacklogFull }
func noRoom(err error) bool      { return err == hostdir.NoRoom }
func exchanged(err error) bool   { return err == hostdir.Exchanged }
