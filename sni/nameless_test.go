package sni

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A namelessHello is a valid ClientHello without a host name.
type namelessHello struct {
	what  string
	hello *message
	want  answer
}

func namelessHellos() []namelessHello {
	other := func(m *message) { m.serverName(func() { m.entry(1, "example.com") }) }
	return []namelessHello{
		{"no extensions", build(hello{}), noExtensions},
		{"largest without extensions", build(hello{sessionID: 32, ciphers: 1000, methods: 254}), noExtensions},
		{"empty extensions", build(hello{extensions: func(*message) {}}), noServerName},
		{"other extensions", build(hello{extensions: func(m *message) {
			m.extension(23, nil)
			m.extension(grease, fill(5))
		}}), noServerName},
		{"empty extension at the end", build(hello{extensions: func(m *message) {
			m.extension(grease, fill(5))
			m.extension(23, nil)
		}}), noServerName},
		{"names of other types", withList(func(m *message) {
			m.entry(1, "example.com")
			m.entry(255, "")
		}), noHostName},
		{"server name first", build(hello{extensions: func(m *message) {
			other(m)
			m.extension(grease, fill(5))
		}}), noHostName},
		{"server name between others", build(hello{extensions: func(m *message) {
			m.extension(grease, fill(5))
			other(m)
			m.extension(23, nil)
		}}), noHostName},
		{"server name last", build(hello{extensions: func(m *message) {
			m.extension(23, nil)
			other(m)
		}}), noHostName},
	}
}

// Goal: that a valid hello has no name is said at its very last byte, however it
// is cut, and whatever comes behind it.
func TestNameless(t *testing.T) {
	for _, c := range namelessHellos() {
		t.Run(c.what, func(t *testing.T) {
			msg := c.hello.bytes
			want := alertText(t, c.want, UnrecognizedName)
			if end := checkMessage(t, msg, want); end != len(msg) {
				t.Errorf("answer after %d bytes, want %d", end, len(msg))
			}
			stream := records(msg, 50)
			for what, b := range map[string][]byte{
				"a second hello in the same record": records(slices.Concat(msg, ordinary("example.com").bytes), maxRecord),
				"junk in the same record":           records(slices.Concat(msg, fill(9)), maxRecord),
				"an alert":                          append(stream[:len(stream):len(stream)], 21, 3, 3, 0, 2, 2, 0),
				"an empty record":                   append(stream[:len(stream):len(stream)], 22, 3, 3, 0, 0),
				"no TLS":                            append(stream[:len(stream):len(stream)], fill(9)...),
			} {
				if got := parse(b); got != want {
					t.Errorf("%s behind it: got %q, want %q", what, got, want)
				}
			}
		})
	}
}

// Goal: a hello that would have no name is not nameless if a mistake in the
// record layer comes before its last byte.
func TestNamelessRecords(t *testing.T) {
	for _, c := range namelessHellos() {
		msg := c.hello.bytes
		for i := 1; i < len(msg); i++ {
			for _, mistake := range []struct {
				header      []byte
				description Description
			}{
				{[]byte{21, 3, 3, 0, 2}, UnexpectedMessage},
				{[]byte{23, 3, 3, 0, 2}, UnexpectedMessage},
				{[]byte{22, 3, 3, 0, 0}, DecodeError},
				{[]byte{22, 3, 3, 0x40, 1}, RecordOverflow},
			} {
				b := slices.Concat(records(msg[:i], maxRecord), mistake.header, records(msg[i:], maxRecord))
				want := fmt.Sprintf("(alert %d, %v)", mistake.description, mistake.description)
				if got := parse(b); !strings.HasSuffix(got, want) {
					t.Errorf("%s: % x after %d bytes: got %q, want %q", c.what, mistake.header, i, got, want)
				}
			}
		}
	}
}

// Goal: a hello without a name with a length that lies is a decode_error, never
// nameless, also where the length stands behind all that could hold a name.
func TestNamelessLengthsPerturbed(t *testing.T) {
	newHello := func() *message {
		return build(hello{sessionID: 32, ciphers: 6, extensions: func(m *message) {
			m.extension(grease, fill(9))
			m.serverName(func() {
				m.entry(1, "\xff\xff\xff\xff\xff")
				m.entry(2, "\xff\xff\xff\xff\xff")
			})
			m.extension(grease+0x1010, fill(9))
			m.extension(grease+0x2020, fill(9))
		}})
	}
	checkMessage(t, newHello().bytes, alertText(t, noHostName, UnrecognizedName))
	for _, l := range newHello().lengths {
		v := newHello().get(l)
		for _, to := range []int{v - 4, v - 1, v + 1, v + 4, 0, 1<<(8*l.size) - 1} {
			if to < 0 {
				continue
			}
			m := newHello()
			m.set(l, to)
			t.Run(fmt.Sprintf("%s %d for %d", l.of, to, v), func(t *testing.T) {
				got := parse(records(m.bytes, maxRecord))
				if !strings.HasSuffix(got, "(alert 50, decode_error)") {
					t.Errorf("got %q, want a decode_error", got)
				}
				checkMessage(t, m.bytes, got)
			})
		}
	}
}

// Goal: real hellos without their server_name extensions are nameless, and
// crypto/tls, which accepts them, finds no name either.
func TestNamelessCaptured(t *testing.T) {
	for _, c := range captures(t) {
		t.Run(c.file, func(t *testing.T) {
			msg := payload(c.stream)
			body := reader{b: msg[4+versionRandom:]}
			body.vector(1)
			body.vector(2)
			body.vector(1)
			m := message{bytes: slices.Clone(msg[:len(msg)-len(body.b)])}
			extensions, names := body.vector(2), 0
			m.vector("extensions", 2, func() {
				for len(extensions.b) > 0 {
					kind := int(binary.BigEndian.Uint16(extensions.take(2)))
					data := extensions.vector(2).b
					if kind == 0 {
						names++
						continue
					}
					m.extension(kind, data)
				}
			})
			m.set(length{"message", 1, 3}, len(m.bytes)-4)
			if names != 1 {
				t.Fatalf("%d server_name extensions", names)
			}
			want := alertText(t, noServerName, UnrecognizedName)
			for _, size := range []int{maxRecord, 100, 1} {
				b := records(m.bytes, size)
				if got := parse(b[:len(b)-1]); got != "" {
					t.Errorf("records of %d bytes, all but a byte: got %q, want no answer", size, got)
				}
				for _, n := range []int{1, len(b)} {
					if got := parse(slices.Collect(slices.Chunk(b, n))...); got != want {
						t.Errorf("records of %d bytes, in pieces of %d: got %q, want %q", size, n, got, want)
					}
				}
			}
			if got, ok := cryptoTLS(records(m.bytes, maxRecord)); !ok || got != "" {
				t.Errorf("crypto/tls found %q (%v)", got, ok)
			}
		})
	}
}

// Goal: a nameless hello of 64 KiB is nameless, one of a byte more is too late.
func TestNamelessLimit(t *testing.T) {
	for beyond, want := range []string{
		alertText(t, noServerName, UnrecognizedName),
		alertText(t, tooLate, InternalError),
	} {
		var b []byte
		for padding := MaxHello - 400; len(b) < MaxHello+beyond; padding++ {
			b = records(build(hello{extensions: func(m *message) {
				m.extension(grease, fill(padding))
			}}).bytes, maxRecord)
		}
		if len(b) != MaxHello+beyond {
			t.Fatalf("the stream has %d bytes, want %d", len(b), MaxHello+beyond)
		}
		for _, size := range []int{1, 100, len(b)} {
			if got := parse(slices.Collect(slices.Chunk(b, size))...); got != want {
				t.Errorf("%d bytes in pieces of %d: got %q, want %q", len(b), size, got, want)
			}
		}
		if got := parse(b[:MaxHello-1]); got != "" {
			t.Errorf("after %d bytes: got %q, want no answer", MaxHello-1, got)
		}
	}
}

// A reader takes a message apart that is there as a whole: the plain way, to
// compare with.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) (b []byte) {
	if n > len(r.b) {
		r.bad = true
		n = len(r.b)
	}
	b, r.b = r.b[:n], r.b[n:]
	return b
}

// vector takes what stands behind its length in size bytes.
func (r *reader) vector(size int) *reader {
	n := 0
	for _, c := range r.take(size) {
		n = n<<8 | int(c)
	}
	return &reader{b: r.take(n)}
}

// readNameless tells whether msg begins with a complete and valid ClientHello
// without a host name, and where its end is or, if it is cut short, would be
// within msg.
func readNameless(msg []byte) (end int, ok bool) {
	r := reader{b: msg}
	kind := r.take(1)
	body := r.vector(3)
	end = len(msg) - len(r.b)
	if r.bad || kind[0] != 1 {
		return end, false
	}
	body.take(2 + 32)
	sessionID, ciphers, methods := body.vector(1).b, body.vector(2).b, body.vector(1).b
	if body.bad || len(sessionID) > 32 || len(ciphers) == 0 || len(ciphers)%2 != 0 || len(methods) == 0 {
		return end, false
	}
	if len(body.b) == 0 {
		return end, true
	}
	extensions := body.vector(2)
	if body.bad || len(body.b) > 0 {
		return end, false
	}
	seen := false
	for len(extensions.b) > 0 {
		kind, data := extensions.take(2), extensions.vector(2)
		if extensions.bad {
			return end, false
		}
		if kind[0] != 0 || kind[1] != 0 {
			continue
		}
		list := data.vector(2)
		if seen || data.bad || len(data.b) > 0 || len(list.b) == 0 {
			return end, false
		}
		for len(list.b) > 0 {
			kind := list.take(1)
			list.vector(2)
			if list.bad || kind[0] == 0 {
				return end, false
			}
		}
		seen = true
	}
	return end, true
}
