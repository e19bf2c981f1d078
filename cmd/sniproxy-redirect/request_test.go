package main

import (
	"bufio"
	"bytes"
	"errors"
	"net/http"
	"strings"
	"testing"
)

// head returns the head of a request with a first line and fields.
func head(lines ...string) []byte { return []byte(strings.Join(lines, "\r\n") + "\r\n\r\n") }

// Goal: the redirect keeps the path and the query to the byte, and the host as sniproxy knows it.
func TestLocation(t *testing.T) {
	for _, c := range []struct{ line, host, want string }{
		{"GET / HTTP/1.1", "one.example", "https://one.example/"},
		{"GET /a/b?c=d&e HTTP/1.1", "one.example", "https://one.example/a/b?c=d&e"},
		{"POST /a HTTP/1.1", "one.example:80", "https://one.example/a"},
		{"HEAD /a HTTP/1.1", "one.example:", "https://one.example/a"},
		{"GET / HTTP/1.0", "one.example:8080", "https://one.example/"},
		{"GET / HTTP/1.9", "one.example", "https://one.example/"},
		{"BREW /pot HTTP/1.1", "one.example", "https://one.example/pot"},
		// To the byte, even where it is no URL.
		{"GET //two.example/..//. HTTP/1.1", "one.example", "https://one.example//two.example/..//."},
		{`GET /%zz/%2F%0d%0aX:y;"<>\^{|}'[]?a?b#c%`, "one.example", "https://one.example" + `/%zz/%2F%0d%0aX:y;"<>\^{|}'[]?a?b#c%`},
		{"GET /\xff\xc3\xa4?\x80 HTTP/1.1", "one.example", "https://one.example/\xff\xc3\xa4?\x80"},
		{"GET /?http://two.example/ HTTP/1.1", "one.example", "https://one.example/?http://two.example/"},
		// As canonical as a name of sniproxy's.
		{"GET / HTTP/1.1", "One.EXAMPLE", "https://one.example/"},
		{"GET / HTTP/1.1", "one.example.", "https://one.example/"},
		{"GET / HTTP/1.1", "One.example.:80", "https://one.example/"},
		{"GET / HTTP/1.1", "a_b.xn--sr8hvo.ws", "https://a_b.xn--sr8hvo.ws/"},
		{"GET / HTTP/1.1", "localhost", "https://localhost/"},
		{"GET / HTTP/1.1", strings.Repeat("a.", 126) + "ab", "https://" + strings.Repeat("a.", 126) + "ab/"},
		// Addresses as they are.
		{"GET / HTTP/1.1", "192.0.2.1", "https://192.0.2.1/"},
		{"GET / HTTP/1.1", "192.0.2.1:80", "https://192.0.2.1/"},
		{"GET / HTTP/1.1", "[2001:DB8::1]", "https://[2001:DB8::1]/"},
		{"GET / HTTP/1.1", "[2001:db8:0:0::1]:80", "https://[2001:db8:0:0::1]/"},
		{"GET / HTTP/1.1", "[::ffff:192.0.2.1]:", "https://[::ffff:192.0.2.1]/"},
		// RFC 9112, Section 3.2.2: the host in the target counts.
		{"GET http://Two.example/a?b HTTP/1.1", "one.example", "https://two.example/a?b"},
		{"GET HTTP://two.example:80/a HTTP/1.1", "one.example", "https://two.example/a"},
		{"GET https://two.example:8443/a HTTP/1.1", "one.example", "https://two.example/a"},
		{"GET http://two.example HTTP/1.1", "one.example", "https://two.example/"},
		{"GET http://two.example?a/b HTTP/1.1", "one.example", "https://two.example/?a/b"},
		{"GET http://[::1]:80/ HTTP/1.1", "one.example", "https://[::1]/"},
		{"GET http://two.example/ HTTP/1.0", "", "https://two.example/"},
		// Sections 3.2.4 and 3.3: nothing is behind the host.
		{"OPTIONS * HTTP/1.1", "one.example", "https://one.example"},
		{"OPTIONS http://one.example HTTP/1.1", "one.example", "https://one.example"},
		{"OPTIONS / HTTP/1.1", "one.example", "https://one.example/"},
	} {
		lines := []string{c.line, "host: \t" + c.host + " "}
		if c.host == "" {
			lines = lines[:1]
		}
		if strings.Count(c.line, " ") < 2 {
			lines[0] += " HTTP/1.1"
		}
		r, err := parse(head(lines...))
		if err != nil || r.location != c.want {
			t.Errorf("%q to %q: %q, error %v, want %q", c.line, c.host, r.location, err, c.want)
		}
	}
}

// Goal: what has no host, or none that could be a name, is refused, and so is what is not HTTP. The
// reason says which.
func TestRefusals(t *testing.T) {
	const get = "GET / HTTP/1.1"
	for _, c := range []struct {
		want  error
		lines []string
	}{
		{errNoHost, []string{get}},
		{errNoHost, []string{"GET / HTTP/1.0"}},
		{errNoHost, []string{"GET http://one.example/ HTTP/1.1"}},
		{errTwoHosts, []string{get, "Host: one.example", "hOST: one.example"}},
		{errTwoHosts, []string{"GET / HTTP/1.0", "Host: one.example", "Host: two.example"}},
		{errHost, []string{get, "Host:"}},
		{errHost, []string{get, "Host: ."}},
		{errHost, []string{get, "Host: :80"}},
		{errHost, []string{get, "Host: one..example"}},
		{errHost, []string{get, "Host: one.example.."}},
		{errHost, []string{get, "Host: -one.example"}},
		{errHost, []string{get, "Host: one.example/two"}},
		{errHost, []string{get, "Host: one.example?"}},
		{errHost, []string{get, "Host: one.example@two.example"}},
		{errHost, []string{get, "Host: user:pass@two.example"}},
		{errHost, []string{get, "Host: one.example:80:80"}},
		{errHost, []string{get, "Host: one.example:http"}},
		{errHost, []string{get, "Host: one.example:+80"}},
		{errHost, []string{get, "Host: one.example, two.example"}},
		{errHost, []string{get, "Host: one example"}},
		{errHost, []string{get, "Host: one%2eexample"}},
		{errHost, []string{get, "Host: \xf0\x9f\x95\xb8.ws"}},
		{errHost, []string{get, "Host: ::1"}},
		{errHost, []string{get, "Host: [::1"}},
		{errHost, []string{get, "Host: []"}},
		{errHost, []string{get, "Host: [192.0.2.1]"}},
		{errHost, []string{get, "Host: [fe80::1%eth0]"}},
		{errHost, []string{get, "Host: [fe80::1%25eth0]"}},
		{errHost, []string{get, "Host: [::1]80"}},
		{errHost, []string{get, "Host: [::1].example"}},
		{errHost, []string{get, "Host: " + strings.Repeat("a.", 127) + "a"}},
		{errHost, []string{"GET http:///a HTTP/1.1", "Host: one.example"}},
		{errHost, []string{"GET http://user@two.example/ HTTP/1.1", "Host: one.example"}},
		{errHost, []string{"GET http://two.example/ HTTP/1.1", "Host: bad/host"}},
		{errTarget, []string{"GET ftp://two.example/ HTTP/1.1", "Host: one.example"}},
		{errTarget, []string{"GET two.example HTTP/1.1", "Host: one.example"}},
		{errTarget, []string{"GET ?a HTTP/1.1", "Host: one.example"}},
		{errTarget, []string{"GET * HTTP/1.1", "Host: one.example"}},
		{errTarget, []string{"CONNECT one.example:443 HTTP/1.1", "Host: one.example"}},
		{errTarget, []string{"CONNECT / HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /", "Host: one.example"}},
		{errLine, []string{"GET", "Host: one.example"}},
		{errLine, []string{"GET  / HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /  HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET / a HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET / HTTP/1.1 ", "Host: one.example"}},
		{errLine, []string{"GET / http/1.1", "Host: one.example"}},
		{errLine, []string{"GET / HTTP/11", "Host: one.example"}},
		{errLine, []string{"GET / HTTP/1.10", "Host: one.example"}},
		{errLine, []string{"GET / HTTP/1.a", "Host: one.example"}},
		{errLine, []string{"G\xc3\xa4T / HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /\ra HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /\x00 HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /\t HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET /\x7f HTTP/1.1", "Host: one.example"}},
		{errLine, []string{"GET / HTTP/1.1\r", "Host: one.example"}},
		{errLine, []string{"PROXY TCP4 192.0.2.1 192.0.2.2 1 80", "GET / HTTP/1.1", "Host: one.example"}},
		{errVersion, []string{"PRI * HTTP/2.0"}},
		{errVersion, []string{"GET / HTTP/0.9", "Host: one.example"}},
		{errField, []string{get, "Host : one.example"}},
		{errField, []string{get, " Host: one.example"}},
		{errField, []string{get, "Host: one.example", " two.example"}},
		{errField, []string{get, "Host: one.example", "Cookie"}},
		{errField, []string{get, "Host: one.example", ": a"}},
		{errField, []string{get, "Host: one.example", "A: b\rc"}},
		{errField, []string{get, "Host: one.example", "A: b\x00c"}},
		{errField, []string{get, "Host: one.example", "\xc3\xa4: b"}},
	} {
		if r, err := parse(head(c.lines...)); err != c.want {
			t.Errorf("%q: %+v, error %v, want %v", c.lines, r, err, c.want)
		}
	}
}

// Goal: a connection goes on only behind a request that certainly has no content.
func TestLast(t *testing.T) {
	for _, c := range []struct {
		want  bool
		lines []string
	}{
		{false, []string{"GET / HTTP/1.1"}},
		{false, []string{"GET / HTTP/1.1", "Connection: keep-alive, Upgrade"}},
		{false, []string{"POST / HTTP/1.1", "Content-Length: 0"}},
		{true, []string{"GET / HTTP/1.0"}},
		{true, []string{"GET / HTTP/1.0", "Connection: keep-alive"}},
		{true, []string{"GET / HTTP/1.1", "Connection: close"}},
		{true, []string{"GET / HTTP/1.1", "Connection: TE ,\tCLOSE", "Connection: keep-alive"}},
		{true, []string{"POST / HTTP/1.1", "Content-Length: 1"}},
		{true, []string{"POST / HTTP/1.1", "Content-Length: 0", "Content-Length: 5"}},
		{true, []string{"POST / HTTP/1.1", "Content-Length: +0"}},
		{true, []string{"POST / HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked"}},
		{true, []string{"POST / HTTP/1.1", "transfer-encoding: identity"}},
	} {
		if r, err := parse(head(append(c.lines, "Host: one.example")...)); err != nil || r.last != c.want {
			t.Errorf("%q: last %v, error %v", c.lines, r.last, err)
		}
	}
}

// Goal: the end of a head is found however it is cut, with empty lines in front and with LF alone;
// what cannot be HTTP is known at its first byte.
func TestHeadEnd(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: one.example\r\n\r\n"
	for _, c := range []struct {
		b    string
		want int
	}{
		{get, len(get)},
		{get + get, len(get)},
		{"\r\n\n\r\n" + get, 5 + len(get)},
		{"GET / HTTP/1.1\nHost: a\n\nmore", 24},
		{"GET / HTTP/1.1\nHost: a\n\r\nmore", 25},
		{"GET / HTTP/1.1\r\nHost: a\r\n\nmore", 26},
		{"GET / HTTP/1.1\n\r\rHost: a\r\n\r", 0},
		{"\r\n\r\n\r\n\r\n", 0},
	} {
		for cut := range len(c.b) + 1 {
			if got := headEnd([]byte(c.b[:cut]), 0); got > 0 && (got != c.want || cut < c.want) || cut == len(c.b) && got != c.want {
				t.Errorf("%q: the head has %d bytes, want %d", c.b[:cut], got, c.want)
			}
			if !begins([]byte(c.b[:cut])) {
				t.Errorf("%q is no beginning", c.b[:cut])
			}
		}
		for seen, got := 0, 0; seen < len(c.b) && got == 0; seen++ { // a byte comes, and then another
			want := headEnd([]byte(c.b[:seen+1]), 0)
			if got = headEnd([]byte(c.b[:seen+1]), seen); got != want {
				t.Errorf("%q, the last byte of which is new: the head has %d bytes, want %d", c.b[:seen+1], got, want)
			}
		}
	}
	for _, b := range []string{"\x16\x03\x01", "\x00", " GET", "\r\r", "\r\n\x80", "(", "\x15"} {
		if begins([]byte(b)) {
			t.Errorf("%q can be HTTP", b)
		}
	}
}

// Goal: no request, whatever it has, gets an answer with a line of its own or that leads to another
// host than its own; net/http, where it takes a request as well, sees the same host and target.
func FuzzParse(f *testing.F) {
	f.Add(head("GET /a?b HTTP/1.1", "Host: One.example.:80"))
	f.Add(head("GET http://two.example?a HTTP/1.1", "Host: one.example", "Connection: a, close"))
	f.Add(head("OPTIONS * HTTP/1.1", "Host: [::1]:80", "Content-Length: 5"))
	f.Add([]byte("\r\nPOST / HTTP/1.0\nTransfer-Encoding: chunked\nhost:\ta\n\n"))
	f.Add(head("GET /\r\x00 HTTP/1.1", "Host: a\rb"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := headEnd(b, 0)
		if n == 0 {
			return
		}
		r, err := parse(b[:n])
		if err != nil {
			if _, ok := errors.AsType[refusal](err); !ok {
				t.Fatalf("%v is no refusal", err)
			}
			return
		}
		for _, c := range []byte(r.location) {
			if c <= ' ' || c == 0x7f {
				t.Fatalf("byte %#x in %q", c, r.location)
			}
		}
		rest, ok := strings.CutPrefix(r.location, "https://")
		host, _, _ := strings.Cut(rest, "/")
		again, fine := canonical(host)
		if !ok || !fine || again != host {
			t.Fatalf("%q has the host %q", r.location, host)
		}
		std, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b[emptyLines(b):n])))
		if err != nil {
			return
		}
		if want, ok := canonical(std.Host); !ok || want != host {
			t.Fatalf("host %q, that of net/http is %q", host, std.Host)
		}
		if strings.HasPrefix(std.RequestURI, "/") && r.location != "https://"+host+std.RequestURI {
			t.Fatalf("location %q, target %q", r.location, std.RequestURI)
		}
		if (std.ContentLength != 0 || std.Close) && !r.last {
			t.Fatalf("net/http sees content of %d bytes, close %v, and the connection goes on", std.ContentLength, std.Close)
		}
	})
}
