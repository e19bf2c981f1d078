package proxyproto_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sniproxy/proxyproto"
)

func ExampleAppendV1() {
	header := proxyproto.AppendV1(nil,
		netip.MustParseAddrPort("192.0.2.1:56324"), netip.MustParseAddrPort("192.0.2.2:443"))
	fmt.Printf("%q\n", header)
	// Output: "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
}

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

// The longest header keeps to the length that receivers reserve for it.
func TestAppendV1Length(t *testing.T) {
	long := netip.MustParseAddrPort("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
	got := proxyproto.AppendV1(nil, long, long)
	if len(got) > proxyproto.MaxV1 || !strings.Contains(string(got), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
}

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
