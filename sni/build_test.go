package sni

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sniproxy/sni/snitest"
)

// give gives a Parser more bytes, and returns its answer as text: the name, or the error, or
// nothing.
func give(p *Parser, b []byte) string {
	name, done, err := p.Parse(b)
	if done && err == nil && len(name) == 0 && p.Address() {
		return isAddress
	}
	if done && err == nil && len(name) == 0 {
		return isNameless
	}
	return text(name, err)
}

// isNameless is the text of the answer that there is no name, isAddress that of an IPv6 address in
// its place.
const (
	isNameless = "nameless, which is no error"
	isAddress  = "an IPv6 address, which is no error"
)

// text is the result of Parse as text.
func text(name []byte, err error) string {
	if err != nil {
		return err.Error()
	}
	return string(name)
}

// parse is the answer of a new Parser to a stream, as text.
func parse(pieces ...[]byte) (s string) {
	var p Parser
	for _, b := range pieces {
		s = give(&p, b)
	}
	return s
}

// alertText is the text of an answer that must have the description.
func alertText(t *testing.T, a answer, d Description) string {
	t.Helper()
	var alert Alert
	if !errors.As(alerts[a], &alert) || alert.Description != d {
		t.Fatalf("%v does not have the description %v", alerts[a], d)
	}
	return alert.Error()
}

// checkStream checks that the answer to a stream is want, and that it does not depend on where the
// stream is cut. It returns the number of bytes that the answer took.
func checkStream(t *testing.T, stream []byte, want string) (end int) {
	t.Helper()
	if got := parse(stream); got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
	var p Parser // given the bytes one by one
	for i := range stream {
		// Up to here in one call: the same state. The rest in one call: the same answer. So cuts in
		// between make no difference either.
		var whole Parser
		if got := give(&whole, stream[:i]); got != "" || whole != p {
			t.Fatalf("after %d bytes: got %q and\n%+v, byte by byte\n%+v", i, got, whole, p)
		}
		if got := give(&whole, stream[i:]); got != want {
			t.Fatalf("cut after %d bytes: got %q, want %q", i, got, want)
		}
		if got := give(&p, stream[i:][:1]); got != "" {
			if got != want {
				t.Fatalf("byte by byte: got %q, want %q", got, want)
			}
			return i + 1
		}
	}
	t.Fatalf("byte by byte: no answer, want %q", want)
	return 0
}

// checkMessage does the same for a message in records of several sizes, and checks that its answer
// comes at the same byte of it in all of them. It returns the number of bytes of the message that
// the answer took.
func checkMessage(t *testing.T, msg []byte, want string) (end int) {
	t.Helper()
	for _, size := range []int{maxRecord, 100, 3, 2, 1} {
		n := checkStream(t, snitest.Records(msg, size), want)
		n -= recordHeader * ((n-1)/(recordHeader+size) + 1) // the headers
		if end == 0 {
			end = n
		}
		if n != end {
			t.Errorf("records of %d bytes: answer after %d bytes of the message, want %d", size, n, end)
		}
	}
	return end
}

// A capture is what a program sent.
type capture struct {
	file, name string
	stream     []byte
}

// captures reads the files in testdata/hellos.
func captures(t testing.TB) []capture {
	t.Helper()
	files, err := filepath.Glob("testdata/hellos/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no hellos in testdata: %v", err)
	}
	var all []capture
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c := capture{file: strings.TrimSuffix(filepath.Base(file), ".txt")}
		var dump strings.Builder
		for line := range strings.Lines(string(b)) {
			if comment, ok := strings.CutPrefix(line, "# "); ok {
				if name, ok := strings.CutPrefix(comment, "name: "); ok {
					c.name = strings.TrimSpace(name)
				}
				continue
			}
			dump.WriteString(line)
			// The form of hex.Dump: an address of 10 bytes, 16 times a byte in hexadecimal with a
			// gap in the middle, and the text.
			digits, _, _ := strings.Cut(line[10:], "|")
			row, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			c.stream = append(c.stream, row...)
		}
		if c.name == "" || dump.String() != hex.Dump(c.stream) {
			t.Fatalf("%s: not a name and a dump", file)
		}
		all = append(all, c)
	}
	return all
}

// cryptoTLS is the server name that crypto/tls finds in a stream, if it accepts the ClientHello in
// it at all.
func cryptoTLS(stream []byte) (name string, ok bool) {
	config := &tls.Config{GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		name, ok = info.ServerName, true
		return nil, errors.New("seen enough")
	}}
	_ = tls.Server(streamConn{Reader: bytes.NewReader(stream)}, config).Handshake()
	return name, ok
}

// A streamConn is a connection that has sent a stream and hears nothing.
type streamConn struct {
	net.Conn
	*bytes.Reader
}

func (c streamConn) Read(b []byte) (int, error)  { return c.Reader.Read(b) }
func (c streamConn) Write(b []byte) (int, error) { return len(b), nil }

// checkAgainstCryptoTLS checks that where crypto/tls accepts a ClientHello, the Parser has found
// the same name, or that it is nameless. But crypto/tls does not check the bounds of what stands
// before the extensions.
func checkAgainstCryptoTLS(t *testing.T, msg []byte) {
	t.Helper()
	stream := snitest.Records(msg, maxRecord)
	if len(stream) > MaxHello {
		return
	}
	name, ok := cryptoTLS(stream)
	if !ok {
		return
	}
	canonical, err := AppendCanonical(nil, []byte(name))
	want := []string{text(canonical, err)}
	if err == alerts[address6] {
		want = []string{isAddress}
	}
	if name == "" {
		want = []string{isNameless}
		body := reader{b: msg[4+versionRandom:]}
		sessionID, ciphers, methods := body.vector(1).b, body.vector(2).b, body.vector(1).b
		if len(sessionID) > 32 || len(ciphers) == 0 || len(methods) == 0 {
			want = nil
			for _, a := range []answer{longSessionID, badCipherSuites, noCompression} {
				want = append(want, alertText(t, a, DecodeError))
			}
		}
	}
	if got := parse(stream); !slices.Contains(want, got) {
		t.Errorf("got %q, want %q\n%x", got, want, msg)
	}
}
