package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"html/template"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sniproxy/hostdir/backend"
	"sniproxy/proxyproto"
)

// checkTimeout bounds the check of a site, and headerTimeout the wait for a PROXY line.
const (
	checkTimeout  = 10 * time.Second
	headerTimeout = 5 * time.Second
)

// A site is an HTTPS server with a certificate of its own, or a plain HTTP service for
// sniproxy-tls.
type site struct {
	name  string
	alias string // another name that its certificate is for; it may be empty
	kind  kind

	addr   string // of the plain HTTP service
	server http.Server
}

// A kind of site is by how its connections come.
type kind int

const (
	handed    kind = iota // the connection itself is handed over
	proxyLine             // a PROXY line and the bytes are forwarded
	plain                 // plain HTTP, from sniproxy-tls
)

func (k kind) String() string {
	return [...]string{
		"sniproxy has handed me your connection and is out of the way",
		"sniproxy forwards the bytes, and told me by a PROXY line who you are",
		"I am a plain HTTP service; sniproxy-tls ends TLS for me",
	}[k]
}

// start makes the site's directory, relative to the working directory, and serves the site behind
// the socket in it. The plain HTTP service leaves that to sniproxy-tls, and gives it a certificate.
func (s *site) start(ca *authority) error {
	names := []string{s.name}
	if s.alias != "" {
		names = append(names, s.alias)
	}
	certificate, key, err := ca.issue(names)
	if err != nil {
		return err
	}
	if err := os.Mkdir(s.name, 0o755); err != nil {
		return err
	}
	s.server.Handler = s
	if s.kind == plain {
		for file, content := range map[string][]byte{"cert.pem": certificate, "key.pem": key} {
			if err := os.WriteFile(filepath.Join(s.name, file), content, 0o600); err != nil {
				return err
			}
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s.addr = l.Addr().String()
		go s.server.Serve(l)
		return nil
	}

	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return err
	}
	s.server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{pair}}
	var l net.Listener
	if s.kind == proxyLine {
		if err := os.WriteFile(filepath.Join(s.name, "send-proxy-v1"), nil, 0o644); err != nil {
			return err
		}
		l, err = net.Listen("unix", filepath.Join(s.name, "tls-socket"))
		l = proxyListener{l}
	} else {
		l, err = backend.Listen(s.name)
	}
	if err != nil {
		return err
	}
	go s.server.ServeTLS(l, "", "")
	return nil
}

// A page is what a site shows.
type page struct{ Name, Client, How string }

func (p page) text() string {
	return fmt.Sprintf("this is %s, you are %s\n%s\n", p.Name, p.Client, p.How)
}

var html = template.Must(template.New("").Parse(`<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{.Name}}</title>
<style>
body { font: 18px/1.5 sans-serif; max-width: 32em; margin: 4em auto; padding: 0 1em }
</style>
<h1>{{.Name}}</h1>
<p>You are <b>{{.Client}}</b>.</p>
<p>How you got here: {{.How}}.</p>
</html>
`))

// ServeHTTP shows the page, as text to those who do not ask for HTML.
func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p := page{s.name, r.RemoteAddr, s.kind.String()}
	if s.kind == plain {
		p.Client = r.Header.Get("X-Forwarded-For")
	}
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		html.Execute(w, p) // fails if the client has gone
		return
	}
	io.WriteString(w, p.text())
}

// check fetches the page through the proxy at addr. The certificate must be from our authority, and
// the client address on the page must be ours.
func (s *site) check(ctx context.Context, addr string, ca *authority) (text string, err error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	roots := x509.NewCertPool()
	roots.AddCert(ca.certificate)
	var local net.Addr
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err == nil {
				local = conn.LocalAddr()
			}
			return conn, err
		},
		DisableKeepAlives: true,
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+s.name, nil)
	if err != nil {
		return "", err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	want := page{s.name, local.String(), s.kind.String()}
	if s.kind == plain {
		want.Client = local.(*net.TCPAddr).IP.String() // X-Forwarded-For has no port
	}
	if got := string(body); got != want.text() {
		return "", fmt.Errorf("the page is %q, not %q", got, want.text())
	}
	return want.text(), nil
}

// A proxyListener accepts connections that begin with a line of version 1 of the PROXY protocol.
type proxyListener struct{ net.Listener }

func (l proxyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &proxyConn{Conn: conn, r: bufio.NewReaderSize(conn, proxyproto.MaxV1)}, nil
}

// A proxyConn is a connection whose remote address is the one in its PROXY line. It reads the line
// when the address or the first byte is asked for, not when it is accepted: a silent client must
// not keep others waiting.
type proxyConn struct {
	net.Conn
	r      *bufio.Reader
	once   sync.Once
	client net.Addr
	err    error
}

func (c *proxyConn) Read(b []byte) (int, error) {
	if c.once.Do(c.readLine); c.err != nil {
		return 0, c.err
	}
	return c.r.Read(b)
}

func (c *proxyConn) RemoteAddr() net.Addr {
	if c.once.Do(c.readLine); c.err != nil {
		return c.Conn.RemoteAddr()
	}
	return c.client
}

func (c *proxyConn) readLine() {
	c.Conn.SetReadDeadline(time.Now().Add(headerTimeout))
	defer c.Conn.SetReadDeadline(time.Time{})
	line, err := c.r.ReadSlice('\n') // fails when the buffer is full and has no line
	if err != nil {
		c.err = fmt.Errorf("no PROXY line: %w", err)
		return
	}
	header, n, err := proxyproto.Parse(line)
	if err != nil || n != len(line) || !header.Client.IsValid() {
		c.err = fmt.Errorf("not a PROXY line of a TCP connection: %q (%v)", line, err)
		return
	}
	c.client = net.TCPAddrFromAddrPort(header.Client)
}
