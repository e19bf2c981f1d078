package main

import (
	"errors"
	"net/http"
	"net/netip"
	"strings"

	"sniproxy/sni"
)

var (
	errHost   = errors.New("the host is neither a DNS name nor an IP address")
	errTarget = errors.New("the target is neither a path nor an http:// URL")
)

// redirect answers a request.
func redirect(w http.ResponseWriter, r *http.Request) {
	l, err := location(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Location", l) // http.Redirect would change the path
	w.WriteHeader(http.StatusPermanentRedirect)
}

// location returns the address that a request is for, with https.
func location(r *http.Request) (string, error) {
	host, ok := canonical(r.Host)
	if !ok {
		return "", errHost
	}
	path := r.RequestURI
	switch {
	case r.Method == http.MethodConnect:
		return "", errTarget
	case strings.HasPrefix(path, "/"):
	case path == "*" && r.Method == http.MethodOptions:
		path = "" // RFC 9112, Section 3.3: its "combined path and query component is empty"
	default: // a URL: Section 3.2.2
		scheme, rest, ok := strings.Cut(path, "://")
		if !ok || r.URL.Host == "" || r.URL.User != nil || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
			return "", errTarget
		}
		_, path = cutAuthority(rest)
		if !strings.HasPrefix(path, "/") && (path != "" || r.Method != http.MethodOptions) {
			path = "/" + path
		}
	}
	return "https://" + host + path, nil
}

// cutAuthority divides what is behind the "//" of a URL.
func cutAuthority(s string) (authority, path string) {
	if i := strings.IndexAny(s, "/?#"); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

// canonical returns the host in HOST or HOST:PORT, as sniproxy knows it; an IP address as it is.
func canonical(authority string) (host string, ok bool) {
	host, port := authority, ""
	if end := strings.IndexByte(authority, ']') + 1; end > 0 {
		host, port = authority[:end], authority[end:]
		inner, bracket := strings.CutPrefix(host[:end-1], "[")
		addr, err := netip.ParseAddr(inner)
		ok = bracket && err == nil && addr.Is6() && addr.Zone() == ""
	} else {
		if i := strings.IndexByte(authority, ':'); i >= 0 {
			host, port = authority[:i], authority[i:]
		}
		var name []byte
		var err error
		name, err = sni.AppendCanonical(nil, []byte(host))
		host, ok = string(name), err == nil
	}
	digits, colon := strings.CutPrefix(port, ":")
	return host, ok && (port == "" || colon && strings.Trim(digits, "0123456789") == "")
}
