package main

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"
)

// head returns the head of a request with a first line and fields.
func head(lines ...string) []byte { return []byte(strings.Join(lines, "\r\n") + "\r\n\r\n") }

// Goal: the redirect keeps the path and the query to the byte, and the host as sniproxy knows it.
func TestLocation(t *testing.T) {
	d := start(t)
	for _, c := range []struct{ line, host, want string }{
		{"GET / HTTP/1.1", "one.example", "https://one.example/"},
		{"GET /a/b?c=d&e HTTP/1.1", "one.example", "https://one.example/a/b?c=d&e"},
		{"POST /a HTTP/1.1", "one.example:80", "https://one.example/a"},
		{"HEAD /a HTTP/1.1", "one.example:", "https://one.example/a"},
		{"GET / HTTP/1.0", "one.example:8080", "https://one.example/"},
		{"BREW /pot HTTP/1.1", "one.example", "https://one.example/pot"},
		// To the byte.
		{"GET //two.example/..//. HTTP/1.1", "one.example", "https://one.example//two.example/..//."},
		{`GET /%2F%0d%0aX:y;"<>\^{|}'[]?a?b#c`, "one.example", "https://one.example" + `/%2F%0d%0aX:y;"<>\^{|}'[]?a?b#c`},
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
		client := d.dial()
		client.send(head(lines...))
		method, _, _ := strings.Cut(c.line, " ")
		client.expect(method, c.want)
		client.Close()
	}
}

// Goal: what has no host, or none that could be a name, is refused, and so is what is not HTTP.
// Nothing of the request is in the answer.
func TestRefusals(t *testing.T) {
	const get = "GET / HTTP/1.1"
	d := start(t)
	for _, lines := range [][]string{
		{get},
		{"GET / HTTP/1.0"},
		{"GET http://one.example/ HTTP/1.1"},
		{get, "Host: one.example", "hOST: one.example"},
		{get, "Host:"},
		{get, "Host: ."},
		{get, "Host: :80"},
		{get, "Host: one..example"},
		{get, "Host: one.example.."},
		{get, "Host: -one.example"},
		{get, "Host: one.example/two"},
		{get, "Host: one.example?"},
		{get, "Host: one.example@two.example"},
		{get, "Host: user:pass@two.example"},
		{get, "Host: one.example:80:80"},
		{get, "Host: one.example:http"},
		{get, "Host: one.example:+80"},
		{get, "Host: one.example, two.example"},
		{get, "Host: one example"},
		{get, "Host: one%2eexample"},
		{get, "Host: \xf0\x9f\x95\xb8.ws"},
		{get, "Host: ::1"},
		{get, "Host: [::1"},
		{get, "Host: []"},
		{get, "Host: ]"},
		{get, "Host: a[::1]"},
		{get, "Host: [192.0.2.1]"},
		{get, "Host: [fe80::1%eth0]"},
		{get, "Host: [fe80::1%25eth0]"},
		{get, "Host: [::1]80"},
		{get, "Host: [::1].example"},
		{get, "Host: " + strings.Repeat("a.", 127) + "a"},
		{"GET http:///a HTTP/1.1", "Host: one.example"},
		{"GET http://user@two.example/ HTTP/1.1", "Host: one.example"},
		{"GET ftp://two.example/ HTTP/1.1", "Host: one.example"},
		{"GET two.example HTTP/1.1", "Host: one.example"},
		{"GET ?a HTTP/1.1", "Host: one.example"},
		{"GET * HTTP/1.1", "Host: one.example"},
		{"GET /%zz HTTP/1.1", "Host: one.example"},
		{"CONNECT one.example:443 HTTP/1.1", "Host: one.example"},
		{"GET /", "Host: one.example"},
		{"GET / a HTTP/1.1", "Host: one.example"},
		{"GET /\x00 HTTP/1.1", "Host: one.example"},
		{"GET /\x7f HTTP/1.1", "Host: one.example"},
		{"PROXY TCP4 192.0.2.1 192.0.2.2 1 80", get, "Host: one.example"},
		{get, " Host: one.example"},
		{get, "Host: one.example", "A: b\x00c"},
	} {
		c := d.dial()
		c.send(head(lines...))
		got := c.refused(400)
		for _, line := range lines {
			if strings.Contains(got, line) {
				t.Errorf("%q: the answer is %q", lines, got)
			}
		}
		c.Close()
	}
}

// Goal: no request, whatever it has, gets an answer with a line of its own, or one that leads to
// another host than its own.
func FuzzLocation(f *testing.F) {
	f.Add(head("GET /a?b HTTP/1.1", "Host: One.example.:80"))
	f.Add(head("GET http://two.example?a HTTP/1.1", "Host: one.example", "Connection: a, close"))
	f.Add(head("OPTIONS * HTTP/1.1", "Host: [::1]:80", "Content-Length: 5"))
	f.Add(head("GET /\r\x00 HTTP/1.1", "Host: a\rb"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		l, err := location(r)
		if err != nil {
			return
		}
		for _, c := range []byte(l) {
			if c < ' ' || c == 0x7f {
				t.Fatalf("byte %#x in %q", c, l)
			}
		}
		rest, ok := strings.CutPrefix(l, "https://")
		host, path := cutAuthority(rest)
		want, fine := canonical(r.Host)
		if !ok || !fine || host != want || !strings.HasSuffix("/"+r.RequestURI, path) && !strings.HasSuffix(r.RequestURI, strings.TrimPrefix(path, "/")) {
			t.Fatalf("%q of a request to %q for %q", l, r.Host, r.RequestURI)
		}
	})
}
