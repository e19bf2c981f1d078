package ech

import (
	"bytes"
	"crypto/tls"
	"testing"

	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: whatever a client encrypts, and in whatever outer hello: no panic; the answer does not
// depend on how the hello is cut; the inner hello is not longer than the outer one, is complete,
// has a name or an alert, and none below TLS 1.3; the second hello has the same answer as the
// first.
func FuzzOpen(f *testing.F) {
	k, err := ParseKey([]byte(example))
	if err != nil {
		f.Fatal(err)
	}
	extensions := func(add func(m *snitest.Message)) []byte {
		var m snitest.Message
		add(&m)
		return m.Bytes
	}
	before, after := extensions(outerBefore), extensions(outerAfter)
	for i, test := range badInners() {
		if i < 40 || i%7 == 0 {
			f.Add(test.encoded, before, after, uint16(100))
		}
	}
	f.Add(snitest.Inner("hidden.example", referring(10, 30, 40)), before, after, uint16(7))
	real := snitest.Payload(snitest.HelloConfig(&tls.Config{ServerName: "hidden.example", MinVersion: tls.VersionTLS13}))
	f.Add(append(append(bytes.Clone(real[4:38]), 0), real[38+33:]...), before, after, uint16(1))
	f.Fuzz(func(t *testing.T, encoded, before, after []byte, size uint16) {
		if len(encoded)+len(before)+len(after) > 50_000 {
			return
		}
		raw := func(b []byte) func(m *snitest.Message) { return func(m *snitest.Message) { m.Raw(b...) } }
		s := snitest.NewSealer(k.ConfigList())
		msg := s.Seal("public.example", encoded, raw(before), raw(after)).Bytes
		stream := snitest.Records(msg, int(size)+1)
		if len(stream) > sni.MaxHello {
			return
		}
		inner, session, _, err := open(stream, k)
		whole, _, _, other := open(snitest.Records(msg, 16384), k)
		if !bytes.Equal(inner, whole) || text(err) != text(other) {
			t.Errorf("cut it is %x, %v, and whole %x, %v", inner, err, whole, other)
		}
		if (session != nil) != (inner != nil) || session != nil && err != nil {
			t.Errorf("session %v, inner hello %x, error %v", session, inner, err)
		}
		if session == nil {
			return
		}
		checkInner(t, inner, msg)
		session.FromBackend(snitest.ServerHello(true))
		s.Enc = nil
		second := snitest.Records(s.Seal("public.example", encoded, raw(before), raw(after)).Bytes, int(size)+1)
		got, err := session.FromClient(nil, second)
		if err != nil || !bytes.Equal(contents(got), contents(inner)) {
			t.Errorf("the second hello is %x, %v, and the first was %x", got, err, inner)
		}
	})
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// checkInner checks what is promised of an inner hello.
func checkInner(t *testing.T, inner, outer []byte) {
	t.Helper()
	msg := contents(inner)
	if len(msg) > len(outer) {
		t.Errorf("%d bytes of %d", len(msg), len(outer))
	}
	var scanner Scanner
	if end, err := scanner.End(inner); end != len(inner) || err != nil {
		t.Errorf("%d of %d bytes are a hello, error %v", end, len(inner), err)
	}
	var p sni.Parser
	if _, done, _ := p.Parse(inner); !done {
		t.Error("the parser wants more than the hello")
	}
	h, ok := parseOuter(msg)
	if !ok || !bytes.Equal(h.ech, []byte{1}) || h.second {
		t.Errorf("it is no hello with one extension of type inner: %x", msg)
	}
	for list := (reader{b: h.extensions}); len(list.b) > 0; {
		switch kind, body := list.uint16(), list.vector16(); kind {
		case outerExtensions:
			t.Error("it refers to the outer hello")
		case supportedVersions:
			if !newVersions(body) {
				t.Errorf("versions %x", body)
			}
		}
	}
}

// Goal: whatever comes from the network: no panic, and what was opened cannot have been changed.
func FuzzOpenNetwork(f *testing.F) {
	k, err := ParseKey([]byte(example))
	if err != nil {
		f.Fatal(err)
	}
	s := snitest.NewSealer(k.ConfigList())
	good := s.Seal("public.example", snitest.Inner("hidden.example", nil), outerBefore, outerAfter)
	f.Add(good.Stream(), uint16(40))
	f.Add(snitest.Records(good.Bytes, 9), uint16(3))
	f.Add(withExtension([]byte{1}), uint16(3))
	f.Add(withExtension(s.Extension([]byte{1})), uint16(3))
	f.Add(snitest.Hello("one.example"), uint16(3))
	f.Fuzz(func(t *testing.T, stream []byte, at uint16) {
		inner, session, rest, err := open(stream, k)
		if session == nil {
			return
		}
		if err != nil {
			t.Error(err)
		}
		msg := bytes.Clone(contents(stream[:len(stream)-len(rest)]))
		checkInner(t, inner, msg)
		msg[4+int(at)%(len(msg)-4)] ^= 1
		if _, session, _, _ := open(snitest.Records(msg, 16384), k); session != nil {
			t.Errorf("%x was opened in place of %x", msg, stream)
		}
	})
}

// Goal: whatever client and backend send: no panic, nothing is lost or comes twice, in whatever
// order the bytes of both come.
func FuzzSession(f *testing.F) {
	k, err := ParseKey([]byte(example))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{}, snitest.ServerHello(false), []byte{1, 2, 3}, true)
	f.Add(between, snitest.ServerHello(true), []byte{100, 200}, true)
	f.Add(withExtension([]byte{1}), snitest.ServerHello(true), []byte{255, 255}, false)
	f.Add(append(bytes.Clone(between), snitest.Hello("x.example")...), []byte("HTTP/1.0"), []byte{7}, false)
	f.Fuzz(func(t *testing.T, client, backend, order []byte, ends bool) {
		s := begin(t, k)
		var got []byte
		take := func(b []byte, err error) bool {
			got = b
			return err == nil
		}
		left, answer := client, backend
		for i := 0; len(left)+len(answer) > 0; i++ {
			n := 1 << 16
			if i < len(order) {
				n = int(order[i])
			}
			if part := answer[:min(n/2, len(answer))]; len(part) > 0 {
				answer = answer[len(part):]
				if s.FromBackend(part) && !take(s.FromClient(got, nil)) {
					return
				}
			}
			part := left[:min(n, len(left))]
			left = left[len(part):]
			if !take(s.FromClient(got, part)) {
				return
			}
			if len(s.held) > sni.MaxHello {
				t.Fatalf("%d bytes are held", len(s.held))
			}
			if s.Over() && !bytes.Equal(got, client[:len(client)-len(left)]) {
				t.Fatal("over, and not all has passed")
			}
		}
		if ends {
			s.BackendEnded()
			if !take(s.FromClient(got, nil)) {
				return
			}
		}
		if take(s.ClientEnded(got)) && !bytes.Equal(got, client) {
			t.Errorf("%x passed of %x", got, client)
		}
	})
}
