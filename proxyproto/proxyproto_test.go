package proxyproto_test

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sniproxy/proxyproto"
	"sniproxy/sni"
)

func ExampleAppendV1() {
	header := proxyproto.AppendV1(nil,
		netip.MustParseAddrPort("192.0.2.1:56324"), netip.MustParseAddrPort("192.0.2.2:443"))
	fmt.Printf("%q\n", header)
	// Output: "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
}

// Goal: each field of the header is as Section 2.1 of the specification lays it out.
func TestAppendV1(t *testing.T) {
	for _, test := range []struct{ client, listener, want string }{
		{"192.0.2.1:1", "192.0.2.2:65535", "TCP4 192.0.2.1 192.0.2.2 1 65535"},
		{"[2001:db8::1]:2", "[2001:db8::2]:443", "TCP6 2001:db8::1 2001:db8::2 2 443"},
		{"[::1]:2", "[::1]:443", "TCP6 ::1 ::1 2 443"},
		// An IPv4 client of a dual-stack listener.
		{"[::ffff:192.0.2.1]:3", "[::ffff:192.0.2.2]:443", "TCP4 192.0.2.1 192.0.2.2 3 443"},
		{"[::ffff:192.0.2.1]:3", "192.0.2.2:443", "TCP4 192.0.2.1 192.0.2.2 3 443"},
		{"[fe80::1%eth0]:4", "[fe80::2%eth0]:443", "TCP6 fe80::1 fe80::2 4 443"},
		{"[fe80::1%a.long.zone.name]:4", "[fe80::2]:443", "TCP6 fe80::1 fe80::2 4 443"},
		{"192.0.2.1:5", "[2001:db8::2]:443", "UNKNOWN"},
		{"[2001:db8::2]:5", "[::ffff:192.0.2.1]:443", "UNKNOWN"},
	} {
		got := proxyproto.AppendV1(nil, netip.MustParseAddrPort(test.client), netip.MustParseAddrPort(test.listener))
		if want := "PROXY " + test.want + "\r\n"; string(got) != want {
			t.Errorf("client %s, listener %s: %q, want %q", test.client, test.listener, got, want)
		}
	}
	if got := proxyproto.AppendV1(nil, netip.AddrPort{}, netip.AddrPort{}); string(got) != "PROXY UNKNOWN\r\n" {
		t.Errorf("no addresses: %q", got)
	}
}

// Goal: the longest header keeps to the length that receivers reserve for it.
func TestAppendV1Length(t *testing.T) {
	long := netip.MustParseAddrPort("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
	got := proxyproto.AppendV1(nil, long, long)
	if len(got) > proxyproto.MaxV1 || !strings.Contains(string(got), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
}

// Goal: the header follows what is in the buffer, and allocates nothing.
func TestAppendV1Appends(t *testing.T) {
	a := netip.MustParseAddrPort("192.0.2.1:1")
	buf := append(make([]byte, 0, 200), "before "...)
	if got := proxyproto.AppendV1(buf, a, a); !strings.HasPrefix(string(got), "before PROXY ") {
		t.Errorf("%q", got)
	}
	if n := testing.AllocsPerRun(100, func() { proxyproto.AppendV1(buf, a, a) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Goal: whatever the addresses, the result is a header of one family.
func FuzzAppendV1(f *testing.F) {
	f.Add([]byte{127, 0, 0, 1}, []byte{127, 0, 0, 1}, uint16(1), uint16(2), "")
	f.Add([]byte("0123456789abcdef"), []byte("0123456789abcdef"), uint16(1), uint16(443), "eth0")
	f.Fuzz(func(t *testing.T, client, listener []byte, cport, lport uint16, zone string) {
		c, _ := netip.AddrFromSlice(client)
		l, _ := netip.AddrFromSlice(listener)
		got := string(proxyproto.AppendV1(nil, netip.AddrPortFrom(c.WithZone(zone), cport), netip.AddrPortFrom(l, lport)))
		if len(got) > proxyproto.MaxV1 || !strings.HasPrefix(got, "PROXY ") || !strings.HasSuffix(got, "\r\n") {
			t.Fatalf("%q", got)
		}
		fields := strings.Split(strings.TrimSuffix(got, "\r\n"), " ")
		if len(fields) == 2 && fields[1] == "UNKNOWN" {
			return
		}
		if len(fields) != 6 {
			t.Fatalf("%q", got)
		}
		for _, a := range fields[2:4] {
			addr, err := netip.ParseAddr(a)
			if err != nil || addr.Is4In6() || addr.Zone() != "" || addr.Is4() != (fields[1] == "TCP4") {
				t.Fatalf("%q in %q", a, got)
			}
		}
	})
}

func ExampleAppendV2() {
	header := proxyproto.AppendV2(nil, netip.MustParseAddrPort("192.0.2.1:56324"),
		netip.MustParseAddrPort("192.0.2.2:443"), []byte("site.example"))
	fmt.Print(hex.Dump(header))
	// Output:
	// 00000000  0d 0a 0d 0a 00 0d 0a 51  55 49 54 0a 21 11 00 1b  |.......QUIT.!...|
	// 00000010  c0 00 02 01 c0 00 02 02  dc 04 01 bb 02 00 0c 73  |...............s|
	// 00000020  69 74 65 2e 65 78 61 6d  70 6c 65                 |ite.example|
}

// Goal: each field of the header is as Section 2.2 of the specification lays it out.
func TestAppendV2(t *testing.T) {
	for _, test := range []struct{ client, listener, authority, want string }{
		{"192.0.2.1:1", "198.51.100.2:65535", "",
			"11 000c  c0000201 c6336402 0001 ffff"},
		{"192.0.2.1:258", "198.51.100.2:443", "a",
			"11 0010  c0000201 c6336402 0102 01bb  02 0001 61"},
		{"[2001:db8::1]:258", "[2001:db8::ff00:2]:443", "",
			"21 0024  20010db8000000000000000000000001 20010db80000000000000000ff000002 0102 01bb"},
		{"[2001:db8::1]:258", "[2001:db8::ff00:2]:443", "a.b",
			"21 002a  20010db8000000000000000000000001 20010db80000000000000000ff000002 0102 01bb  02 0003 612e62"},
		{"192.0.2.1:1", "198.51.100.2:2", strings.Repeat("a", 254),
			"11 010d  c0000201 c6336402 0001 0002  02 00fe " + strings.Repeat("61", 254)},
		// An IPv4 client of a dual-stack listener.
		{"[::ffff:192.0.2.1]:3", "[::ffff:192.0.2.2]:443", "",
			"11 000c  c0000201 c0000202 0003 01bb"},
		{"[::ffff:192.0.2.1]:3", "192.0.2.2:443", "",
			"11 000c  c0000201 c0000202 0003 01bb"},
		{"[fe80::1%eth0]:4", "[fe80::2%eth0]:443", "a",
			"21 0028  fe800000000000000000000000000001 fe800000000000000000000000000002 0004 01bb  02 0001 61"},
		{"192.0.2.1:5", "[2001:db8::2]:443", "a", "00 0000"},
		{"[2001:db8::2]:5", "[::ffff:192.0.2.1]:443", "a", "00 0000"},
	} {
		got := proxyproto.AppendV2(nil, netip.MustParseAddrPort(test.client),
			netip.MustParseAddrPort(test.listener), []byte(test.authority))
		want := strings.ReplaceAll("0d0a0d0a000d0a515549540a 21"+test.want, " ", "")
		if hex.EncodeToString(got) != want {
			t.Errorf("client %s, listener %s, authority %q: %x, want %s", test.client, test.listener, test.authority, got, want)
		}
	}
	got := proxyproto.AppendV2(nil, netip.AddrPort{}, netip.AddrPort{}, []byte("a"))
	if want := "\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x00"; string(got) != want {
		t.Errorf("no addresses: %q, want %q", got, want)
	}
}

// Goal: the longest header has exactly the length that callers reserve for it.
func TestAppendV2Length(t *testing.T) {
	long := netip.MustParseAddrPort("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
	if got := proxyproto.AppendV2(nil, long, long, make([]byte, sni.MaxName)); len(got) != proxyproto.MaxV2 {
		t.Errorf("%d bytes, want %d: %q", len(got), proxyproto.MaxV2, got)
	}
}

// Goal: the header follows what is in the buffer, and allocates nothing.
func TestAppendV2Appends(t *testing.T) {
	for _, s := range []string{"192.0.2.1:1", "[fe80::1%eth0]:1"} {
		a, name := netip.MustParseAddrPort(s), []byte("site.example")
		buf := append(make([]byte, 0, 200), "before "...)
		if got := proxyproto.AppendV2(buf, a, a, name); !strings.HasPrefix(string(got), "before \r\n\r\n") {
			t.Errorf("%q", got)
		}
		if n := testing.AllocsPerRun(100, func() { proxyproto.AppendV2(buf, a, a, name) }); n != 0 {
			t.Errorf("%s: %v allocations", s, n)
		}
	}
}

// Goal: what a header says about TLS is laid out as Section 2.2.6 of the specification has it; what
// is empty or too long is left out; and without addresses there is nothing of it.
func TestAppendV2TLS(t *testing.T) {
	ends := netip.MustParseAddrPort("192.0.2.1:1")
	const start = "0d0a0d0a000d0a515549540a 21 11"
	const addrs = "c0000201 c0000201 0001 0001"
	for _, test := range []struct {
		tls  proxyproto.TLS
		want string
	}{
		{proxyproto.TLS{}, start + "0018" + addrs + "02 0001 61" + "20 0005 01 00000001"},
		{proxyproto.TLS{ALPN: "h2", Version: "TLSv1.3", Cipher: "X", CommonName: "not verified"},
			start + "002b" + addrs + "02 0001 61" + "01 0002 6832" + "20 0013 01 00000001" + "21 0007 544c5376312e33" + "23 0001 58"},
		{proxyproto.TLS{Verified: true, CommonName: "bob"}, start + "001e" + addrs + "02 0001 61" + "20 000b 07 00000000" + "22 0003 626f62"},
		{proxyproto.TLS{Verified: true, Resumed: true}, start + "0018" + addrs + "02 0001 61" + "20 0005 05 00000000"},
		{proxyproto.TLS{Verified: true, CommonName: strings.Repeat("b", proxyproto.MaxField+1)}, start + "0018" + addrs + "02 0001 61" + "20 0005 07 00000000"},
	} {
		got := proxyproto.AppendV2TLS([]byte("before"), ends, ends, []byte("a"), test.tls)
		want := "6265666f7265" + strings.ReplaceAll(test.want, " ", "")
		if hex.EncodeToString(got) != want {
			t.Errorf("%+v: %x, want %s", test.tls, got, want)
		}
		if h, n, err := proxyproto.Parse(got[len("before"):]); err != nil || n != len(got)-len("before") || h.Client != ends {
			t.Errorf("%+v: %v, %d, %v", test.tls, h, n, err)
		}
	}
	got := proxyproto.AppendV2TLS(nil, netip.AddrPort{}, ends, []byte("a"), proxyproto.TLS{ALPN: "h2"})
	if want := "\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x00"; string(got) != want {
		t.Errorf("no addresses: %q, want %q", got, want)
	}
	long := netip.MustParseAddrPort("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
	field := strings.Repeat("x", proxyproto.MaxField)
	full := proxyproto.TLS{ALPN: field, Version: field, Cipher: field, Verified: true, CommonName: field}
	if got := proxyproto.AppendV2TLS(nil, long, long, make([]byte, sni.MaxName), full); len(got) != proxyproto.MaxV2TLS {
		t.Errorf("%d bytes, want %d", len(got), proxyproto.MaxV2TLS)
	}
}

// Goal: whatever the addresses, the result is a header of one family and says what it was given.
func FuzzAppendV2(f *testing.F) {
	f.Add([]byte{127, 0, 0, 1}, []byte{127, 0, 0, 1}, uint16(1), uint16(2), "", []byte("site.example"))
	f.Add([]byte("0123456789abcdef"), []byte("0123456789abcdef"), uint16(1), uint16(443), "eth0", []byte(nil))
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x7f\x00\x00\x01"), []byte{127, 0, 0, 1}, uint16(1), uint16(443), "eth0", []byte("a"))
	f.Add([]byte{127, 0, 0, 1}, []byte("0123456789abcdef"), uint16(1), uint16(443), "", []byte("a"))
	f.Fuzz(func(t *testing.T, client, listener []byte, cport, lport uint16, zone string, authority []byte) {
		authority = authority[:min(len(authority), sni.MaxName)]
		c, _ := netip.AddrFromSlice(client)
		l, _ := netip.AddrFromSlice(listener)
		got := proxyproto.AppendV2(nil, netip.AddrPortFrom(c.WithZone(zone), cport), netip.AddrPortFrom(l, lport), authority)
		if len(got) > proxyproto.MaxV2 {
			t.Fatalf("%d bytes: %q", len(got), got)
		}
		header, err := parseV2(got)
		if err != nil {
			t.Fatalf("%v: %q", err, got)
		}
		var want headerV2
		if c, l := c.Unmap(), l.Unmap(); c.IsValid() && l.IsValid() && c.Is4() == l.Is4() {
			want = headerV2{netip.AddrPortFrom(c, cport), netip.AddrPortFrom(l, lport), string(authority)}
		}
		if header != want {
			t.Fatalf("%v, want %v: %q", header, want, got)
		}
	})
}

// A headerV2 is what a header of version 2 says. It is empty where the protocol is UNSPEC.
type headerV2 struct {
	client, listener netip.AddrPort
	authority        string
}

// parseV2 reads a header, which must be all of b, field by field as Section 2.2 names them.
func parseV2(b []byte) (h headerV2, err error) {
	const fixed = 16
	if len(b) < fixed {
		return h, errors.New("truncated")
	}
	if sig, verCmd := b[:12], b[12]; string(sig) != "\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A" || verCmd != 0x21 {
		return h, errors.New("not version 2, command PROXY")
	}
	fam, rest := b[13], b[fixed:]
	if n := int(binary.BigEndian.Uint16(b[14:])); n != len(rest) {
		return h, fmt.Errorf("%d bytes follow, but the length is %d", len(rest), n)
	}
	var size int // of an address
	switch fam {
	case 0x00:
		if len(rest) > 0 {
			return h, errors.New("something after UNSPEC")
		}
		return h, nil
	case 0x11:
		size = 4
	case 0x21:
		size = 16
	default:
		return h, fmt.Errorf("family and protocol %#x", fam)
	}
	if len(rest) < 2*size+4 {
		return h, errors.New("truncated addresses")
	}
	src, _ := netip.AddrFromSlice(rest[:size])
	to, _ := netip.AddrFromSlice(rest[size : 2*size])
	ports, tlvs := rest[2*size:2*size+4], rest[2*size+4:]
	h.client = netip.AddrPortFrom(src, binary.BigEndian.Uint16(ports))
	h.listener = netip.AddrPortFrom(to, binary.BigEndian.Uint16(ports[2:]))
	if len(tlvs) == 0 {
		return h, nil
	}
	if len(tlvs) < 4 || tlvs[0] != 0x02 || int(binary.BigEndian.Uint16(tlvs[1:])) != len(tlvs)-3 {
		return h, fmt.Errorf("not one authority: %q", tlvs)
	}
	h.authority = string(tlvs[3:])
	return h, nil
}
