package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/acme"

	"sniproxy/cmd/internal/logline"
	"sniproxy/sni"
)

// handshakeTimeout is how long a handshake may take, and how long the head of a request.
const handshakeTimeout = 10 * time.Second

// A terminator ends TLS.
type terminator struct {
	names  names
	http   bool
	files  *files
	orders *orders // nil if the files are all there is

	current atomic.Pointer[tls.Config]
}

func newTerminator(n names, http bool, f *files, o *orders) *terminator {
	t := &terminator{names: n, http: http, files: f, orders: o}
	t.renew()
	return t
}

// renew makes a new configuration. A session that was begun under another one cannot be resumed, so
// a new client-ca.pem counts for those who have a ticket, too.
func (t *terminator) renew() {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetCertificate:     t.certificate,
		GetConfigForClient: t.configFor,
	}
	if t.http {
		// http/1.0 is what `curl --http1.0` offers.
		config.NextProtos = []string{"h2", "http/1.1", "http/1.0"}
	}
	if pool := t.files.clientCA.Load(); pool != nil {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	}
	t.current.Store(config)
}

// server returns the TLS connection of a client.
func (t *terminator) server(c *client) *tls.Conn { return tls.Server(c, t.current.Load()) }

// refusal is for clients that get unrecognized_name: crypto/tls sends that where there is no
// certificate. There is nothing that such a client could resume, and no protocol that it could
// miss.
var refusal = &tls.Config{
	SessionTicketsDisabled: true,
	GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil },
}

// configFor returns the configuration for a client; nil is the one that there is.
func (t *terminator) configFor(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	name, ok := t.names.find(hello.ServerName)
	if !ok {
		// What is not canonical is never printed. The proxy lets nobody through with it.
		if host, err := sni.AppendCanonical(nil, []byte(hello.ServerName)); err == nil {
			logline.Rationed(func() string {
				return fmt.Sprintf("a client asked for a host that is not served: to serve %s, give it as a NAME", host)
			})
		}
		return refusal, nil
	}
	single := ""
	if len(hello.SupportedProtos) == 1 {
		single = hello.SupportedProtos[0]
	}
	switch {
	case single == acme.ALPNProto:
		return t.validation(hello.ServerName, name), nil
	case t.http || single == "":
		return nil, nil
	}
	// The service knows whether it speaks that. Some clients insist on an answer, PostgreSQL's
	// above all.
	config := t.current.Load().Clone()
	config.NextProtos = []string{single}
	return config, nil
}

// validation returns the configuration for an ACME server that validates a name. It presents no
// certificate, even where clients must.
func (t *terminator) validation(host, name string) *tls.Config {
	if t.orders == nil || !strings.EqualFold(host, name) {
		return refusal
	}
	cert := t.orders.challenge(name)
	if cert == nil {
		return refusal
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		NextProtos:             []string{acme.ALPNProto},
		Certificates:           []tls.Certificate{*cert},
	}
}

// certificate returns the certificate for a client.
func (t *terminator) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if pair := t.files.pair.Load(); pair != nil {
		return pair, nil
	}
	name, _ := t.names.find(hello.ServerName)
	ctx, cancel := context.WithTimeout(hello.Context(), handshakeTimeout-time.Second)
	defer cancel()
	return t.orders.get(ctx, name)
}

// A listener gives an http.Server its connections.
type listener struct {
	net.Listener
	clients    *clients
	terminator *terminator
}

// Accept returns the TLS connection of the next client, before the handshake.
func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.terminator.server(l.clients.admit(conn)), nil
}
