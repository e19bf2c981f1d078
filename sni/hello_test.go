package sni

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"sniproxy/sni/snitest"
)

// ordinary is a ClientHello in the usual shape: some extensions, and among them the server name.
func ordinary(name string) *snitest.Message {
	return snitest.ClientHello{SessionID: 32, CipherSuites: 6, Extensions: func(m *snitest.Message) {
		m.Extension(snitest.Grease, snitest.Fill(1))
		m.ServerName(func() { m.Entry(snitest.HostName, name) })
		m.Extension(snitest.Grease+0x1010, snitest.Fill(5))
	}}.Build()
}

// longest is a name of MaxName bytes.
var longest = strings.Repeat("a.", MaxName/2-1) + "bc"

// Goal: the name is found, in canonical form, wherever the grammar allows it.
func TestName(t *testing.T) {
	for _, c := range []struct {
		what  string
		hello *snitest.Message
		want  string
	}{
		{"ordinary", ordinary("example.com"), "example.com"},
		{"upper case", ordinary("WWW.Example.COM"), "www.example.com"},
		{"longest", ordinary(longest), longest},
		{"longest with a dot at its end", ordinary(longest + "."), longest},
		{"a dot at its end", ordinary("Example.com."), "example.com"},
		{"IPv4 address", ordinary("192.0.2.1"), "192.0.2.1"},
		{"IPv6 address", ordinary("2001:DB8::1"), isAddress},
		{"IPv6 address in brackets", ordinary("[::ffff:192.0.2.1]"), isAddress},
		{"IPv6 address with a zone", ordinary("fe80::1%eth0"), isAddress},
		{"one byte", ordinary("a"), "a"},
		{"no session id", snitest.Named("a.example"), "a.example"},
		// RFC 8446 allows 32 bytes; crypto/tls accepts more.
		{"long session id", snitest.ClientHello{SessionID: 255, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		// The next three are wrong, but a name comes: the server will refuse them.
		{"no cipher suites", snitest.ClientHello{CipherSuites: -2, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		{"half a cipher suite", snitest.ClientHello{CipherSuites: -1, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		{"no compression methods", snitest.ClientHello{CompressionMethods: -1, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		{"many cipher suites", snitest.ClientHello{CipherSuites: 1000, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		{"empty extension before it", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.Extension(23, nil)
			m.ServerName(func() { m.Entry(snitest.HostName, "a.example") })
		}}.Build(), "a.example"},
		{"another kind of name before it", snitest.NameList(func(m *snitest.Message) {
			m.Entry(1, "other")
			m.Entry(2, "")
			m.Entry(snitest.HostName, "a.example")
		}), "a.example"},
		{"nothing behind the name is looked at", snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.ServerName(func() {
				m.Entry(snitest.HostName, "first.example")
				m.Entry(snitest.HostName, "second.example")
				m.Raw(snitest.Filler)
			})
			m.ServerName(func() { m.Entry(snitest.HostName, "third.example") })
			m.Raw(snitest.Filler)
		}}.Build(), "first.example"},
	} {
		t.Run(c.what, func(t *testing.T) {
			checkMessage(t, c.hello.Bytes, c.want)
		})
	}
}

// Goal: each mistake in a handshake message gives the right alert.
func TestMessageAlerts(t *testing.T) {
	type row struct {
		what  string
		hello *snitest.Message
		want  answer
	}
	named := func(name string, want answer) row {
		return row{fmt.Sprintf("name %q", name), ordinary(name), want}
	}
	typed := func(messageType byte) *snitest.Message {
		m := ordinary("example.com")
		m.Bytes[0] = messageType
		return m
	}

	for description, rows := range map[Description][]row{
		UnexpectedMessage: {
			{"hello request", typed(0), notClientHello},
			{"server hello", typed(2), notClientHello},
			{"finished", typed(20), notClientHello},
			{"unknown message", typed(255), notClientHello},
		},
		DecodeError: {
			{"trailing bytes", snitest.ClientHello{Trailing: 1, Extensions: func(m *snitest.Message) {
				m.ServerName(func() { m.Entry(snitest.HostName, "example.com") })
			}}.Build(), trailing},
			{"trailing bytes and no extensions", snitest.ClientHello{Trailing: 1}.Build(), overrun},
			{"trailing bytes behind empty extensions", snitest.ClientHello{Trailing: 2, Extensions: func(*snitest.Message) {}}.Build(), trailing},
			{"trailing bytes in the extensions", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Extension(snitest.Grease, snitest.Fill(5))
				m.Raw(snitest.Filler, snitest.Filler, snitest.Filler)
			}}.Build(), overrun},
			{"trailing bytes behind the list", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Uint16(0)
				m.Vector("extension", 2, func() {
					m.Vector("server name list", 2, func() { m.Entry(snitest.HostName, "example.com") })
					m.Raw(snitest.Filler)
				})
			}}.Build(), trailing},
			{"trailing bytes in the list", snitest.NameList(func(m *snitest.Message) {
				m.Entry(1, "other")
				m.Raw(0, 0)
			}), overrun},
			{"server name without list", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Extension(0, nil)
			}}.Build(), overrun},
			{"server name with half a length", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Extension(0, snitest.Fill(1))
			}}.Build(), overrun},
			{"empty list", snitest.NameList(func(*snitest.Message) {}), emptyList},
			{"second server name", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.ServerName(func() { m.Entry(1, "other") })
				m.Extension(snitest.Grease, nil)
				m.ServerName(func() { m.Entry(snitest.HostName, "example.com") })
			}}.Build(), secondServerName},
			{"second server name without host name", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.ServerName(func() { m.Entry(1, "other") })
				m.ServerName(func() { m.Entry(1, "other") })
			}}.Build(), secondServerName},
			{"trailing bytes behind a server name without host name", snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.ServerName(func() { m.Entry(1, "other") })
				m.Raw(snitest.Filler, snitest.Filler, snitest.Filler)
			}}.Build(), overrun},
			{"long session id and no extensions", snitest.ClientHello{SessionID: 33}.Build(), longSessionID},
			{"no cipher suites and no server name", snitest.ClientHello{CipherSuites: -2, Extensions: func(m *snitest.Message) {
				m.Extension(snitest.Grease, snitest.Fill(5))
			}}.Build(), badCipherSuites},
			{"half a cipher suite and no extensions", snitest.ClientHello{CipherSuites: 3}.Build(), badCipherSuites},
			{"no compression methods and no host name", snitest.ClientHello{CompressionMethods: -1, Extensions: func(m *snitest.Message) {
				m.ServerName(func() { m.Entry(1, "other") })
			}}.Build(), noCompression},
		},
		UnrecognizedName: {
			named("", emptyName),
			named(longest+"d", longName),
			named(longest+"d.", longName),
			named(strings.Repeat("a", 1000), longName),
			named("a..b", emptyLabel),
			named("..", emptyLabel),
			named("example.com..", emptyLabel),
			named("a.-b", leadingHyphen),
			named("a/b", url),
			named("a\x00b", control),
		},
	} {
		for _, r := range rows {
			t.Run(fmt.Sprintf("%d/%s", description, r.what), func(t *testing.T) {
				checkMessage(t, r.hello.Bytes, alertText(t, r.want, description))
			})
		}
	}
}

// Goal: each mistake in the record layer gives the right alert, at the byte that shows it.
func TestRecordAlerts(t *testing.T) {
	msg := ordinary("example.com").Bytes
	// after puts b behind a good first record with the first three bytes of the message.
	after := func(b ...byte) []byte { return append(snitest.Records(msg[:3], 3), b...) }

	for description, rows := range map[Description][]struct {
		what   string
		stream []byte // its last byte shows the mistake
		want   answer
	}{
		UnexpectedMessage: {
			{"PROXY v1", []byte("PROXY "), proxyHeader},
			{"PROXY v2", []byte("\r\n\r\n\x00\r\nQUIT\n"), proxyHeader},
			{"HTTP", []byte("GET "), plainHTTP},
			{"HTTP POST", []byte("POST "), plainHTTP},
			{"HTTP 2", []byte("PRI * HTTP/2"), plainHTTP},
			{"SSH", []byte("SSH-"), ssh},
			{"PostgreSQL", []byte("\x00\x00\x00\x08\x04\xd2\x16"), postgreSQL},
			{"PostgreSQL without encryption", []byte("\x00\x00\x00\x54\x00\x03\x00"), postgreSQL},
			{"SSL 2.0", []byte{0x80, 0x2e, 1}, ssl2},
			{"RDP", []byte{3, 0}, rdp},
			{"almost PROXY", []byte("PROXI"), notTLS},
			{"almost HTTP", []byte("GETS"), notTLS},
			{"almost SSL 2.0", []byte{0x80, 1, 2}, notTLS},
			{"something else", []byte("E"), notTLS},
			{"alert first", []byte{21}, notHandshake},
			{"zero", []byte{0, 0, 1, 1, 1}, notTLS},
			{"alert between", after(21), interleaved},
			{"application data between", after(23), interleaved},
			{"change cipher spec between", after(20), interleaved},
		},
		DecodeError: {
			{"empty record", []byte{22, 3, 1, 0, 0}, emptyRecord},
			{"empty record between", after(22, 3, 3, 0, 0), emptyRecord},
		},
		RecordOverflow: {
			{"2^14 + 1", []byte{22, 3, 1, 0x40, 0x01}, longRecord},
			{"largest", []byte{22, 3, 1, 0xff, 0xff}, longRecord},
			{"2^14 + 1 between", after(22, 3, 3, 0x40, 0x01), longRecord},
		},
	} {
		for _, r := range rows {
			t.Run(fmt.Sprintf("%d/%s", description, r.what), func(t *testing.T) {
				end := checkStream(t, append(r.stream, msg...), alertText(t, r.want, description))
				if end != len(r.stream) {
					t.Errorf("answer after %d bytes, want %d", end, len(r.stream))
				}
			})
		}
	}
}

// Goal: what cannot be TLS, and is too short to tell what it is, is told apart from a hello that is
// not complete.
func TestForeign(t *testing.T) {
	for stream, want := range map[string]error{
		"":                 nil,
		"\x16":             nil,
		"\x16\x03\x01\x01": nil,
		"G":                alerts[notTLS],
		"PROXY":            alerts[notTLS],
		"\r\n\r\n\x00\r\n": alerts[notTLS],
		"GET ":             nil, // it is clear what that is
	} {
		var p Parser
		p.Parse([]byte(stream))
		if got := p.Foreign(); got != want {
			t.Errorf("%q: got %v, want %v", stream, got, want)
		}
	}
}

// Goal: no signature hides another.
func TestSignatures(t *testing.T) {
	for i, s := range signatures {
		for _, other := range signatures[i+1:] {
			if n := common(s.begin, []byte(other.begin)); n == len(s.begin) || n == len(other.begin) {
				t.Errorf("%q and %q begin alike", s.begin, other.begin)
			}
		}
	}
}

// Goal: the version in a record's header makes no difference.
func TestRecordVersionIsIgnored(t *testing.T) {
	b := ordinary("example.com").Stream()
	for _, v := range [][2]byte{{0, 0}, {2, 0}, {3, 0}, {3, 1}, {3, 4}, {0xff, 0xff}} {
		b[1], b[2] = v[0], v[1]
		checkStream(t, b, "example.com")
	}
}

// Goal: a wrong length is never believed. The test changes every length of a ClientHello up to that
// of the name.
func TestLengthsPerturbed(t *testing.T) {
	newHello := func() *snitest.Message {
		return snitest.ClientHello{SessionID: 32, CipherSuites: 6, Extensions: func(m *snitest.Message) {
			m.Extension(snitest.Grease, snitest.Fill(9))
			m.ServerName(func() {
				m.Entry(1, "\xff\xff\xff\xff\xff")
				m.Entry(snitest.HostName, "example.com")
			})
			m.Extension(snitest.Grease+0x1010, snitest.Fill(9))
		}}.Build()
	}
	// All others are a decode_error. The parser does not look behind a name that claims to be
	// shorter.
	want := map[string]string{
		"host name -1": "example.co",
		"host name -4": "example",
		"host name =0": alertText(t, emptyName, UnrecognizedName),
	}
	lengths := newHello().Lengths
	for _, l := range lengths[:len(lengths)-1] {
		for _, change := range []struct {
			what string
			to   func(v int) int
		}{
			{"-4", func(v int) int { return v - 4 }},
			{"-1", func(v int) int { return v - 1 }},
			{"+1", func(v int) int { return v + 1 }},
			{"+4", func(v int) int { return v + 4 }},
			{"=0", func(int) int { return 0 }},
			{"=max", func(int) int { return 1<<(8*l.Size) - 1 }},
		} {
			m := newHello()
			v := change.to(m.Get(l))
			if v < 0 {
				continue
			}
			m.Set(l, v)
			what := fmt.Sprintf("%s %s", l.Of, change.what)
			t.Run(what, func(t *testing.T) {
				got := parse(m.Stream())
				end := checkMessage(t, m.Bytes, got)
				if change.what == "=max" && l.Of != "message" && end != l.At+l.Size {
					t.Errorf("answer after %d bytes of the message, want %d", end, l.At+l.Size)
				}
				if s := want[what]; s != "" {
					if got != s {
						t.Errorf("got %q, want %q", got, s)
					}
				} else if !strings.Contains(got, "alert 50") {
					t.Errorf("got %q, want a decode_error", got)
				}
			})
		}
	}
}

// Goal: a ClientHello whose own length ends it inside a field, or between two, is a decode_error;
// but it may have no extensions.
func TestMessageEnds(t *testing.T) {
	whole := ordinary("example.com")
	length := whole.Lengths[0]
	body := length.At + length.Size
	extensions := len(snitest.ClientHello{SessionID: 32, CipherSuites: 6}.Build().Bytes)
	for end := body; end < len(whole.Bytes); end++ {
		m := snitest.Message{Bytes: slices.Clone(whole.Bytes[:end])}
		m.Set(length, end-body)
		got := parse(m.Stream())
		checkMessage(t, m.Bytes, got)
		if end == extensions {
			if want := isNameless; got != want {
				t.Errorf("no extensions: got %q, want %q", got, want)
			}
		} else if !strings.Contains(got, "alert 50") {
			t.Errorf("end after %d bytes: got %q, want a decode_error", end, got)
		}
	}
}

// Goal: a name whose last byte is byte 65536 of the stream is found, and one that ends a byte later
// is not. The same holds for the alert of a bad name.
func TestLimit(t *testing.T) {
	// at returns a stream in which the last byte of the name is byte number end.
	at := func(name string, end int) []byte {
		var b []byte
		padding := MaxHello - 400
		for range 2 {
			m := snitest.ClientHello{Extensions: func(m *snitest.Message) {
				half := padding / 2
				m.Extension(snitest.Grease, snitest.Fill(half))
				m.Extension(snitest.Grease, snitest.Fill(padding-half))
				m.ServerName(func() { m.Entry(snitest.HostName, name) })
			}}.Build()
			b = m.Stream()
			padding += end - len(b)
		}
		if len(b) != end || !bytes.HasSuffix(b, []byte(name)) {
			t.Fatalf("the stream has %d bytes, want %d", len(b), end)
		}
		return b
	}
	const name, bad = "example.com", "example/com"
	tooLate := alertText(t, tooLate, InternalError)
	for _, c := range []struct {
		name string
		end  int
		want string
	}{
		{name, MaxHello - 1, name},
		{name, MaxHello, name},
		{name, MaxHello + 1, tooLate},
		{bad, MaxHello, alertText(t, url, UnrecognizedName)},
		{bad, MaxHello + 1, tooLate},
	} {
		t.Run(fmt.Sprintf("%s at %d", c.name, c.end), func(t *testing.T) {
			b := at(c.name, c.end)
			for _, size := range []int{1, 2, 3, 100, 4096, len(b)} {
				if got := parse(slices.Collect(slices.Chunk(b, size))...); got != c.want {
					t.Errorf("in pieces of %d bytes: got %s, want %s", size, got, c.want)
				}
			}
			// Without the last byte there is no answer. A read that crosses the limit changes
			// nothing.
			last := min(c.end, MaxHello) - 1
			if got := parse(b[:last]); got != "" {
				t.Errorf("after %d bytes: got %s, want no answer", last, got)
			}
			if got := parse(b[:last], append(b[last:], b...)); got != c.want {
				t.Errorf("with more behind it: got %s, want %s", got, c.want)
			}
		})
	}
}

// Goal: the parser follows a ClientHello that claims 16 MiB for 64 KiB and no further.
func TestHugeClaim(t *testing.T) {
	m := snitest.ClientHello{SessionID: 255, CipherSuites: 1<<16 - 4, Extensions: func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.HostName, "example.com") })
	}}.Build()
	m.Set(m.Lengths[0], 1<<24-1)
	b := m.Stream()
	want := alertText(t, tooLate, InternalError)
	for _, size := range []int{1, 1000, len(b)} {
		if got := parse(slices.Collect(slices.Chunk(b, size))...); got != want {
			t.Errorf("in pieces of %d bytes: got %s, want %s", size, got, want)
		}
	}
	if got := parse(b[:MaxHello-1]); got != "" {
		t.Errorf("one byte before the limit: got %s, want no answer", got)
	}

	// Where the extensions come in time, their length shows the lie.
	m = ordinary("example.com")
	m.Set(m.Lengths[0], 1<<24-1)
	checkMessage(t, m.Bytes, alertText(t, trailing, DecodeError))
}

// Goal: after an answer, Parse gives the same answer again and reads nothing.
func TestAnswerStays(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"example.com", "example.com"},
		{"example.com/", alertText(t, url, UnrecognizedName)},
		{"[::1]", isAddress},
	} {
		b := snitest.Records(ordinary(c.name).Bytes, maxRecord)
		var p Parser
		p.Parse(b)
		before := p
		for _, more := range [][]byte{nil, b, make([]byte, 2*MaxHello)} {
			if got := give(&p, more); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		}
		if p != before {
			t.Error("the parser has gone on after its answer")
		}
	}
}

// Goal: parsing takes linear time however the bytes come. The proof needs no clock: a Parser is a
// few hundred bytes without pointers, and the test overwrites its input after each call, so a call
// can look only at the new bytes and at that small value. BenchmarkParseByteByByte has the figures.
func TestParserKeepsNothing(t *testing.T) {
	var p Parser
	if size := unsafe.Sizeof(p); size > MaxName+32 {
		t.Errorf("a Parser has %d bytes, want at most %d", size, MaxName+32)
	}
	checkPlain(t, reflect.TypeOf(p))

	for _, size := range []int{1, 2, 3, 100} {
		var p Parser
		var got string
		piece := make([]byte, size)
		for c := range slices.Chunk(ordinary("example.com").Stream(), size) {
			n := copy(piece, c)
			got = give(&p, piece[:n])
			copy(piece, snitest.Fill(size))
		}
		if got != "example.com" {
			t.Errorf("in pieces of %d bytes: got %s", size, got)
		}
	}
}

// checkPlain reports pointers of any kind in t.
func checkPlain(t *testing.T, typ reflect.Type) {
	t.Helper()
	switch typ.Kind() {
	case reflect.Struct:
		for i := range typ.NumField() {
			checkPlain(t, typ.Field(i).Type)
		}
	case reflect.Array:
		checkPlain(t, typ.Elem())
	case reflect.Bool, reflect.Uint8, reflect.Uint16, reflect.Uint32:
	default:
		t.Errorf("a Parser holds a %v", typ)
	}
}

// Goal: no hello, good or bad, whole or in pieces, costs an allocation.
func TestNoAllocation(t *testing.T) {
	for _, c := range []struct {
		what   string
		stream []byte
	}{
		{"name", ordinary("WWW.example.com").Stream()},
		{"bad name", ordinary("a/b").Stream()},
		{"no name", snitest.Records(snitest.ClientHello{}.Build().Bytes, maxRecord)},
		{"IPv6 address", ordinary("[2001:db8::1]").Stream()},
		{"not TLS", []byte("GET / HTTP/1.1\r\n")},
		{"many records", snitest.Records(ordinary("example.com").Bytes, 1)},
		{"no answer yet", snitest.Records(ordinary("example.com").Bytes[:50], maxRecord)},
	} {
		t.Run(c.what, func(t *testing.T) {
			for _, size := range []int{1, len(c.stream)} {
				n := testing.AllocsPerRun(100, func() {
					var p Parser
					for b := c.stream; len(b) > 0; b = b[min(size, len(b)):] {
						p.Parse(b[:min(size, len(b))])
					}
				})
				if n != 0 {
					t.Errorf("in pieces of %d bytes: %v allocations, want none", size, n)
				}
			}
		})
	}
}

// Goal: the captured hellos of real clients give the names that the clients were told to connect
// to.
func TestCaptured(t *testing.T) {
	for _, c := range captures(t) {
		t.Run(c.file, func(t *testing.T) {
			checkStream(t, c.stream, c.name)
			checkMessage(t, snitest.Payload(c.stream), c.name)
		})
	}
}

// Goal: crypto/tls finds the same names.
func TestAgreesWithCryptoTLS(t *testing.T) {
	for _, c := range captures(t) {
		if name, ok := cryptoTLS(c.stream); !ok || !strings.EqualFold(name, c.name) {
			t.Errorf("%s: crypto/tls found %q (%v), want %q", c.file, name, ok, c.name)
		}
	}
	for _, m := range []*snitest.Message{
		ordinary("example.com"),
		ordinary(longest),
		ordinary("a_b.example"),
		ordinary("a..b"),
		snitest.ClientHello{}.Build(),
		snitest.ClientHello{SessionID: 255, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "example.com") })
		}}.Build(),
		snitest.ClientHello{Extensions: func(*snitest.Message) {}}.Build(),
		snitest.ClientHello{SessionID: 33}.Build(),
		snitest.ClientHello{CipherSuites: -2}.Build(),
		snitest.ClientHello{CompressionMethods: -1}.Build(),
		snitest.NameList(func(m *snitest.Message) { m.Entry(1, "other") }),
		snitest.NameList(func(m *snitest.Message) { m.Entry(1, "other"); m.Entry(snitest.HostName, "example.com") }),
	} {
		if _, ok := cryptoTLS(snitest.Records(m.Bytes, 100)); !ok {
			t.Errorf("crypto/tls refuses\n%x", m.Bytes)
		}
		checkAgainstCryptoTLS(t, m.Bytes)
	}
}
