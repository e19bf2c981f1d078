package sni

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sniproxy/sni/snitest"
)

// Goal: no panic; a name is canonical; the answer is stable under longer input, and does not depend
// on how the stream is cut.
//
// For an input in testdata/fuzz its file's name says, up to the dot, what the answer to its stream
// is: "name", "nameless", "pending", or the alert.
func FuzzParse(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(c.stream, c.stream, uint16(7))
	}
	f.Add(snitest.Records(ordinary("example.com").Bytes, 40), []byte{}, uint16(50))
	for _, s := range signatures {
		f.Add([]byte(s.begin), []byte{1, 2, 3}, uint16(1))
	}
	f.Add(snitest.Records(snitest.ClientHello{CipherSuites: MaxHello - 4}.Build().Bytes, maxRecord), []byte{}, uint16(999))
	f.Fuzz(func(t *testing.T, stream, more []byte, size uint16) {
		var p Parser
		got := give(&p, stream)
		name, _, _ := p.Parse(nil)
		if len(name) > 0 && (len(name) > MaxName || !canonicalName.Match(name)) {
			t.Errorf("%q is not canonical", name)
		}
		if got == "" && len(stream) >= MaxHello {
			t.Error("no answer after MaxHello bytes")
		}
		if cannot := len(stream) > 0 && stream[0] != handshake; (p.Foreign() != nil) != (cannot && got == "") {
			t.Errorf("the answer is %q, and Foreign returns %v", got, p.Foreign())
		}
		if want, _, ok := strings.Cut(filepath.Base(t.Name()), "."); ok {
			if word := answerWord(&p); word != want {
				t.Errorf("got %s: %q", word, got)
			}
		}

		for _, n := range []int{1, int(size) + 1} {
			if cut := parse(slices.Collect(slices.Chunk(stream, n))...); cut != got {
				t.Errorf("in pieces of %d bytes: got %q, want %q", n, cut, got)
			}
		}

		longer := give(&p, more)
		if got != "" && longer != got {
			t.Errorf("with more behind it: got %q, want %q", longer, got)
		}
		if whole := parse(append(stream[:len(stream):len(stream)], more...)); whole != longer {
			t.Errorf("whole: got %q, want %q", whole, longer)
		}
	})
}

// answerWord names the kind of a Parser's answer, like the files in testdata/fuzz.
func answerWord(p *Parser) string {
	name, done, err := p.Parse(nil)
	var alert Alert
	switch {
	case errors.As(err, &alert):
		return alert.Description.String()
	case !done:
		return "pending"
	case len(name) == 0:
		return "nameless"
	}
	return "name"
}

// Goal: the answer does not depend on how a message is put into records.
func FuzzResplit(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(snitest.Payload(c.stream), []byte{1, 99, 2})
	}
	f.Fuzz(func(t *testing.T, msg, sizes []byte) {
		// In records of one byte it must still be within the limit.
		msg = msg[:min(len(msg), MaxHello/(recordHeader+1)-1)]
		var split []byte
		rest := msg
		for i := 0; len(rest) > 0; i++ {
			n := 1
			if len(sizes) > 0 {
				n += int(sizes[i%len(sizes)])
			}
			n = min(n, len(rest))
			split = append(split, snitest.Records(rest[:n], n)...)
			rest = rest[n:]
		}
		want := parse(snitest.Records(msg, maxRecord))
		if got := parse(split); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// Goal: a hello is nameless exactly if it is, read as a whole, complete and valid and without a
// host name; and it is not before its last byte has come.
func FuzzNameless(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(snitest.Payload(c.stream))
	}
	for _, h := range namelessHellos() {
		f.Add(h.hello.Bytes)
	}
	f.Add(snitest.ClientHello{SessionID: 33, CipherSuites: -1, CompressionMethods: -1}.Build().Bytes)
	f.Fuzz(func(t *testing.T, msg []byte) {
		msg = msg[:min(len(msg), maxRecord)]
		end, want := readNameless(msg)
		for _, c := range []struct {
			msg  []byte
			want bool
		}{
			{msg, want},
			{msg[:end], want},
			{msg[:max(end-1, 0)], false},
		} {
			if got := parse(snitest.Records(c.msg, maxRecord)) == isNameless; got != c.want {
				t.Errorf("after %d bytes: nameless is %v, want %v", len(c.msg), got, c.want)
			}
		}
	})
}

// Goal: where crypto/tls accepts a hello, the name is the same, or it is nameless to both.
func FuzzCryptoTLS(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(snitest.Payload(c.stream))
	}
	f.Add(ordinary("WWW.example.com").Bytes)
	for _, h := range namelessHellos() {
		f.Add(h.hello.Bytes)
	}
	f.Add(snitest.NameList(func(m *snitest.Message) { m.Entry(1, "other"); m.Entry(snitest.HostName, "example.com") }).Bytes)
	f.Fuzz(checkAgainstCryptoTLS)
}

// Goal: the canonical form is canonical by the rule said another way, is its own canonical form,
// and differs from the name in the case of ASCII letters, and by one dot at the end, only; and what
// is refused has none. An IPv6 address is what package net/netip takes for one.
func FuzzCanonical(f *testing.F) {
	for _, name := range []string{
		"example.com", "A_b-.EXAMPLE", "a..b", "-a", "a.", "a..", "\u212a", longest, longest + "d", longest + ".", "",
		"a:1", "a:b", "*.a", "https://a/", "a b", "[a]", "a@b",
	} {
		f.Add([]byte(name))
	}
	for _, name := range ipv6Names {
		f.Add([]byte(name))
	}
	f.Fuzz(func(t *testing.T, name []byte) {
		lower := slices.Clone(name)
		for i, c := range lower {
			if 'A' <= c && c <= 'Z' {
				lower[i] = c | 0x20
			}
		}
		checkIPv6(t, name)
		if n := len(lower) - 1; n > 0 && lower[n] == '.' {
			lower = lower[:n]
		}
		canonical, err := AppendCanonical(nil, name)
		if want := len(lower) <= MaxName && canonicalName.Match(lower); want != (err == nil) {
			t.Fatalf("%q: got %v", name, err)
		}
		if err != nil {
			return
		}
		if !slices.Equal(canonical, lower) {
			t.Errorf("%q: got %q, want %q", name, canonical, lower)
		}
		again, err := AppendCanonical(canonical[:0], canonical)
		if err != nil || !slices.Equal(again, lower) {
			t.Errorf("%q again: got %q, %v", lower, again, err)
		}
	})
}
