package ech

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// newTestKey returns a new key.
func newTestKey(t testing.TB) *Key {
	t.Helper()
	k, err := GenerateKey("public.example")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// open opens a stream that begins with a hello, and returns the inner hello, and what stands behind
// the hello.
func open(stream []byte, keys ...*Key) (inner []byte, s *Session, rest []byte, err error) {
	var scanner Scanner
	end, err := scanner.End(stream)
	if err != nil || end == 0 {
		return nil, nil, nil, err
	}
	inner, s, err = Open(nil, keys, stream[:end])
	return inner, s, stream[end:], err
}

// nameIn is the answer of a [sni.Parser].
func nameIn(t testing.TB, stream []byte) string {
	t.Helper()
	var p sni.Parser
	name, done, err := p.Parse(stream)
	if err != nil || !done {
		t.Fatalf("done %v, error %v", done, err)
	}
	return string(name)
}

// expectAlert fails the test unless err is an alert with the description, and its reason has the
// part.
func expectAlert(t testing.TB, what string, err error, want sni.Description, part string) {
	t.Helper()
	var alert sni.Alert
	if !errors.As(err, &alert) || alert.Description != want || !strings.Contains(alert.Reason, part) {
		t.Errorf("%s: %v, want alert %d with %q", what, err, want, part)
	}
}

// Goal: what crypto/tls encrypts is opened, with each suite, and is a hello that crypto/tls
// accepts, with the session id of the outer one.
func TestOpen(t *testing.T) {
	k := newTestKey(t)
	for i := range k.suites {
		list := k.ConfigList()
		// A client takes the first suite that it knows.
		copy(list[45:], bytes.Repeat(list[45+4*i:][:4], len(k.suites)))
		one, err := newKey(k.seed)
		if err == nil {
			err = one.findConfig(list)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, protos := range []int{0, 1500} { // also one of more than one record
			hello := snitest.HelloConfig(&tls.Config{ServerName: "Hidden.example", EncryptedClientHelloConfigList: list,
				NextProtos: slices.Repeat([]string{"some-protocol"}, protos)})
			inner, s, rest, err := open(append(hello, "more"...), newTestKey(t), one)
			if err != nil || s == nil || string(rest) != "more" {
				t.Fatalf("suite %d: session %v, error %v, %q behind it", i, s, err, rest)
			}
			if name := nameIn(t, inner); name != "hidden.example" {
				t.Errorf("the name is %s", name)
			}
			var scanner Scanner
			if end, err := scanner.End(inner); err != nil || end != len(inner) {
				t.Errorf("%d of %d bytes are a hello, error %v", end, len(inner), err)
			}
			msg, outer := contents(inner), contents(hello)
			if !bytes.Equal(msg[38:][:33], outer[38:][:33]) || outer[38] != 32 {
				t.Errorf("session id %x in place of %x", msg[38:][:33], outer[38:][:33])
			}
			if !bytes.Equal(inner[:3], hello[:3]) {
				t.Errorf("record version %x in place of %x", inner[:3], hello[:3])
			}
		}
	}
}

// Goal: however a hello is cut, it is opened as soon as its last byte is there, and not before.
func TestScanner(t *testing.T) {
	k := newTestKey(t)
	msg := snitest.NewSealer(k.ConfigList()).Seal("public.example", snitest.Inner("hidden.example", nil), nil, nil)
	for _, size := range []int{1, 2, 3, 5, 100, 16384} {
		stream := snitest.Records(msg.Bytes, size)
		var s Scanner
		for n := range stream {
			if end, err := s.End(stream[:n]); end != 0 || err != nil {
				t.Fatalf("records of %d: after %d of %d bytes: %d, %v", size, n, len(stream), end, err)
			}
		}
		more := append(bytes.Clone(stream), 20, 3, 3, 0, 1, 1)
		if end, err := s.End(more); end != len(stream) || err != nil {
			t.Errorf("records of %d: the hello ends at %d of %d, error %v", size, end, len(stream), err)
		}
		inner, session, _, err := open(more, k)
		if err != nil || session == nil || nameIn(t, inner) != "hidden.example" {
			t.Errorf("records of %d: %v", size, err)
		}
	}
	record := snitest.Record
	for what, test := range map[string]struct {
		stream []byte
		want   sni.Description
		part   string
	}{
		"another record type":   {append(record(22, msg.Bytes[:50]...), record(20, 1)...), sni.UnexpectedMessage, "another record type"},
		"another type at once":  {record(23, 1), sni.UnexpectedMessage, "another record type"},
		"an empty record":       {append(record(22, msg.Bytes[:50]...), record(22)...), sni.DecodeError, "empty"},
		"a long record":         {append(record(22, msg.Bytes[:50]...), 22, 3, 1, 0x40, 1), sni.RecordOverflow, "2^14"},
		"another message":       {record(22, 2), sni.UnexpectedMessage, "not a client hello"},
		"no end":                {snitest.Records(append([]byte{1, 1, 0, 0}, make([]byte, 70_000)...), 16384)[:sni.MaxHello], sni.InternalError, "64 KiB"},
		"no end in a long one":  {snitest.Records(append([]byte{1, 0xff, 0xff, 0xff}, make([]byte, 70_000)...), 100)[:sni.MaxHello], sni.InternalError, "64 KiB"},
		"another type within 1": {append(record(22, 1), 23), sni.UnexpectedMessage, "another record type"},
	} {
		for n := range test.stream {
			var s Scanner
			if end, err := s.End(test.stream[:n]); end != 0 {
				t.Errorf("%s: after %d bytes: %d, %v", what, n, end, err)
			} else if n > 100 && n < len(test.stream)-1 && what == "no end" {
				break
			}
		}
		var s Scanner
		_, err := s.End(test.stream)
		expectAlert(t, what, err, test.want, test.part)
	}
}

// Goal: what is not encrypted to a key passes, whatever it is, and costs no decryption if the id or
// the suite is another one.
func TestOpenPasses(t *testing.T) {
	k := newTestKey(t)
	foreign := newTestKey(t)
	for foreign.ID() == k.ID() {
		foreign = newTestKey(t)
	}
	inner := snitest.Inner("hidden.example", nil)
	sealed := func(change func(*snitest.Sealer)) []byte {
		s := snitest.NewSealer(k.ConfigList())
		change(s)
		return s.Seal("public.example", inner, nil, nil).Bytes
	}
	flipped := sealed(func(*snitest.Sealer) {})
	flipped[len(flipped)-1] ^= 1
	random := bytes.Clone(flipped)
	random[10] ^= 1
	random[len(random)-1] ^= 1
	truncated := snitest.ClientHello{Extensions: func(m *snitest.Message) { m.Raw(0, 0, 0, 9, 1) }}.Build().Bytes
	for what, msg := range map[string][]byte{
		"no extension":            snitest.Named("public.example").Bytes,
		"no extensions":           snitest.ClientHello{}.Build().Bytes,
		"another's key":           snitest.NewSealer(foreign.ConfigList()).Seal("public.example", inner, nil, nil).Bytes,
		"another id":              sealed(func(s *snitest.Sealer) { s.ID++ }),
		"another suite":           sealed(func(s *snitest.Sealer) { s.AEAD = 9 }),
		"an empty key":            sealed(func(s *snitest.Sealer) { s.Enc = nil }),
		"a short key":             sealed(func(s *snitest.Sealer) { s.Enc = s.Enc[1:] }),
		"a long key":              sealed(func(s *snitest.Sealer) { s.Enc = append(s.Enc, 0) }),
		"a key of zeros":          sealed(func(s *snitest.Sealer) { s.Enc = make([]byte, 32) }),
		"a changed payload":       flipped,
		"a changed hello":         random,
		"a length that is no use": truncated,
		"a message with more":     append(snitest.Named("public.example").Bytes, 0),
	} {
		got, s, _, err := open(snitest.Records(msg, 16384), k)
		if got != nil || s != nil || err != nil {
			t.Errorf("%s: session %v, error %v", what, s, err)
		}
	}
	stream := snitest.Records(snitest.NewSealer(foreign.ConfigList()).Seal("public.example", inner, nil, nil).Bytes, 16384)
	keys := []*Key{k}
	if n := testing.AllocsPerRun(100, func() { Open(nil, keys, stream) }); n != 0 {
		t.Errorf("a hello for another key takes %v allocations", n)
	}
}

// Goal: what is wrong with the extension itself is refused, whatever the keys are.
func TestOpenRefusesExtension(t *testing.T) {
	k := newTestKey(t)
	s := snitest.NewSealer(k.ConfigList())
	good := s.Extension([]byte{1})
	for n := range good {
		expectExtension(t, k, fmt.Sprintf("%d of %d bytes", n, len(good)), sni.DecodeError, good[:n])
	}
	expectExtension(t, k, "too long", sni.DecodeError, append(bytes.Clone(good), 0))
	expectExtension(t, k, "without payload", sni.DecodeError, s.Extension(nil))
	expectExtension(t, k, "of another type", sni.DecodeError, append([]byte{2}, good[1:]...))
	expectExtension(t, k, "two", sni.DecodeError, good, good)
	expectExtension(t, k, "of type inner", sni.IllegalParameter, []byte{1})
	expectExtension(t, k, "of type inner and more", sni.IllegalParameter, []byte{1, 0})
}

func expectExtension(t *testing.T, k *Key, what string, want sni.Description, bodies ...[]byte) {
	t.Helper()
	msg := snitest.ClientHello{Extensions: func(m *snitest.Message) {
		for _, body := range bodies {
			m.Extension(snitest.ECH, body)
		}
	}}.Build()
	_, session, _, err := open(msg.Stream(), k)
	if session != nil {
		t.Errorf("%s: it was opened", what)
	}
	expectAlert(t, what, err, want, "encrypted_client_hello")
}

// An innerCase is an encoded inner hello that is no good.
type innerCase struct {
	what    string
	encoded []byte
	part    string // of the reason
}

// In front of it the outer hello has the extensions 10, 20, 30, ECH, 40, each with its number in
// it, and 20 once more.
func outerBefore(m *snitest.Message) {
	for _, kind := range []int{10, 20, 30} {
		m.Extension(kind, []byte{byte(kind)})
	}
}

func outerAfter(m *snitest.Message) {
	m.Extension(40, []byte{40})
	m.Extension(20, []byte{20})
}

// referring returns an extension that refers to those of the outer hello.
func referring(types ...int) func(m *snitest.Message) {
	return func(m *snitest.Message) {
		var list snitest.Message
		list.Vector("types", 1, func() {
			for _, kind := range types {
				list.Uint16(kind)
			}
		})
		m.Extension(snitest.OuterExtensions, list.Bytes)
	}
}

func badInners() []innerCase {
	inner := func(more func(m *snitest.Message)) []byte { return snitest.Inner("hidden.example", more) }
	good := inner(nil)
	versions := func(body ...byte) []byte {
		return snitest.Encode(func(m *snitest.Message) {
			m.Extension(snitest.SupportedVersions, body)
			m.Extension(snitest.ECH, []byte{1})
		})
	}
	ech := func(body ...byte) []byte {
		return snitest.Encode(func(m *snitest.Message) {
			m.Extension(snitest.SupportedVersions, []byte{2, 3, 4})
			m.Extension(snitest.ECH, body)
		})
	}
	raw := func(body ...byte) []byte {
		return inner(func(m *snitest.Message) { m.Extension(snitest.OuterExtensions, body) })
	}
	session := snitest.ClientHello{SessionID: 1, Extensions: func(*snitest.Message) {}}.Build().Bytes[4:]
	cases := []innerCase{
		{"padding at its end", append(bytes.Clone(good), 0, 0, 1), "padding"},
		{"padding at once", append(bytes.Clone(good), 1, 0, 0), "padding"},
		{"a session id", session, "session id"},
		{"two of a type", inner(func(m *snitest.Message) { m.Extension(50, nil); m.Extension(50, nil) }), "two extensions"},
		{"two names", inner(func(m *snitest.Message) { m.ServerName(func() { m.Entry(snitest.HostName, "other.example") }) }), "two extensions"},
		{"no ECH", snitest.Encode(func(m *snitest.Message) { m.Extension(snitest.SupportedVersions, []byte{2, 3, 4}) }), "type inner"},
		{"an empty ECH", ech(), "type inner"},
		{"ECH of type outer", ech(0), "type inner"},
		{"ECH and more", ech(1, 0), "type inner"},
		{"no versions", snitest.Encode(func(m *snitest.Message) { m.Extension(snitest.ECH, []byte{1}) }), "version"},
		{"TLS 1.2", versions(2, 3, 3), "version"},
		{"TLS 1.2 besides", versions(4, 3, 4, 3, 3), "version"},
		{"TLS 1.0 in front", versions(4, 3, 1, 3, 4), "version"},
		{"a value of GREASE alone", versions(2, 0x1a, 0x1a), "version"},
		{"no versions in it", versions(0), "version"},
		{"half a version", versions(3, 3, 4, 3), "version"},
		{"versions and more", versions(2, 3, 4, 0), "version"},
		{"an extension that the outer one has not", inner(referring(50)), "does not have"},
		{"another order", inner(referring(20, 10)), "order"},
		{"an order across ECH", inner(referring(40, 10)), "order"},
		{"one twice", inner(referring(10, 10)), "does not have"},
		{"one twice that is there twice", inner(referring(20, 20)), "two extensions"},
		{"ECH itself", inner(referring(30, snitest.ECH)), "names encrypted_client_hello"},
		{"itself", inner(referring(snitest.OuterExtensions)), "does not have"},
		{"one that it has itself", inner(func(m *snitest.Message) { m.Extension(10, nil); referring(10)(m) }), "two extensions"},
		{"two lists", inner(func(m *snitest.Message) { referring(10)(m); referring(20)(m) }), "two extensions"},
		{"an empty list", raw(0), "malformed"},
		{"no list", raw(), "malformed"},
		{"half a type", raw(3, 0, 10, 0), "malformed"},
		{"a list that is too long", raw(4, 0, 10), "malformed"},
		{"a list and more", raw(2, 0, 10, 0), "malformed"},
	}
	for n := range good {
		cases = append(cases, innerCase{fmt.Sprintf("%d of %d bytes", n, len(good)), good[:n], ""})
	}
	return cases
}

// Goal: an inner hello that is no good is refused with illegal_parameter, at the first hello and at
// the second.
func TestInner(t *testing.T) {
	k := newTestKey(t)
	for _, test := range badInners() {
		s := snitest.NewSealer(k.ConfigList())
		_, session, _, err := open(s.Seal("public.example", test.encoded, outerBefore, outerAfter).Stream(), k)
		if session != nil {
			t.Errorf("%s: it was opened", test.what)
		}
		expectAlert(t, test.what, err, sni.IllegalParameter, test.part)

		s = snitest.NewSealer(k.ConfigList())
		_, session, _, err = open(s.Seal("public.example", snitest.Inner("hidden.example", nil), nil, nil).Stream(), k)
		if err != nil {
			t.Fatal(err)
		}
		session.FromBackend(snitest.ServerHello(true))
		s.Enc = nil
		got, err := session.FromClient(nil, s.Seal("public.example", test.encoded, outerBefore, outerAfter).Stream())
		if len(got) > 0 {
			t.Errorf("%s: %d bytes of a second hello pass", test.what, len(got))
		}
		expectAlert(t, test.what, err, sni.IllegalParameter, test.part)
	}
	// It must end with its record.
	msg := snitest.NewSealer(k.ConfigList()).Seal("public.example", snitest.Inner("hidden.example", nil), nil, nil)
	_, _, _, err := open(snitest.Records(append(msg.Bytes, 0), 16384), k)
	expectAlert(t, "a byte behind the hello", err, sni.UnexpectedMessage, "does not end with its record")
}

// Goal: what an inner hello refers to is put in its place.
func TestExpand(t *testing.T) {
	k := newTestKey(t)
	inner := snitest.Encode(func(m *snitest.Message) {
		m.Extension(snitest.ECH, []byte{1})
		referring(10, 30, snitest.SupportedVersions, 40)(m)
		m.ServerName(func() { m.Entry(snitest.HostName, "hidden.example") })
	})
	inner = append(inner, make([]byte, 100)...) // padding
	want := snitest.ClientHello{SessionID: 32, Extensions: func(m *snitest.Message) {
		m.Extension(snitest.ECH, []byte{1})
		m.Extension(10, []byte{10})
		m.Extension(30, []byte{30})
		m.Extension(snitest.SupportedVersions, []byte{4, 3, 4, 0x0a, 0x0a})
		m.Extension(40, []byte{40})
		m.ServerName(func() { m.Entry(snitest.HostName, "hidden.example") })
	}}.Build()
	before := func(m *snitest.Message) {
		outerBefore(m)
		m.Extension(snitest.SupportedVersions, []byte{4, 3, 4, 0x0a, 0x0a})
	}
	got, _, _, err := open(snitest.NewSealer(k.ConfigList()).Seal("public.example", inner, before, outerAfter).Stream(), k)
	if err != nil || !bytes.Equal(got, want.Stream()) {
		t.Errorf("got %x, error %v, want\n%x", got, err, want.Stream())
	}
}

// Goal: keys may share a config id: each is tried.
func TestOpenSharedID(t *testing.T) {
	var keys []*Key
	for range 3 {
		k := newTestKey(t)
		list := k.ConfigList()
		list[6] = 7 // the config id
		one, err := newKey(k.seed)
		if err == nil {
			err = one.findConfig(list)
		}
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, one)
	}
	for i, k := range keys {
		stream := snitest.NewSealer(k.ConfigList()).Seal("public.example", snitest.Inner("hidden.example", nil), nil, nil).Stream()
		inner, session, _, err := open(stream, keys...)
		if session == nil || err != nil || nameIn(t, inner) != "hidden.example" {
			t.Errorf("key %d of those with one id: session %v, error %v", i, session, err)
		}
		if _, session, _, _ := open(stream, slices.Delete(slices.Clone(keys), i, i+1)...); session != nil {
			t.Errorf("key %d was not needed", i)
		}
	}
}
