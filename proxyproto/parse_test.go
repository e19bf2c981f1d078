package proxyproto_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sniproxy/proxyproto"
)

// v2 builds a header of version 2.
func v2(command, protocol byte, rest string) string {
	b := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), command, protocol)
	b = binary.BigEndian.AppendUint16(b, uint16(len(rest)))
	return string(b) + rest
}

const (
	addrs4 = "\xc0\x00\x02\x01\xc6\x33\x64\x02\x01\x02\x01\xbb" // 192.0.2.1:258 and 198.51.100.2:443
	loop6  = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"
	mapped = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xc0\x00\x02\x01"
)

// headers are whole headers and the addresses in them, none where those of the connection count.
var headers = []struct{ header, want string }{
	{"PROXY TCP4 192.0.2.1 198.51.100.2 258 443\r\n", "192.0.2.1:258 198.51.100.2:443"},
	{"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", "0.0.0.0:0 255.255.255.255:65535"},
	{"PROXY TCP6 2001:db8::1 ::1 1 443\r\n", "[2001:db8::1]:1 [::1]:443"},
	{"PROXY TCP6 2001:DB8:0:0:0:0:0:1 0::1 1 443\r\n", "[2001:db8::1]:1 [::1]:443"},
	{"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 1 443\r\n", "192.0.2.1:1 198.51.100.2:443"}, // as sniproxy-rs writes it
	{"PROXY UNKNOWN\r\n", ""},
	{"PROXY UNKNOWN whatever it may be\r\n", ""},
	{"PROXY UNKNOWN " + strings.Repeat("f", 107-16) + "\r\n", ""},
	{v2(0x21, 0x11, addrs4), "192.0.2.1:258 198.51.100.2:443"},
	{v2(0x21, 0x11, addrs4+"\x02\x00\x01a"), "192.0.2.1:258 198.51.100.2:443"},
	{v2(0x21, 0x11, addrs4+strings.Repeat("?", 4096-12)), "192.0.2.1:258 198.51.100.2:443"},
	{v2(0x21, 0x21, loop6+loop6+"\x00\x01\x01\xbb"), "[::1]:1 [::1]:443"},
	{v2(0x21, 0x21, mapped+mapped+"\x00\x01\x01\xbb"), "192.0.2.1:1 192.0.2.1:443"},
	{v2(0x21, 0x00, ""), ""},
	{v2(0x21, 0x00, "anything"), ""},
	{v2(0x20, 0x00, ""), ""},
	{v2(0x20, 0x11, addrs4), ""},
	{v2(0x20, 0x12, "anything"), ""},
	{v2(0x20, 0xff, strings.Repeat("?", 4096)), ""},
	{v2(0x21, 0x31, strings.Repeat("\x00", 216)), ""},
	{v2(0x21, 0x32, strings.Repeat("\x00", 219)), ""},
}

// Goal: a header is read as the specification says, whatever follows it, and one that is cut short
// is waited for.
func TestParse(t *testing.T) {
	for _, test := range headers {
		for _, more := range []string{"", "\x16\x03\x01", test.header} {
			h, n, err := proxyproto.Parse([]byte(test.header + more))
			got := ""
			if h != (proxyproto.Header{}) {
				got = fmt.Sprint(h.Client, " ", h.Listener)
			}
			if got != test.want || n != len(test.header) || err != nil {
				t.Errorf("%.120q and %d bytes more: %q, length %d, error %v; want %q, length %d",
					test.header, len(more), got, n, err, test.want, len(test.header))
			}
		}
		for i := range test.header {
			if h, n, err := proxyproto.Parse([]byte(test.header[:i])); h != (proxyproto.Header{}) || n != 0 || err != nil {
				t.Errorf("the first %d bytes of %.120q: %v, length %d, error %v; want nothing yet", i, test.header, h, n, err)
			}
		}
		if len(test.header) > proxyproto.MaxParse {
			t.Errorf("%.120q has %d bytes, more than MaxParse", test.header, len(test.header))
		}
	}
}

// Goal: anything else is refused as soon as it can be told, whatever follows it.
func TestParseRefuses(t *testing.T) {
	const (
		missing   = "no PROXY protocol header"
		malformed = "malformed PROXY protocol header"
		tooLong   = "PROXY protocol header that is too long"
		protocol  = "PROXY protocol header for another protocol than TCP"
	)
	for _, test := range []struct{ data, want string }{
		{"\x16", missing},
		{"G", missing},
		{"PROXY\r", missing},
		{"PROXYI", missing},
		{"p", missing},
		{" ", missing},
		{"\r\n\r\n\x00\r\nQUIT\r", missing},
		{"\r\n\r\nG", missing},

		{"PROXY \n", malformed},
		{"PROXY \r\n", malformed},
		{"PROXY UNKNOWN\n", malformed},
		{"PROXY UNKNOWN \r \r\n", malformed},
		{"PROXY UNKNOWNS\r\n", malformed},
		{"PROXY TCP4\r\n", malformed},
		{"PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n", malformed},
		{"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", malformed},
		{"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP4 site.example 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 ::1 1 2\r\n", malformed},
		{"PROXY TCP4 ::1 ::1 1 2\r\n", malformed},
		{"PROXY TCP4 ::ffff:192.0.2.1 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", malformed},
		{"PROXY TCP6 [::1] ::1 1 2\r\n", malformed},
		{"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 -2\r\n", malformed},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 \r\n", malformed},

		{"PROXY UNKNOWN " + strings.Repeat("f", 107-14), tooLong},
		{"PROXY UNKNOWN " + strings.Repeat("f", 107-15) + "\r", tooLong},

		{v2(0x11, 0, "")[:13], malformed},
		{v2(0x31, 0, "")[:13], malformed},
		{v2(0x22, 0, "")[:13], malformed},
		{v2(0x21, 0x10, "")[:14], malformed},
		{v2(0x21, 0x13, "")[:14], malformed},
		{v2(0x21, 0x41, "")[:14], malformed},
		{v2(0x21, 0x12, "")[:14], protocol},
		{v2(0x21, 0x22, "")[:14], protocol},
		{v2(0x21, 0x11, addrs4[1:])[:16], malformed},
		{v2(0x21, 0x21, strings.Repeat("\x00", 35))[:16], malformed},
		{v2(0x21, 0x31, strings.Repeat("\x00", 215))[:16], malformed},
		{v2(0x21, 0x00, strings.Repeat("\x00", 4097))[:16], tooLong},
		{v2(0x20, 0x00, strings.Repeat("\x00", 4097))[:16], tooLong},
		{v2(0x21, 0x11, strings.Repeat("\x00", 65535))[:16], tooLong},
	} {
		if _, n, err := proxyproto.Parse([]byte(test.data[:len(test.data)-1])); n != 0 || err != nil {
			t.Errorf("%.120q but for a byte: length %d, error %v; want neither", test.data, n, err)
		}
		for _, more := range []string{"", "\r\n", "PROXY UNKNOWN\r\n"} {
			h, n, err := proxyproto.Parse([]byte(test.data + more))
			if h != (proxyproto.Header{}) || n != 0 || fmt.Sprint(err) != test.want || errors.Is(err, proxyproto.ErrMissing) != (test.want == missing) {
				t.Errorf("%.120q and %d bytes more: %v, length %d, error %v; want %q", test.data, len(more), h, n, err, test.want)
			}
		}
	}
}

// Goal: a parsed header needs no memory, unless it is a line.
func TestParseAllocations(t *testing.T) {
	for _, header := range []string{v2(0x21, 0x11, addrs4+"\x02\x00\x01a"), v2(0x21, 0x11, addrs4)[:20], "\x16\x03\x01"} {
		b := []byte(header)
		if n := testing.AllocsPerRun(100, func() { proxyproto.Parse(b) }); n != 0 {
			t.Errorf("%q: %v allocations", header, n)
		}
	}
}

// Goal: the answer to no bytes depends on what follows them or how they come, and what is read from
// a header can be written and read again.
func FuzzParse(f *testing.F) {
	for _, test := range headers {
		f.Add([]byte(test.header), []byte("PROXY UNKNOWN\r\n"))
	}
	f.Add([]byte("PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n"), []byte{0})
	f.Add([]byte(v2(0x21, 0x12, "")), []byte{0})
	f.Fuzz(func(t *testing.T, b, more []byte) {
		h, n, err := proxyproto.Parse(b)
		if n < 0 || n > min(len(b), proxyproto.MaxParse) || n > 0 && err != nil {
			t.Fatalf("length %d, error %v", n, err)
		}
		if n == 0 && err == nil && len(b) >= proxyproto.MaxParse {
			t.Fatalf("wants more than %d bytes", len(b))
		}
		if n == 0 && h != (proxyproto.Header{}) || h.Client.IsValid() != h.Listener.IsValid() {
			t.Fatalf("length %d, and the header is %v", n, h)
		}
		if n > 0 || err != nil {
			h2, n2, err2 := proxyproto.Parse(append(b[:len(b):len(b)], more...))
			if h2 != h || n2 != n || err2 != err {
				t.Fatalf("%v, %d, %v; with more bytes %v, %d, %v", h, n, err, h2, n2, err2)
			}
		}
		known := false // no beginning that was enough may have another answer
		for i := range b {
			h2, n2, err2 := proxyproto.Parse(b[:i])
			if known = known || n2 > 0 || err2 != nil; known && (h2 != h || n2 != n || err2 != err) {
				t.Fatalf("%v, %d, %v; of the first %d bytes %v, %d, %v", h, n, err, i, h2, n2, err2)
			}
		}
		if n > 0 {
			if h2, n2, err := proxyproto.Parse(b[:n]); h2 != h || n2 != n || err != nil {
				t.Fatalf("alone: %v, %d, %v, want %v, %d", h2, n2, err, h, n)
			}
		}
		if !h.Client.IsValid() || h.Client.Addr().BitLen() != h.Listener.Addr().BitLen() {
			return
		}
		for _, written := range [][]byte{
			proxyproto.AppendV1(nil, h.Client, h.Listener),
			proxyproto.AppendV2(nil, h.Client, h.Listener, []byte("site.example")),
		} {
			if again, n, err := proxyproto.Parse(written); again != h || n != len(written) || err != nil {
				t.Fatalf("%v was written as %q and read as %v, %d, %v", h, written, again, n, err)
			}
		}
	})
}

// Goal: whatever is written is read again, in both versions.
func FuzzParseAppended(f *testing.F) {
	f.Add([]byte{127, 0, 0, 1}, []byte{127, 0, 0, 1}, uint16(1), uint16(2), "", []byte("site.example"))
	f.Add([]byte(loop6), []byte(mapped), uint16(1), uint16(443), "eth0", []byte(nil))
	f.Add([]byte(mapped), []byte{127, 0, 0, 1}, uint16(0), uint16(443), "", []byte("a"))
	f.Fuzz(func(t *testing.T, client, listener []byte, cport, lport uint16, zone string, authority []byte) {
		authority = authority[:min(len(authority), 254)]
		c, _ := netip.AddrFromSlice(client)
		l, _ := netip.AddrFromSlice(listener)
		var want proxyproto.Header
		if c, l := c.Unmap(), l.Unmap(); c.IsValid() && c.BitLen() == l.BitLen() {
			want = proxyproto.Header{Client: netip.AddrPortFrom(c, cport), Listener: netip.AddrPortFrom(l, lport)}
		}
		from, to := netip.AddrPortFrom(c.WithZone(zone), cport), netip.AddrPortFrom(l, lport)
		for _, header := range [][]byte{
			proxyproto.AppendV1(nil, from, to),
			proxyproto.AppendV2(nil, from, to, authority),
		} {
			if got, n, err := proxyproto.Parse(header); got != want || n != len(header) || err != nil {
				t.Fatalf("%q was read as %v, %d, %v, want %v", header, got, n, err, want)
			}
		}
	})
}

func ExampleParse() {
	data := []byte("PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\nhello")
	header, n, err := proxyproto.Parse(data)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%v is connected to %v and says %q\n", header.Client, header.Listener, data[n:])
	// Output: 192.0.2.1:56324 is connected to 198.51.100.2:443 and says "hello"
}
