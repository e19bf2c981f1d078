package main

import (
	"net/netip"
	"strings"

	"sniproxy/sni"
)

// maxHead is how long the head of a request may be in bytes: its first line, its fields and the
// empty line behind them.
const maxHead = 8 << 10

// A request is what its answer depends on.
type request struct {
	method   string
	location string // the same with https
	last     bool   // of its connection
}

// A refusal is the answer to a request that is not redirected. It has no bytes of the client's.
type refusal struct{ status, reason string }

func (r refusal) Error() string { return r.status + ": " + r.reason }

const (
	badRequest = "400 Bad Request"
	timedOut   = "408 Request Timeout"
	tooLarge   = "431 Request Header Fields Too Large"
	notHTTP1   = "505 HTTP Version Not Supported"
)

var (
	errStart    = refusal{badRequest, "this is not HTTP"}
	errLine     = refusal{badRequest, "the first line is not METHOD TARGET HTTP/1.1"}
	errVersion  = refusal{notHTTP1, "only HTTP/1.0 and HTTP/1.1 are spoken here"}
	errField    = refusal{badRequest, "a header field is malformed"}
	errNoHost   = refusal{badRequest, "there is no Host"}
	errTwoHosts = refusal{badRequest, "there is more than one Host"}
	errHost     = refusal{badRequest, "the host is neither a DNS name nor an IP address"}
	errTarget   = refusal{badRequest, "the target is neither a path nor an http:// URL"}
	errTooLarge = refusal{tooLarge, "the head of the request is longer than 8 KiB"}
	errTimeout  = refusal{timedOut, "the request was not complete within ten seconds"}
)

// headEnd returns the length of the head at the beginning of b, with the empty line that ends it; 0
// if b does not have all of it. Empty lines in front are part of the head: RFC 9112, Section 2.2, "A
// server that is expecting to receive and parse a request-line SHOULD ignore at least one empty
// line". Lines may end in LF alone. The first from bytes were looked at before.
func headEnd(b []byte, from int) int {
	start := emptyLines(b)
	for i := max(start, from-2); i < len(b); i++ {
		if b[i] != '\n' {
			continue
		}
		rest := b[i+1:]
		switch {
		case len(rest) > 0 && rest[0] == '\n':
			return i + 2
		case len(rest) > 1 && rest[0] == '\r' && rest[1] == '\n':
			return i + 3
		}
	}
	return 0
}

// emptyLines returns the length of the empty lines at the beginning of b.
func emptyLines(b []byte) (n int) {
	for {
		switch {
		case n < len(b) && b[n] == '\n':
			n++
		case n+1 < len(b) && b[n] == '\r' && b[n+1] == '\n':
			n += 2
		default:
			return n
		}
	}
}

// begins reports whether b, which is not all of a head, can be the beginning of one. TLS and other
// protocols cannot, so they need not wait for their time limit.
func begins(b []byte) bool {
	b = b[emptyLines(b):]
	return len(b) == 0 || isToken(b[0]) || len(b) == 1 && b[0] == '\r'
}

// parse parses the head of a request. An error is a refusal, after which the connection ends; the
// method is returned all the same.
func parse(head []byte) (request, error) {
	lines := strings.Split(string(head[emptyLines(head):]), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimSuffix(line, "\r")
	}
	method, rest, _ := strings.Cut(lines[0], " ")
	target, version, ok := strings.Cut(rest, " ")
	r := request{method: method}
	if !ok || !isTokens(method) || target == "" || hasControls(target) {
		return r, errLine
	}
	digits, ok := strings.CutPrefix(version, "HTTP/")
	switch {
	case !ok || len(digits) != 3 || digits[1] != '.' || !isDigits(digits[:1]) || !isDigits(digits[2:]):
		return r, errLine
	case digits[0] != '1':
		return r, errVersion
	}
	r.last = digits == "1.0"

	var hosts []string
	for _, line := range lines[1 : len(lines)-2] { // an empty line, and nothing behind it
		name, value, ok := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !ok || !isTokens(name) || hasControls(strings.ReplaceAll(value, "\t", "")) {
			return r, errField
		}
		switch strings.ToLower(name) {
		case "host":
			hosts = append(hosts, value)
		case "connection":
			for option := range strings.SplitSeq(strings.ToLower(value), ",") {
				r.last = r.last || strings.Trim(option, " \t") == "close"
			}
		case "content-length":
			r.last = r.last || value != "0"
		case "transfer-encoding":
			// There is content. It could look like the next request: end with this one.
			r.last = true
		}
	}
	// RFC 9112, Section 3.2: "A server MUST respond with a 400 (Bad Request) status code to any
	// HTTP/1.1 request message that lacks a Host header field and to any request message that
	// contains more than one Host header field line or a Host header field with an invalid field
	// value."
	switch {
	case len(hosts) > 1:
		return r, errTwoHosts
	case len(hosts) == 0 && digits != "1.0":
		return r, errNoHost
	}
	authority, path := "", target
	if scheme, rest, ok := strings.Cut(target, "://"); ok && target[0] != '/' {
		// Section 3.2.2: "the origin server MUST ignore the received Host header field (if any) and
		// instead use the host information of the request-target".
		if scheme = strings.ToLower(scheme); scheme != "http" && scheme != "https" {
			return r, errTarget
		}
		end := strings.IndexAny(rest, "/?#")
		if end < 0 {
			end = len(rest)
		}
		if len(hosts) == 1 {
			if _, ok := canonical(hosts[0]); !ok {
				return r, errHost
			}
		}
		authority, path = rest[:end], rest[end:]
		if path != "" && path[0] != '/' || path == "" && method != "OPTIONS" {
			path = "/" + path
		}
	} else if len(hosts) == 1 {
		authority = hosts[0]
	} else {
		return r, errNoHost
	}
	switch {
	case target == "*" && method == "OPTIONS":
		path = "" // Section 3.3: its "combined path and query component is empty"
	case path != "" && path[0] != '/' || method == "CONNECT":
		return r, errTarget
	}
	host, ok := canonical(authority)
	if !ok {
		return r, errHost
	}
	r.location = "https://" + host + path
	return r, nil
}

// canonical returns the host in HOST or HOST:PORT, as sniproxy knows it; an IP address as it is.
func canonical(authority string) (host string, ok bool) {
	host, port := authority, ""
	if strings.HasPrefix(authority, "[") {
		end := strings.IndexByte(authority, ']') + 1
		if end == 0 {
			return "", false
		}
		host, port = authority[:end], authority[end:]
		addr, err := netip.ParseAddr(host[1 : end-1])
		ok = err == nil && addr.Is6() && addr.Zone() == ""
	} else {
		if i := strings.IndexByte(authority, ':'); i >= 0 {
			host, port = authority[:i], authority[i:]
		}
		b, err := sni.AppendCanonical(nil, []byte(host))
		host, ok = string(b), err == nil
	}
	return host, ok && (port == "" || port[0] == ':' && isDigits(port[1:]))
}

// isToken tells whether c may be in a token: RFC 9110, Section 5.6.2.
func isToken(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

func isTokens(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool { return c > 127 || !isToken(byte(c)) })
}

func isDigits(s string) bool { return strings.Trim(s, "0123456789") == "" }

// hasControls tells whether there are bytes in s that could end a line or a field elsewhere.
func hasControls(s string) bool {
	return strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 127 })
}
