// Package report says and counts what happens to connections: who is refused and why, lines about
// connections at their end (access lines), and counters. It also knows what the administrator's
// directories ask for all connections: access lines (log-connections in *), PROXY headers
// (.accept-proxy), and keys for Encrypted Client Hello (.ech).
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
	ErrEmpty        = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before its first byte"}
	ErrEOF          = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before the server name"}
	ErrSilent       = sni.Alert{Description: sni.UserCanceled, Reason: "sent nothing within the time limit; it may wait for the server to speak first, as SMTP, IMAP and MySQL clients do"}
	ErrTimeout      = sni.Alert{Description: sni.UserCanceled, Reason: "no complete server name within the time limit"}
	ErrEOFAfter     = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection before the end of its client hello"}
	ErrTimeoutAfter = sni.Alert{Description: sni.UserCanceled, Reason: "no complete client hello within the time limit"}
	ErrHidden       = sni.Alert{Description: sni.InternalError, Reason: "a client with Encrypted Client Hello cannot be handed over, since its second hello may have to be opened: this host needs a stream socket"}

	ErrClogged       = sni.Alert{Description: sni.InternalError, Reason: "too many descriptors that backends of this tenant have passed wait to be closed"}
	ErrLookups       = sni.Alert{Description: sni.InternalError, Reason: "too many look-ups wait for a file system"}
	ErrLookupTimeout = sni.Alert{Description: sni.UserCanceled, Reason: "the look-up has waited for a file system until the time limit"}
)

// Reasons to close a connection that must begin with a PROXY header, besides those of package
// proxyproto.
var (
	ErrHeaderEnded = errors.New("the connection ended within the PROXY protocol header")
	ErrHeaderLate  = errors.New("no complete PROXY protocol header within the time limit")
)

// Ended is why a client is refused that has ended before its server name, or before the end of its
// hello where that is waited for. The parser has what it sent, and is nil if that is nothing.
func Ended(p *sni.Parser) error { return early(p, ErrEmpty, ErrEOF, ErrEOFAfter) }

// Late is why a client is refused that has not sent that in time.
func Late(p *sni.Parser) error { return early(p, ErrSilent, ErrTimeout, ErrTimeoutAfter) }

func early(p *sni.Parser, nothing, part, named error) error {
	if p == nil {
		return nothing
	}
	if err := p.Foreign(); err != nil {
		return err
	}
	if _, done, _ := p.Parse(nil); done {
		return named
	}
	return part
}

// Alert turns the failure of a connection that has no backend into the alert for its client. The
// name is empty if the client sent none, or none that is canonical; address tells whether it sent
// an IPv6 address in place of one.
func Alert(name []byte, address bool, err error) sni.Alert {
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
				return nameless(address, host.Ignored)
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
func nameless(address, ignored bool) sni.Alert {
	alert := sni.Alert{Description: sni.UnrecognizedName, Reason: "no server name"}
	if address {
		alert.Reason = "no server name but an IPv6 address"
	}
	if ignored {
		alert.Reason += ", and the directory * belongs neither to root nor to the owner of the hosts directory"
	}
	return alert
}

// Refuse counts a client that is refused, and logs why. The name is empty if the client did not
// send a canonical one: what it did send may be anything, and is never printed. A client that has
// ended without having sent a byte is a health check or a scan: lines about those would leave no
// room for others.
func (n *Counters) Refuse(client socket.Address, name []byte, alert sni.Alert) {
	if alert == ErrEmpty {
		n.Empty.Add(1)
		return
	}
	n.Refused[alert.Description].Add(1)
	logline.Rationed(func() string {
		if len(name) == 0 {
			return fmt.Sprintf("refused %v: %v", client, alert)
		}
		return fmt.Sprintf("refused %v for %s: %v", client, name, alert)
	})
}

// CloseUnheaded counts a connection that does not begin with a PROXY header and must, and logs why
// it is closed. What sends no header is no client of the balancer's that waits for an alert.
func (n *Counters) CloseUnheaded(peer socket.Address, why error) {
	n.Shut.Add(1)
	logline.Rationed(func() string {
		return fmt.Sprintf("refused %v: %v; .accept-proxy asks for one (closed without an alert)", peer, why)
	})
}

// Unanswered logs that a backend of a tenant has ended without having sent a byte, before its
// client did: most often it does not expect what the markers say. Proxy is the version of the PROXY
// header that it was sent, and name the one that the client asked for, nil if that is not known any
// more.
func Unanswered(client socket.Address, tenant fmt.Stringer, name []byte, proxy uint8) {
	whose := tenant.String()
	logline.RationedFor(whose, func() string {
		backend := "a backend of " + whose
		switch {
		case len(name) > 0:
			backend = "the backend of " + string(name)
		case name != nil:
			backend = "the backend of *"
		}
		return fmt.Sprintf("%s has closed %v without an answer; %s", backend, client, hostdir.Expects(proxy))
	})
}

// Dropped logs that a client that waits is dropped to make room.
func Dropped(client socket.Address) {
	logline.Rationed(func() string {
		return fmt.Sprintf("dropped %v to make room: no descriptor is left, and it has waited longest; raise the limit (ulimit -n, LimitNOFILE=)", client)
	})
}

// Reset logs that a relay of a tenant is ended to make room for another tenant's.
func Reset(client socket.Address, tenant fmt.Stringer) {
	logline.Rationed(func() string {
		return fmt.Sprintf("reset %v to make room: no descriptor is left, and %v has the most connections; raise the limit (ulimit -n, LimitNOFILE=)", client, tenant)
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
