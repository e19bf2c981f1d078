package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/acme"

	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/logline"
	"sniproxy/proxyproto"
	"sniproxy/sni"
)

// A relay passes the plain bytes of clients on to the service, and back.
type relay struct {
	service *service
}

// serve accepts clients until the listener is closed.
func (r *relay) serve(l *listener) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return
		}
		c := l.clients.admit(conn)
		go r.handle(c, l.terminator.server(c))
	}
}

// handle serves a client.
func (r *relay) handle(c *client, conn *tls.Conn) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	c.SetDeadline(time.Now().Add(handshakeTimeout))
	if conn.HandshakeContext(ctx) != nil || conn.ConnectionState().NegotiatedProtocol == acme.ALPNProto {
		return
	}
	c.SetDeadline(time.Time{})
	service, err := r.service.dial(context.Background())
	if err != nil {
		logline.Rationed(func() string { return "cannot connect to " + r.service.url + ": " + advice(err) })
		c.reset()
		return
	}
	defer service.Close()
	if r.service.header {
		if _, err := service.Write(header(c, conn.ConnectionState())); err != nil {
			c.reset()
			return
		}
	}
	if !exchange(conn, service) {
		if tcp, ok := service.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		c.reset()
		return
	}
	conn.Close()
}

// header returns the PROXY header for a client.
func header(c *client, state tls.ConnectionState) []byte {
	t := proxyproto.TLS{
		ALPN:     state.NegotiatedProtocol,
		Version:  strings.Replace(tls.VersionName(state.Version), "TLS ", "TLSv", 1),
		Cipher:   cipherName(state.CipherSuite),
		Verified: len(state.VerifiedChains) > 0,
		Resumed:  state.DidResume,
	}
	if t.Verified {
		t.CommonName = state.PeerCertificates[0].Subject.CommonName
	}
	// What a client asked for has been found to be a host. Without a name there is no such field.
	authority, _ := sni.AppendCanonical(nil, []byte(state.ServerName))
	client, listener := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	// A client of a balancer may have another address family than the balancer's connection, and a
	// header has one family. Without this it would name neither.
	if is4 := client.Addr().Unmap().Is4(); is4 != listener.Addr().Unmap().Is4() {
		unspecified := netip.IPv6Unspecified()
		if is4 {
			unspecified = netip.IPv4Unspecified()
		}
		listener = netip.AddrPortFrom(unspecified, listener.Port())
	}
	return proxyproto.AppendV2TLS(nil, client, listener, authority, t)
}

func addrPort(a net.Addr) netip.AddrPort {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort()
	}
	return netip.AddrPort{}
}

// cipherName returns what OpenSSL calls a cipher suite, and so everybody who reads PROXY headers.
// For TLS 1.3 it is the name that Go and the RFC have.
func cipherName(suite uint16) string {
	name := tls.CipherSuiteName(suite)
	exchange, cipher, ok := strings.Cut(strings.TrimPrefix(name, "TLS_"), "_WITH_")
	if !ok {
		return name
	}
	cipher = strings.Replace(cipher, "AES_", "AES", 1)
	cipher = strings.Replace(cipher, "_CBC_", "_", 1)
	cipher = strings.Replace(cipher, "CHACHA20_POLY1305_SHA256", "CHACHA20_POLY1305", 1)
	return strings.ReplaceAll(exchange+"_"+cipher, "_", "-")
}

// exchange passes bytes on in both directions until both have ended, and reports whether they did
// so without an error.
func exchange(client *tls.Conn, service net.Conn) bool {
	x := &flows{ends: make(chan error, 2)}
	go x.flow(client, service)
	go x.flow(service, client)
	if err := <-x.ends; err != nil {
		return false
	}
	return <-x.ends == nil
}

// flows are the two directions of a connection.
type flows struct {
	half atomic.Bool // one of them has ended
	ends chan error
}

// buffers are for bytes on their way. A TLS record has at most 16 KiB.
var buffers = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// flow passes on what src sends until that ends, and then the end.
func (f *flows) flow(src, dst net.Conn) {
	f.ends <- f.copy(src, dst)
}

func (f *flows) copy(src, dst net.Conn) error {
	buffer := buffers.Get().(*[16 << 10]byte)
	defer buffers.Put(buffer)
	for {
		if f.half.Load() {
			limit(src, dst)
		}
		n, err := src.Read(buffer[:])
		if n > 0 {
			if _, err := dst.Write(buffer[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF && isCut(src):
			return io.ErrUnexpectedEOF
		case err == io.EOF:
			if f.half.Swap(true) {
				return closeWrite(dst)
			}
			limit(dst, src) // the other direction
			return closeWrite(dst)
		case err != nil:
			return err
		}
	}
}

// isCut reports whether a client has ended its connection without an end of TLS. Anybody on the way
// could have done that, so it is no end for the service. (crypto/tls takes it for one.)
func isCut(conn net.Conn) bool {
	t, ok := conn.(*tls.Conn)
	return ok && t.NetConn().(*client).cut.Load()
}

// limit ends a connection of which one direction has ended if the other is silent for too long.
func limit(src, dst net.Conn) {
	late := time.Now().Add(limits.HalfClosed)
	src.SetReadDeadline(late)
	dst.SetWriteDeadline(late)
}

func closeWrite(conn net.Conn) error {
	c, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.New("cannot end one direction alone")
	}
	return c.CloseWrite()
}
