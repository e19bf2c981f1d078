package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/proxyproto"
	"sniproxy/sni"
)

// A backend is a tenant's: it may answer anything, or nothing. So a handshake has a time limit, and
// what the backend says is shown only in part, and with nothing in it that could harm a terminal.
const (
	handshakeLimit = 10 * time.Second // for all tries with one backend together

	namesMost = 5   // names of a certificate that are shown
	wordsMost = 200 // bytes of one of them, and of an error
)

// A handshake is what was found out by making one.
type handshake struct {
	fault   string // why clients cannot be served, "" if they can
	remarks []string
	late    bool // it took all the time
}

// askedName returns the name that a handshake asks a backend for: one that a wildcard serves.
func askedName(name []byte) string {
	rest, wildcard := strings.CutPrefix(string(name), "*")
	if !wildcard {
		return rest
	}
	if asked := "sniproxy-check" + rest; len(asked) <= sni.MaxName {
		return asked
	}
	return "a" + rest
}

// shakeHands makes a handshake with the backend of a host. If there is no certificate in it, it
// tries again with another PROXY header, or without one: marker and backend that do not agree are
// the commonest mistake. It closes the connection that it is given.
func (c *checker) shakeHands(d *hostdir.Dialer, h host, b hostdir.Backend, limit time.Duration) handshake {
	if h.name == nil || limit == 0 {
		unix.Close(b.FD)
		if limit == 0 {
			return handshake{remarks: []string{"no handshake is made, as many others have kept this waiting"}}
		}
		return handshake{remarks: []string{"no handshake is made, as the name is not known: give it as NAME"}}
	}
	deadline := time.Now().Add(min(limit, handshakeLimit))
	s := session{name: askedName(h.name), any: string(h.name) == "*", limit: limit}
	first := s.try(b, b.Proxy, deadline)
	if first.certificate != nil {
		shaken := s.judge(first)
		switch {
		case shaken.fault != "" || first.err != nil:
		case b.Datagram:
			shaken.remarks = append(shaken.remarks, noECH)
		default:
			remark, late := c.tryECH(d, h, &s, first, deadline)
			shaken.remarks, shaken.late = append(shaken.remarks, remark), late
		}
		return shaken
	}
	http := first.isHTTP()
	for _, version := range otherHeaders[b.Proxy] {
		left := time.Until(deadline)
		if first.late() || left <= 0 {
			break
		}
		again, _, err := dial(d, h, left)
		if err != nil {
			break
		}
		next := s.try(again, version, deadline)
		if next.certificate != nil {
			return handshake{fault: disagreement(b.Proxy, version)}
		}
		http = http || next.isHTTP()
	}
	if http {
		return handshake{fault: "the backend speaks plain HTTP on tls-socket: let it speak TLS there (nginx: `listen unix:… ssl`, HAProxy: `ssl crt …`)"}
	}
	return handshake{fault: s.failure(first), late: first.late()}
}

// otherHeaders are the versions of the PROXY header, 0 for none, to try where one did not do.
var otherHeaders = [3][]uint8{0: {1, 2}, 1: {0, 2}, 2: {0, 1}}

// disagreement says how the markers and the backend differ, in the words of the log.
func disagreement(marked, expected uint8) string {
	does, remedy := "expects no PROXY header", "or remove that marker"
	if expected > 0 {
		does, remedy = fmt.Sprintf("expects a PROXY header of version %d", expected), fmt.Sprintf("or make send-proxy-v%d", expected)
		if marked > 0 {
			remedy += fmt.Sprintf(" in place of send-proxy-v%d", marked)
		}
	}
	return fmt.Sprintf("the backend %s; %s: have it do so, %s", does, hostdir.Expects(marked), remedy)
}

// A session is what the handshakes with a backend have in common.
type session struct {
	name  string
	any   bool // the backend serves every name
	limit time.Duration
}

// An attempt is how a handshake went.
type attempt struct {
	certificate *x509.Certificate
	version     uint16 // of TLS; 0 if the handshake did not come to its end
	first       []byte // the first bytes of the answer
	proxy       uint8  // the version of the PROXY header
	err         error
}

func (a *attempt) late() bool {
	return errors.Is(a.err, os.ErrDeadlineExceeded) || errors.Is(a.err, hostdir.BacklogFull)
}

func (a *attempt) isHTTP() bool { return strings.HasPrefix(string(a.first), "HTTP/") }

// try makes a handshake behind a PROXY header of a version, and closes the connection.
func (s *session) try(b hostdir.Backend, proxy uint8, deadline time.Time) (a attempt) {
	a.proxy = proxy
	conn, err := newConn(b, proxy, s.name, deadline)
	if err != nil {
		a.err = err
		return a
	}
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{
		ServerName:         s.name,
		InsecureSkipVerify: true, // whom clients trust is theirs to decide
		MinVersion:         tls.VersionTLS10,
		CipherSuites:       suites(),
		// Even if the backend then wants a certificate of the client's.
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) (err error) {
			a.certificate, err = x509.ParseCertificate(raw[0])
			return err
		},
	})
	if a.err = client.Handshake(); a.err == nil {
		a.version = client.ConnectionState().Version
		client.Close()
	}
	a.first = conn.first
	return a
}

// suites returns all cipher suites: whether the backend's are good is not the question.
func suites() (all []uint16) {
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		all = append(all, s.ID)
	}
	return all
}

// judge says what a certificate is good for.
func (s *session) judge(a attempt) handshake {
	c := a.certificate
	var faults []string
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if err := c.VerifyHostname(s.name); err != nil && !s.any {
		fault("the certificate is not for %s but for %s: give the backend one for %s", s.name, namesOf(c), s.name)
	}
	const day = "2006-01-02"
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		fault("the certificate has expired on %s: renew it, and have the backend load it", c.NotAfter.UTC().Format(day))
	case now.Before(c.NotBefore):
		fault("the certificate is not valid before %s: check the clock, or wait", c.NotBefore.UTC().Format(day))
	}
	if a.err != nil && !isAlert(a.err) {
		fault("the handshake fails: %s", s.failure(a))
	}
	if len(faults) > 0 {
		return handshake{fault: strings.Join(faults, "; "), late: a.late()}
	}
	version := "TLS"
	if a.err == nil {
		version = tls.VersionName(a.version)
	}
	remarks := []string{fmt.Sprintf("%s, with a certificate for %s until %s", version, namesOf(c), c.NotAfter.UTC().Format(day))}
	if a.err != nil {
		remarks = append(remarks, "the backend then ended the handshake, perhaps since it wants a certificate of the client's: "+clean(a.err.Error()))
	}
	return handshake{remarks: remarks}
}

// failure says why there was no certificate.
func (s *session) failure(a attempt) string {
	switch {
	case errors.Is(a.err, hostdir.BacklogFull):
		return hostdir.BacklogFull.Error() + ": the backend has taken no connection " + limitWords(s.limit)
	case a.late() && len(a.first) == 0:
		return "the backend gave no answer to a ClientHello " + limitWords(s.limit) + ": it is stopped or busy, or waits for something other than TLS"
	case a.late():
		return "the backend did not complete its answer to a ClientHello " + limitWords(s.limit)
	case isAlert(a.err):
		return fmt.Sprintf("the backend refuses a handshake for %s: %s", s.name, clean(a.err.Error()))
	case len(a.first) == 0 && (errors.Is(a.err, io.EOF) || errors.Is(a.err, unix.ECONNRESET) || errors.Is(a.err, unix.EPIPE)):
		return "the backend has closed the connection without an answer; " + hostdir.Expects(a.proxy) + ", and TLS: its own log may say more"
	case len(a.first) > 0 && a.first[0] != 0x15 && a.first[0] != 0x16: // an alert, or a handshake message
		return "the backend answers a ClientHello with something other than TLS: let it speak TLS on tls-socket"
	}
	return "no handshake can be made: " + clean(a.err.Error())
}

// isAlert reports whether an error is an alert that the backend sent.
func isAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// namesOf returns some of the names in a certificate.
func namesOf(c *x509.Certificate) string {
	var names []string
	for _, n := range c.DNSNames {
		names = append(names, clean(n))
	}
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	switch n := len(names); {
	case n == 0:
		return "no name (a common name does not count)"
	case n > namesMost:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:namesMost], ", "), n-namesMost)
	}
	return strings.Join(names, ", ")
}

// clean returns what a backend may have had a say in, so that it can be printed.
func clean(text string) string {
	if len(text) > wordsMost {
		text = text[:wordsMost] + "…"
	}
	if shown := show(text); strings.Contains(shown, `\`) {
		return shown
	}
	return text
}

// A conn is a connection to a backend. What is written first has the PROXY header in front; if the
// backend is handed its connections, it is what the connection is handed over with.
type conn struct {
	net.Conn
	header []byte
	first  []byte // the first bytes that were read

	deadline time.Time
	datagram int      // the socket to hand the connection over with, -1 if there is none
	handed   *os.File // the backend's end
}

// newConn makes a connection of what connects to a backend, which it closes in the end.
func newConn(b hostdir.Backend, proxy uint8, name string, deadline time.Time) (*conn, error) {
	c := &conn{datagram: -1, deadline: deadline}
	client, listener := netip.MustParseAddrPort("127.0.0.1:50443"), netip.MustParseAddrPort("127.0.0.1:443")
	var err error
	if b.Datagram {
		c.datagram = b.FD
		if c.Conn, c.handed, err = pair(deadline); err == nil {
			client, listener = addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())
		}
	} else {
		f := os.NewFile(uintptr(b.FD), "tls-socket")
		c.Conn, err = net.FileConn(f)
		f.Close()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	switch proxy {
	case 1:
		c.header = proxyproto.AppendV1(nil, client, listener)
	case 2:
		c.header = proxyproto.AppendV2(nil, client, listener, []byte(name))
	}
	c.SetDeadline(deadline)
	return c, nil
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// pair returns the ends of a TCP connection: ours, and the one that a backend is handed. That is as
// accept(2) returns it.
func pair(deadline time.Time) (net.Conn, *os.File, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // a backend expects plain TCP
	listener, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	l := listener.(*net.TCPListener)
	l.SetDeadline(deadline)
	dialer := net.Dialer{Deadline: deadline}
	dialer.SetMultipathTCP(false)
	ours, err := dialer.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			ours.Close()
			return nil, nil, err
		}
		if c.RemoteAddr().String() != ours.LocalAddr().String() { // somebody else on this machine
			c.Close()
			continue
		}
		f, err := c.File()
		c.Close()
		if err == nil {
			err = unix.SetNonblock(int(f.Fd()), false)
		}
		if err != nil {
			ours.Close()
			return nil, nil, err
		}
		return ours, f, nil
	}
}

func (c *conn) Close() error {
	if c.datagram >= 0 {
		unix.Close(c.datagram)
		c.datagram = -1
	}
	if c.handed != nil {
		c.handed.Close()
	}
	if c.Conn == nil {
		return nil
	}
	return c.Conn.Close()
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.first = append(c.first, b[:min(n, len("HTTP/")-min(len(c.first), len("HTTP/")))]...)
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	if c.handed != nil {
		if err := c.handOver(append(c.header, b...)); err != nil {
			return 0, err
		}
		return len(b), nil
	}
	n, err := c.Conn.Write(append(c.header, b...))
	n = max(n-len(c.header), 0)
	c.header = nil
	return n, err
}

// handOver hands the connection to the backend, with the bytes that come first.
func (c *conn) handOver(first []byte) error {
	defer func() {
		c.handed.Close()
		c.handed = nil
	}()
	rights := unix.UnixRights(int(c.handed.Fd()))
	_, err := redial(func() (hostdir.Backend, error) {
		err := unix.Sendmsg(c.datagram, first, rights, nil, 0)
		if err == unix.EAGAIN || err == unix.ENOBUFS || err == unix.ETOOMANYREFS {
			err = hostdir.BacklogFull
		}
		return hostdir.Backend{}, err
	}, time.Until(c.deadline))
	return err
}
