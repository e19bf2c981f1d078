package ech

import (
	"crypto/hpke"
	"errors"
	"fmt"
	"slices"

	"sniproxy/sni"
)

// A Session is the way of a connection from its first hello, which was opened, to the point from
// which on bytes pass as they are. It is not safe for concurrent use.
type Session struct {
	recipient *hpke.Recipient
	id        uint8
	suite     suite
	answer    answer
	found     found

	// The client's bytes, record by record: those of handshake messages are held back.
	header [recordHeader]byte
	got    int // bytes of the header
	left   int // bytes of the record that pass
	held   []byte
	hello  Scanner // of what is held
}

// found is what is known of a backend's answer.
type found uint8

const (
	nothing      found = iota // not enough of it has come
	retryRequest              // it is a HelloRetryRequest, and the second hello has not come
	over                      // there is nothing to hold back any more
)

// Alerts for second hellos: RFC 9849, Section 7.1.1.
var (
	noECH          = sni.Alert{Description: sni.MissingExtension, Reason: "client hello has no encrypted_client_hello extension"}
	malformedHello = sni.Alert{Description: sni.DecodeError, Reason: "a length in the client hello does not fit"}
	otherKey       = illegal("config id or cipher suite is not that of the first client hello")
	newEnc         = illegal("client hello has an encapsulated key of its own")
	undecryptable  = sni.Alert{Description: sni.DecryptError, Reason: "client hello cannot be decrypted"}
	endedWithin    = sni.Alert{Description: sni.DecodeError, Reason: "the client ended the connection within its client hello"}

	// ErrLate is for a client that does not send its second hello in time.
	ErrLate error = sni.Alert{Description: sni.UserCanceled, Reason: "no complete second client hello within the time limit"}

	tooMuch = sni.Alert{Description: sni.InternalError, Reason: "more than 64 KiB of handshake records before the backend has answered"}
)

// FromBackend looks at bytes that the backend has sent. They pass unchanged. When it has returned
// true, call [Session.FromClient].
func (s *Session) FromBackend(b []byte) bool {
	if s.found == nothing {
		s.found = s.answer.read(b)
		return s.found != nothing
	}
	return false
}

// BackendEnded is FromBackend for the end of what the backend sends.
func (s *Session) BackendEnded() bool {
	before := s.found
	if before == nothing {
		s.found = over
	}
	return s.found != before
}

// Retries reports whether the backend has asked for a second hello, which has not come yet.
func (s *Session) Retries() bool { return s.found == retryRequest }

// Over reports whether all bytes pass from now on: the Session is not needed any more.
func (s *Session) Over() bool { return s.found == over && len(s.held) == 0 }

// FromClient takes bytes that the client has sent, or none, and appends to dst what the backend is
// to get now. The error is an [sni.Alert] for the client: nothing passes any more then.
func (s *Session) FromClient(dst, b []byte) ([]byte, error) {
	for len(b) > 0 {
		n := len(b)
		switch {
		case s.found == over && len(s.held) == 0:
			dst = append(dst, b...)
		case len(s.held) > 0 || s.left == 0 && s.got == 0 && b[0] == handshake:
			s.held = append(s.held, b...)
		case s.left > 0:
			n = min(n, s.left)
			dst = append(dst, b[:n]...)
			s.left -= n
		default:
			n = copy(s.header[s.got:], b)
			dst = append(dst, b[:n]...)
			if s.got += n; s.got == recordHeader {
				s.got, s.left = 0, length(s.header[:])
			}
		}
		b = b[n:]
	}
	switch {
	case len(s.held) == 0:
		return dst, nil
	case s.found == retryRequest:
		return s.readSecond(dst)
	case s.found == nothing && len(s.held) > sni.MaxHello:
		return dst, tooMuch
	case s.found == over:
		dst = append(dst, s.held...)
		s.held = nil
	}
	return dst, nil
}

// ClientEnded is FromClient for the end of what the client sends. The Session is over.
func (s *Session) ClientEnded(dst []byte) ([]byte, error) {
	if s.found == retryRequest && len(s.held) > 0 {
		return dst, second(endedWithin)
	}
	dst = append(dst, s.held...)
	s.held, s.found = nil, over
	return dst, nil
}

// readSecond opens the second hello, if it is complete.
func (s *Session) readSecond(dst []byte) ([]byte, error) {
	end, err := s.hello.End(s.held)
	if err == nil && end == 0 {
		return dst, nil
	}
	var inner []byte
	if err == nil {
		inner, err = s.open(contents(s.held[:end]))
	}
	if err != nil {
		return dst, second(err)
	}
	// Go's crypto/tls wants this version: the client has seen a ServerHello.
	dst = appendRecords(dst, tls12, inner)
	dst = append(dst, s.held[end:]...)
	s.held, s.found = nil, over
	return dst, nil
}

// open opens the second hello.
func (s *Session) open(msg []byte) ([]byte, error) {
	h, ok := parseOuter(msg)
	switch {
	case !ok:
		return nil, malformedHello
	case h.ech == nil:
		return nil, noECH
	}
	e, err := h.extension()
	switch {
	case err != nil:
		return nil, err
	case e.id != s.id || e.suite != s.suite:
		return nil, otherKey
	case len(e.enc) > 0:
		return nil, newEnc
	}
	encoded, err := s.recipient.Open(h.aad(e), e.payload)
	if err != nil {
		return nil, undecryptable
	}
	return h.inner(encoded)
}

// second returns an alert for a second hello.
func second(err error) error {
	var a sni.Alert
	if !errors.As(err, &a) {
		return err
	}
	return sni.Alert{Description: a.Description, Reason: fmt.Sprintf("after a HelloRetryRequest: %s", a.Reason)}
}

// An answer is the beginning of what the backend sends: the header of a ServerHello, and its
// random. That may be cut into records of any size.
type answer struct {
	header [recordHeader]byte
	got    int // bytes of the header
	left   int // bytes of the record
	begin  [messageHeader + 2 + 32]byte
	size   int // bytes of begin
}

// retryRandom is the random of a HelloRetryRequest: RFC 8446, Section 4.1.3.
var retryRandom = []byte{
	0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
	0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
}

// read reads more of the answer, and tells what it is. What is no handshake record, and what is no
// ServerHello, asks for no second hello.
func (a *answer) read(b []byte) found {
	for len(b) > 0 {
		if a.left == 0 {
			n := copy(a.header[a.got:], b)
			a.got += n
			b = b[n:]
			if a.header[0] != handshake {
				return over
			}
			if a.got == recordHeader {
				a.got, a.left = 0, length(a.header[:])
			}
			continue
		}
		n := copy(a.begin[a.size:], b[:min(len(b), a.left)])
		a.size += n
		a.left -= n
		b = b[n:]
		switch {
		case a.begin[0] != serverHello:
			return over
		case a.size < len(a.begin):
		case slices.Equal(a.begin[len(a.begin)-len(retryRandom):], retryRandom):
			return retryRequest
		default:
			return over
		}
	}
	return nothing
}
