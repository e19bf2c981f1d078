package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/logline"
)

const (
	// headMost is the most bytes that the head of a request may have.
	headMost = 64 << 10

	// idleTimeout is how long a connection may be without a request.
	idleTimeout = 3 * time.Minute

	// serviceIdle is how long a connection to the service is kept without a request. It is short,
	// since services close theirs after some seconds (Node.js after five, gunicorn after two), and
	// a request on its way at that moment would be lost.
	serviceIdle = time.Second

	// serviceIdleMost is the most such connections.
	serviceIdleMost = 256

	// streamsMost is the most requests at once of a connection by HTTP/2, if that is not too large
	// a part of all.
	streamsMost = 100

	// bodyMost is how many bytes of the bodies of requests by HTTP/2 wait for the service, for each
	// connection. Go's own limit is 1 MiB: a few hundred clients could fill the memory.
	bodyMost = 256 << 10

	// continueTimeout is how long a service has to answer "Expect: 100-continue".
	continueTimeout = time.Second
)

// A proxy passes the requests of clients on to the service.
type proxy struct {
	names    names
	service  *service
	clients  *clients
	server   *http.Server
	reverse  *httputil.ReverseProxy
	verbatim http.RoundTripper // for a URI that package net/http would write otherwise
	requests atomic.Int64      // under way
	stopping atomic.Bool
}

func newProxy(n names, s *service, c *clients) *proxy {
	p := &proxy{names: n, service: s, clients: c}
	transport := func() *http.Transport {
		return &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return s.dial(ctx)
			},
			DisableCompression:    true, // or it would ask for gzip, and unpack what clients want packed
			MaxIdleConnsPerHost:   serviceIdleMost,
			IdleConnTimeout:       serviceIdle,
			ExpectContinueTimeout: continueTimeout,
		}
	}
	p.verbatim = newVerbatim(s, transport())
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        p.rewrite,
		Transport:      &router{transport(), p.verbatim},
		FlushInterval:  headDelay,
		ModifyResponse: pace,
		ErrorHandler:   p.fail,
		ErrorLog:       log.New(io.Discard, "", 0), // it is said by fail, or the client's own doing
		BufferPool:     &bufferPool{},
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	p.server = &http.Server{
		Handler:                      p,
		DisableGeneralOptionsHandler: true, // OPTIONS * is for the service
		ReadHeaderTimeout:            handshakeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               headMost,
		ErrorLog:                     log.New(panics{}, "", 0),
		Protocols:                    protocols,
		ConnState:                    p.note,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          min(streamsMost, c.most/8+1),
			MaxReceiveBufferPerConnection: bodyMost,
			MaxReceiveBufferPerStream:     bodyMost,
		},
	}
	return p
}

// panics prints what an http.Server says of a panic. The rest it says is about clients.
type panics struct{}

func (panics) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("panic")) {
		logline.Err("%s", printable(string(b)))
	}
	return len(b), nil
}

// A bufferPool has the buffers for answers.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[32 << 10]byte); ok {
		return b[:]
	}
	return make([]byte, 32<<10)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put((*[32 << 10]byte)(b)) }

// ServeHTTP passes a request on.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer p.requests.Add(-1)
	if p.requests.Add(1) > int64(p.clients.most) {
		p.clients.makeRoom(true) // for the next
		w.Header().Set("Retry-After", "1")
		http.Error(w, "503 Service Unavailable: too many requests at once", http.StatusServiceUnavailable)
		return
	}
	if p.stopping.Load() && r.Header.Get("Upgrade") == "" {
		w.Header().Set("Connection", "close") // for HTTP/2 it is GOAWAY
	}
	// HTTP/1.0 knows no Host.
	host := withoutPort(r.Host)
	if _, ok := p.names.find(host); !ok || host == "" && (r.Host != "" || r.ProtoAtLeast(1, 1)) {
		http.Error(w, "421 Misdirected Request: this host is not served here", http.StatusMisdirectedRequest)
		return
	}
	// HTTP/2 allows a space in a URI, where it would end in a request line.
	if strings.Contains(r.RequestURI, " ") {
		http.Error(w, "400 Bad Request: a space in the URI", http.StatusBadRequest)
		return
	}
	if r.Method == http.MethodConnect {
		http.Error(w, "405 Method Not Allowed: this is not a proxy for CONNECT", http.StatusMethodNotAllowed)
		return
	}
	// A service may answer while the client still sends.
	http.NewResponseController(w).EnableFullDuplex() // for HTTP/2 it is always so
	p.reverse.ServeHTTP(&answer{ResponseWriter: w}, r)
}

// withoutPort returns a Host without its port.
func withoutPort(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && strings.Trim(host[i+1:], "0123456789") == "" {
		return host[:i]
	}
	return host
}

// An answer is what a service answers. All that has come of a body is sent at once, but not in a
// record of its own if it is the end, which is sent anyway.
type answer struct {
	http.ResponseWriter
	left int64 // bytes that the body still has; less than 0 if that is not known
}

func (a *answer) WriteHeader(status int) {
	h := a.Header()
	if status >= 200 {
		if h["Content-Type"] == nil {
			h["Content-Type"] = nil // an http.Server would guess one
		}
		n, err := strconv.ParseInt(h.Get("Content-Length"), 10, 64)
		if err != nil {
			n = -1
		}
		a.left = n
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	n, err := a.ResponseWriter.Write(b)
	if err == nil && a.left != int64(n) {
		err = http.NewResponseController(a.ResponseWriter).Flush()
	}
	if a.left > 0 {
		a.left -= int64(n)
	}
	return n, err
}

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// headDelay is how long the head of an answer waits for the beginning of the body, to be sent with
// it.
const headDelay = 2 * time.Millisecond

// pace has package httputil keep to headDelay. Where the length of a body is not known it would
// send the head by itself.
func pace(r *http.Response) error {
	if r.ContentLength < 0 && r.StatusCode != http.StatusSwitchingProtocols {
		r.ContentLength = 0 // the header counts
	}
	return nil
}

// rewrite makes the request for the service of the one of the client.
func (p *proxy) rewrite(r *httputil.ProxyRequest) {
	host := r.In.Host
	if host == "" {
		host = r.In.TLS.ServerName
		if host == "" {
			host = p.names[0]
		}
	}
	r.Out.Host = host
	// Package net/http needs a host to connect to. An Opaque is written as it is.
	r.Out.URL = &url.URL{Scheme: "http", Host: "service", Opaque: originForm(r.In.RequestURI)}
	for name := range r.Out.Header {
		if private(name) {
			delete(r.Out.Header, name)
		}
	}
	r.Out.Header.Set("X-Forwarded-For", forwardedFor(r.In.RemoteAddr))
	r.Out.Header.Set("X-Forwarded-Proto", "https")
	r.Out.Header.Set("X-Forwarded-Host", host)
	if !mayUpgrade(r.Out.Header.Get("Upgrade")) {
		r.Out.Header.Del("Connection")
		r.Out.Header.Del("Upgrade")
	}
	if r.Out.Body == nil {
		return
	}
	r.Out.Trailer = nil
	for name := range r.In.Trailer {
		if !private(name) {
			if r.Out.Trailer == nil {
				r.Out.Trailer = make(http.Header)
			}
			r.Out.Trailer[name] = nil
		}
	}
	r.Out.Body = &body{ReadCloser: r.Out.Body, from: r.In, trailer: r.Out.Trailer}
}

// originForm returns a request's URI without a scheme and a host, which a client may put in front.
func originForm(uri string) string {
	_, rest, ok := strings.Cut(uri, "://")
	if uri == "" || uri[0] == '/' || !ok {
		return uri
	}
	i := strings.IndexAny(rest, "/?")
	switch {
	case i < 0:
		return "/"
	case rest[i] == '?':
		return "/" + rest[i:]
	}
	return rest[i:]
}

// private reports whether a header is not passed on from a client: whatever says who it is, and
// names with an underscore. Many services take that for a hyphen, and some (CGI, RFC 3875, Section
// 4.1.18) any other character, too.
func private(name string) bool {
	name = strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '_':
			return r
		}
		return '-'
	}, name)
	return strings.HasPrefix(name, "x-forwarded-") || name == "forwarded" || name == "x-real-ip" || strings.Contains(name, "_")
}

// forwardedFor returns the address of a client without port and zone.
func forwardedFor(remote string) string {
	addr, err := netip.ParseAddrPort(remote)
	if err != nil {
		return "unknown"
	}
	return addr.Addr().Unmap().WithZone("").String()
}

// mayUpgrade reports whether a client may change to these protocols. Within another version of HTTP
// it could send whatever headers it likes.
func mayUpgrade(protocols string) bool {
	for protocol := range strings.SplitSeq(strings.ToLower(protocols), ",") {
		protocol = strings.TrimSpace(protocol)
		if strings.HasPrefix(protocol, "h2") || strings.HasPrefix(protocol, "http") || strings.HasPrefix(protocol, "tls") {
			return false
		}
	}
	return true
}

// A body is what a client sends behind the head of a request.
type body struct {
	io.ReadCloser
	from    *http.Request
	trailer http.Header // for the service; its values are known at the end
	failed  atomic.Bool // the client has sent something else, or not all of it
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch err {
	case nil:
	case io.EOF:
		for name := range b.trailer {
			b.trailer[name] = b.from.Trailer[name]
		}
	default:
		b.failed.Store(true)
	}
	return n, err
}

// fail answers a request that the service has not answered.
func (p *proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	if b, ok := r.Body.(*body); ok && b.failed.Load() {
		http.Error(w, "400 Bad Request: the body is malformed, or has ended early", http.StatusBadRequest)
		return
	}
	status := http.StatusBadGateway
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		status = http.StatusGatewayTimeout
	}
	if r.Context().Err() == nil {
		logline.Rationed(func() string { return p.failure(err) })
	}
	http.Error(w, fmt.Sprintf("%d %s: the service behind this host does not answer", status, http.StatusText(status)), status)
}

// failure says what is wrong with the service.
func (p *proxy) failure(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return "cannot connect to " + p.service.url + ": " + advice(err)
	}
	return "no answer from " + p.service.url + ": " + printable(err.Error())
}

// A router chooses the way to write a request.
type router struct{ usual, verbatim http.RoundTripper }

func (r *router) RoundTrip(request *http.Request) (*http.Response, error) {
	// For package net/url this Opaque would be a host.
	if strings.HasPrefix(request.URL.Opaque, "//") {
		return r.verbatim.RoundTrip(request)
	}
	return r.usual.RoundTrip(request)
}

// A verbatim makes requests whose URI begins with two slashes. Package net/http cannot write such
// an URI as it is, so each has a connection of its own, on which another one is replaced.
type verbatim struct{ transport *http.Transport }

// placeholder is the URI that is replaced.
const placeholder = "/uri"

type uriKey struct{}

func newVerbatim(s *service, transport *http.Transport) *verbatim {
	transport.DisableKeepAlives = true
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := s.dial(ctx)
		if err != nil {
			return nil, err
		}
		return &replacing{Conn: conn, uri: ctx.Value(uriKey{}).(string)}, nil
	}
	return &verbatim{transport}
}

func (v *verbatim) RoundTrip(r *http.Request) (*http.Response, error) {
	uri := r.URL.Opaque
	r = r.WithContext(context.WithValue(r.Context(), uriKey{}, uri))
	r.URL = &url.URL{Scheme: r.URL.Scheme, Host: r.URL.Host, Path: placeholder}
	return v.transport.RoundTrip(r)
}

// A replacing is a connection on which the URI of the first request is another.
type replacing struct {
	net.Conn
	uri  string
	done bool
}

func (c *replacing) Write(b []byte) (int, error) {
	if c.done {
		return c.Conn.Write(b)
	}
	c.done = true
	method, rest, ok := bytes.Cut(b, []byte(" "+placeholder+" "))
	if !ok {
		return 0, errors.New("the request line was not written at once")
	}
	line := append(append(bytes.Clone(method), " "+c.uri+" "...), rest...)
	n, err := c.Conn.Write(line)
	if err != nil {
		return min(n, len(b)), err
	}
	return len(b), nil
}

// stop ends the server, for which it has until ctx is done: nobody comes any more. Before the
// server is told, it waits for those who have just come, or are sending the head of a request: the
// server would drop them.
func (p *proxy) stop(ctx context.Context) {
	for quiet := 0; quiet < 3 && ctx.Err() == nil; quiet++ {
		if p.clients.coming() {
			quiet = 0
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.server.Shutdown(ctx)
}

// note remembers the state of a connection. HTTP/2 has its own way to end, without a loss.
func (p *proxy) note(conn net.Conn, state http.ConnState) {
	t, ok := conn.(*tls.Conn)
	if !ok {
		return
	}
	c := t.NetConn().(*client)
	switch {
	case state == http.StateNew:
		c.wait.Store(waitHandshake)
	case state == http.StateIdle && t.ConnectionState().NegotiatedProtocol != "h2":
		c.wait.Store(c.last.Load())
	default:
		c.wait.Store(waitNone)
	}
}
