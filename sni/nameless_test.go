package sni

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"sniproxy/sni/snitest"
)

// A namelessHello is a valid ClientHello without a host name.
type namelessHello struct {
	what  string
	hello *snitest.Message
}

func namelessHellos() []namelessHello {
	other := func(m *snitest.Message) { m.ServerName(func() { m.Entry(1, "example.com") }) }
	return []namelessHello{
		{"no extensions", snitest.ClientHello{}.Build()},
		{"largest without extensions", snitest.ClientHello{SessionID: 32, CipherSuites: 1000, CompressionMethods: 254}.Build()},
		{"empty extensions", snitest.ClientHello{Extensions: func(*snitest.Message) {}}.Build()},
		{"other extensions", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.Extension(23, nil)
			m.Extension(snitest.Grease, snitest.Fill(5))
		}}.Build()},
		{"empty extension at the end", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.Extension(snitest.Grease, snitest.Fill(5))
			m.Extension(23, nil)
		}}.Build()},
		{"names of other types", snitest.NameList(func(m *snitest.Message) {
			m.Entry(1, "example.com")
			m.Entry(255, "")
		})},
		{"server name first", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			other(m)
			m.Extension(snitest.Grease, snitest.Fill(5))
		}}.Build()},
		{"server name between others", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.Extension(snitest.Grease, snitest.Fill(5))
			other(m)
			m.Extension(23, nil)
		}}.Build()},
		{"server name last", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.Extension(23, nil)
			other(m)
		}}.Build()},
	}
}

// Goal: a valid hello without a name is reported at its very last byte, however it is cut, and
// whatever comes behind it.
func TestNameless(t *testing.T) {
	for _, c := range namelessHellos() {
		t.Run(c.what, func(t *testing.T) {
			msg := c.hello.Bytes
			want := isNameless
			if end := checkMessage(t, msg, want); end != len(msg) {
				t.Errorf("answer after %d bytes, want %d", end, len(msg))
			}
			stream := snitest.Records(msg, 50)
			for what, b := range map[string][]byte{
				"a second hello in the same record": snitest.Records(slices.Concat(msg, ordinary("example.com").Bytes), maxRecord),
				"junk in the same record":           snitest.Records(slices.Concat(msg, snitest.Fill(9)), maxRecord),
				"an alert":                          append(stream[:len(stream):len(stream)], 21, 3, 3, 0, 2, 2, 0),
				"an empty record":                   append(stream[:len(stream):len(stream)], 22, 3, 3, 0, 0),
				"no TLS":                            append(stream[:len(stream):len(stream)], snitest.Fill(9)...),
			} {
				if got := parse(b); got != want {
					t.Errorf("%s behind it: got %q, want %q", what, got, want)
				}
			}
		})
	}
}

// Goal: a hello without a name is not nameless if a mistake in the record layer comes before its
// last byte.
func TestNamelessRecords(t *testing.T) {
	for _, c := range namelessHellos() {
		msg := c.hello.Bytes
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
				b := slices.Concat(snitest.Records(msg[:i], maxRecord), mistake.header, snitest.Records(msg[i:], maxRecord))
				want := fmt.Sprintf("(alert %d, %v)", mistake.description, mistake.description)
				if got := parse(b); !strings.HasSuffix(got, want) {
					t.Errorf("%s: % x after %d bytes: got %q, want %q", c.what, mistake.header, i, got, want)
				}
			}
		}
	}
}

// Goal: a hello without a name, with a wrong length, is a decode_error and never nameless, even if
// the length stands behind everything that could hold a name.
func TestNamelessLengthsPerturbed(t *testing.T) {
	newHello := func() *snitest.Message {
		return snitest.ClientHello{SessionID: 32, CipherSuites: 6, Extensions: func(m *snitest.Message) {
			m.Extension(snitest.Grease, snitest.Fill(9))
			m.ServerName(func() {
				m.Entry(1, "\xff\xff\xff\xff\xff")
				m.Entry(2, "\xff\xff\xff\xff\xff")
			})
			m.Extension(snitest.Grease+0x1010, snitest.Fill(9))
			m.Extension(snitest.Grease+0x2020, snitest.Fill(9))
		}}.Build()
	}
	checkMessage(t, newHello().Bytes, isNameless)
	for _, l := range newHello().Lengths {
		v := newHello().Get(l)
		for _, to := range []int{v - 4, v - 1, v + 1, v + 4, 0, 1<<(8*l.Size) - 1} {
			if to < 0 {
				continue
			}
			m := newHello()
			m.Set(l, to)
			t.Run(fmt.Sprintf("%s %d for %d", l.Of, to, v), func(t *testing.T) {
				got := parse(m.Stream())
				if !strings.HasSuffix(got, "(alert 50, decode_error)") {
					t.Errorf("got %q, want a decode_error", got)
				}
				checkMessage(t, m.Bytes, got)
			})
		}
	}
}

// Goal: real hellos without their server_name extensions are nameless, and crypto/tls, which
// accepts them, finds no name either.
func TestNamelessCaptured(t *testing.T) {
	for _, c := range captures(t) {
		t.Run(c.file, func(t *testing.T) {
			msg := snitest.Payload(c.stream)
			body := reader{b: msg[4+versionRandom:]}
			body.vector(1)
			body.vector(2)
			body.vector(1)
			m := snitest.Message{Bytes: slices.Clone(msg[:len(msg)-len(body.b)])}
			extensions, names := body.vector(2), 0
			m.Vector("extensions", 2, func() {
				for len(extensions.b) > 0 {
					kind := int(binary.BigEndian.Uint16(extensions.take(2)))
					data := extensions.vector(2).b
					if kind == 0 {
						names++
						continue
					}
					m.Extension(kind, data)
				}
			})
			m.Set(snitest.Length{Of: "message", At: 1, Size: 3}, len(m.Bytes)-4)
			if names != 1 {
				t.Fatalf("%d server_name extensions", names)
			}
			want := isNameless
			for _, size := range []int{maxRecord, 100, 1} {
				b := snitest.Records(m.Bytes, size)
				if got := parse(b[:len(b)-1]); got != "" {
					t.Errorf("records of %d bytes, all but a byte: got %q, want no answer", size, got)
				}
				for _, n := range []int{1, len(b)} {
					if got := parse(slices.Collect(slices.Chunk(b, n))...); got != want {
						t.Errorf("records of %d bytes, in pieces of %d: got %q, want %q", size, n, got, want)
					}
				}
			}
			if got, ok := cryptoTLS(m.Stream()); !ok || got != "" {
				t.Errorf("crypto/tls found %q (%v)", got, ok)
			}
		})
	}
}

// Goal: a nameless hello of 64 KiB is nameless; with one byte more the alert is that the name comes
// too late.
func TestNamelessLimit(t *testing.T) {
	for beyond, want := range []string{
		isNameless,
		alertText(t, tooLate, InternalError),
	} {
		var b []byte
		for padding := MaxHello - 400; len(b) < MaxHello+beyond; padding++ {
			b = snitest.Records(snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Extension(snitest.Grease, snitest.Fill(padding))
			}}.Build().Bytes, maxRecord)
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

// A reader takes a whole message apart, the simple way, to compare with the Parser.
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

// vector takes the bytes behind a length of size bytes.
func (r *reader) vector(size int) *reader {
	n := 0
	for _, c := range r.take(size) {
		n = n<<8 | int(c)
	}
	return &reader{b: r.take(n)}
}

// readNameless reports whether msg begins with a complete and valid ClientHello without a host
// name, and where that ends, or would end if it is cut short.
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
