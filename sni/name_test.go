package sni

import (
	"errors"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

// canonicalName is the rule for canonical names, without the length, as a regular expression.
var canonicalName = regexp.MustCompile(`^[a-z0-9_][a-z0-9_-]*(\.[a-z0-9_][a-z0-9_-]*)*$`)

// Goal: names become canonical, and nothing else becomes a name, in place as well as behind other
// bytes.
func TestAppendCanonical(t *testing.T) {
	for _, c := range []struct {
		name, want string
		reason     answer
	}{
		{name: "example.com", want: "example.com"},
		{name: "WWW.Example.COM", want: "www.example.com"},
		{name: "AZaz09.x", want: "azaz09.x"},
		{name: "a", want: "a"},
		{name: "192.0.2.1", want: "192.0.2.1"},
		{name: "xn--sr8hvo.ws", want: "xn--sr8hvo.ws"},
		{name: "a_b.example", want: "a_b.example"},
		{name: "_dmarc._tcp.example", want: "_dmarc._tcp.example"},
		{name: "a-.b--c.example", want: "a-.b--c.example"},
		{name: longest, want: longest},
		{name: strings.Repeat("a", MaxName), want: strings.Repeat("a", MaxName)},

		{name: "", reason: emptyName},
		{name: longest + "d", reason: longName},
		{name: "a.", want: "a"},
		{name: "A.Example.", want: "a.example"},
		{name: longest + ".", want: longest},
		{name: longest + "d.", reason: longName},
		{name: ".", reason: emptyLabel},
		{name: "..", reason: emptyLabel},
		{name: "a..", reason: emptyLabel},
		{name: ".a", reason: emptyLabel},
		{name: "a..b", reason: emptyLabel},
		{name: "-", reason: leadingHyphen},
		{name: "-a.example", reason: leadingHyphen},
		{name: "a.-b", reason: leadingHyphen},
		{name: "/", reason: url},
		{name: "../a", reason: emptyLabel},
		{name: "a/b", reason: url},
		{name: "https://a.example/", reason: url},
		{name: "a\\b", reason: otherCharacter},
		{name: "a@b", reason: otherCharacter},
		{name: "a\x00.example", reason: control},
		{name: "a b", reason: control},
		{name: "a\n", reason: control},
		{name: "a\x7f", reason: control},
		{name: "*.example", reason: asterisk},
		{name: "a:443", reason: withPort},
		{name: "192.0.2.1:443", reason: withPort},
		{name: "a:b", reason: otherCharacter},
		{name: "[::1]", reason: address6},
		{name: "[::1].", reason: address6},
		{name: "FE80::a%Eth0/7", reason: address6},
		{name: "[::1]:443", reason: brackets},
		{name: "[a.example]", reason: brackets},
		{name: "a.example]", reason: brackets},
		{name: "@`{", reason: otherCharacter}, // the neighbours of the letters
		{name: "fa\u00df.de", reason: notASCII},
		{name: "\u212a.example", reason: notASCII}, // the Kelvin sign
		{name: "\xff.com", reason: notASCII},
	} {
		const before = "before:"
		dst := []byte(before)
		got, err := AppendCanonical(dst, []byte(c.name))
		want, wantErr := before+c.want, error(nil)
		if c.reason != pending {
			want, wantErr = before, alerts[c.reason]
		}
		if string(got) != want || err != wantErr {
			t.Errorf("%q: got %q, %v, want %q, %v", c.name, got, err, want, wantErr)
		}

		inPlace := []byte(c.name)
		got, err = AppendCanonical(inPlace[:0], inPlace)
		if string(got) != c.want || err != wantErr {
			t.Errorf("%q in place: got %q, %v, want %q, %v", c.name, got, err, c.want, wantErr)
		}
	}
}

// Goal: what is an IPv6 address is decided as package net/netip does.
func TestIsIPv6(t *testing.T) {
	for _, name := range ipv6Names {
		checkIPv6(t, []byte(name))
	}
}

var ipv6Names = []string{
	"", ":", "::", ":::", "::1", "1::", "1:", ":1", "1::2::3", "1:::2", "2001:db8::1", "2001:DB8::A",
	"1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1:2:3:4::5:6:7:8",
	"::ffff:192.0.2.1", "1:2:3:4:5:6:192.0.2.1", "1:2:3:4:5:6:7:192.0.2.1", "::192.0.2", "::192.0.2.256", "::192.0.2.01",
	"::192.0.2.1.", "::1.2.3.4:5", "192.0.2.1", "::12345", "::g", "1", "abcd", "::1%", "::1%eth0", "%", "%eth0", "fe80::1%a%b",
	"[", "]", "[]", "[::]", "[::1", "::1]", "[[::1]]", "[::1%25eth0]", "::.", "1:2:3:4:5:6:7:8.",
}

// checkIPv6 compares isIPv6 with package net/netip.
func checkIPv6(t *testing.T, name []byte) {
	t.Helper()
	s := string(name)
	if inside, ok := strings.CutPrefix(s, "["); ok && len(s) > 2 && strings.HasSuffix(s, "]") {
		s = inside[:len(inside)-1]
	}
	// netip refuses some addresses with a zone.
	if before, zone, _ := strings.Cut(s, "%"); zone != "" {
		s = before
	}
	addr, err := netip.ParseAddr(s)
	if got, want := isIPv6(name), err == nil && addr.Is6(); got != want {
		t.Errorf("%q is an IPv6 address: %v, want %v", name, got, want)
	}
}

// Goal: of all single bytes, exactly those of the rule are names.
func TestCharacters(t *testing.T) {
	for i := range 256 {
		c := byte(i)
		for _, name := range []string{string([]byte{c}), string([]byte{'a', c})} {
			got, err := AppendCanonical(nil, []byte(name))
			lower := []byte(name)
			if 'A' <= c && c <= 'Z' {
				lower[len(lower)-1] += 'a' - 'A'
			}
			if c == '.' && len(name) > 1 { // it comes off
				lower = lower[:1]
			}
			if want := canonicalName.Match(lower); want != (err == nil) || want && string(got) != string(lower) {
				t.Errorf("%q: got %q, %v", name, got, err)
			}
		}
	}
}

// Goal: every error is an Alert, its text names the reason and the alert, and none quotes anything.
func TestAlertText(t *testing.T) {
	text := regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9 ^,'._:()=-]* \(alert (10|22|50|80|112), [a-z_]+\)$`)
	for _, err := range alerts[address6:] {
		var a Alert
		if !errors.As(err, &a) || !text.MatchString(err.Error()) {
			t.Errorf("%#v: %v", err, err)
		}
	}
}

// Goal: the descriptions have the numbers and names of RFC 8446, Section 6, and their records are
// fatal alerts.
func TestDescription(t *testing.T) {
	for _, c := range []struct {
		d    Description
		n    uint8
		name string
	}{
		{UnexpectedMessage, 10, "unexpected_message"},
		{RecordOverflow, 22, "record_overflow"},
		{DecodeError, 50, "decode_error"},
		{InternalError, 80, "internal_error"},
		{UserCanceled, 90, "user_canceled"},
		{UnrecognizedName, 112, "unrecognized_name"},
		{77, 77, "description 77"},
	} {
		if uint8(c.d) != c.n || c.d.String() != c.name {
			t.Errorf("got %d %v, want %d %s", uint8(c.d), c.d, c.n, c.name)
		}
		if got, want := c.d.Record(), [...]byte{0x15, 3, 3, 0, 2, 2, c.n}; got != want {
			t.Errorf("%v: got % x, want % x", c.d, got, want)
		}
	}
}
