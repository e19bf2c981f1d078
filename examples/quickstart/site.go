package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sniproxy/hostdir/backend"
)

// checkTimeout bounds the check of a site, and headerTimeout the wait for a PROXY line.
const (
	checkTimeout  = 10 * time.Second
	headerTimeout = 5 * time.Second
)

// A site is an HTTPS server with a certificate of its own. Its page is one line of text.
type site struct {
	name    string
	ca      string // the file that its certificate is written to
	proxyV1 bool   // it wants the PROXY line; otherwise it is handed its connections

	certificate *x509.Certificate
	server      http.Server
}

// start makes the site's directory, relative to the working directory, and serves the site behind the socket in it.
func (s *site) start() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: s.name}, // curl refuses a certificate whose issuer has no name
		DNSNames:    []string{s.name},
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().AddDate(0, 0, 30),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	if s.certificate, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	if err := os.WriteFile(s.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return err
	}

	if err := os.Mkdir(s.name, 0o755); err != nil {
		return err
	}
	if s.proxyV1 {
		if err := os.WriteFile(filepath.Join(s.name, "send-proxy-v1"), nil, 0o644); err != nil {
			return err
		}
	}
	var listener net.Listener
	if s.proxyV1 {
		listener, err = net.Listen("unix", filepath.Join(s.name, "tls-socket"))
		listener = proxyListener{listener}
	} else {
		listener, err = backend.Listen(s.name)
	}
	if err != nil {
		return err
	}
	s.server.Handler = s
	s.server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	go s.server.ServeTLS(listener, "", "")
	return nil
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	how := "was handed your connection"
	if s.proxyV1 {
		how = "got a PROXY line from sniproxy"
	}
	fmt.Fprintf(w, "this is %s, which %s: you are %s\n", s.name, how, r.RemoteAddr)
}

// check fetches the page through the proxy at addr. Only the site's own certificate will do, and the client address on
// the page must be ours.
func (s *site) check(ctx context.Context, addr string) (page string, err error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	roots := x509.NewCertPool()
	roots.AddCert(s.certificate)
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
	page = string(body)
	if !strings.HasPrefix(page, "this is "+s.name+",") {
		return "", fmt.Errorf("not the page of this site: %q", page)
	}
	if !strings.HasSuffix(page, " "+local.String()+"\n") {
		return "", fmt.Errorf("the client address is %v, not that of the page: %q", local, page)
	}
	return page, nil
}

// A proxyListener accepts connections that begin with a line of version 1 of the PROXY protocol,
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt.
type proxyListener struct{ net.Listener }

func (l proxyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	// "a 108-byte buffer is always enough to store all the line and a trailing zero for string processing": 107 for us.
	return &proxyConn{Conn: conn, r: bufio.NewReaderSize(conn, 107)}, nil
}

// A proxyConn is a connection whose remote address is the one in its PROXY line. It reads the line when the address or
// the first byte is asked for, not when it is accepted: a silent client must not keep others waiting.
type proxyConn struct {
	net.Conn
	r      *bufio.Reader
	once   sync.Once
	client netip.AddrPort
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
	return net.TCPAddrFromAddrPort(c.client)
}

func (c *proxyConn) readLine() {
	c.Conn.SetReadDeadline(time.Now().Add(headerTimeout))
	defer c.Conn.SetReadDeadline(time.Time{})
	line, err := c.r.ReadSlice('\n') // fails when the buffer is full and has no line
	if err != nil {
		c.err = fmt.Errorf("no PROXY line: %w", err)
		return
	}
	c.client, c.err = parseProxyLine(string(line))
}

// parseProxyLine returns the client's address in a line "PROXY TCP4|TCP6 CLIENT LISTENER CPORT LPORT\r\n".
func parseProxyLine(line string) (netip.AddrPort, error) {
	line, ended := strings.CutSuffix(line, "\r\n")
	fields := strings.Split(line, " ")
	if !ended || len(fields) != 6 || fields[0] != "PROXY" || fields[1] != "TCP4" && fields[1] != "TCP6" {
		return netip.AddrPort{}, errors.New("not a PROXY line of version 1")
	}
	return netip.ParseAddrPort(net.JoinHostPort(fields[2], fields[4]))
}
