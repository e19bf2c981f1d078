package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: a client that names a host that is no NAME gets unrecognized_name, whatever it offers, also
// with a session of another name; a wildcard NAME covers what its certificate does; letters may be
// of either case.
func TestNames(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example", "*.two.example")
	for _, link := range []string{"www.one.example", "a.two.example", "a.b.two.example", "two.example", "*"} {
		hostdirtest.Must(t, os.Symlink(hostdirtest.Entry("one.example"), filepath.Join(s.hosts, hostdirtest.Entry(link))))
	}
	s.serve(t, "one.example", "tcp://"+echo(t), "one.example", "*.two.example")
	cache := tls.NewLRUClientSessionCache(1)
	for _, test := range []struct {
		name   string
		served bool
	}{
		{"one.example", true},
		{"ONE.example", true},
		{"www.one.example", false},
		{"a.two.example", true},
		{"a.b.two.example", false},
		{"two.example", false},
		{"", true},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			for _, alpn := range [][]string{nil, {"x"}, {"x", "y"}} {
				config := s.config(test.name)
				config.MaxVersion, config.NextProtos = version, alpn
				if test.name == "" {
					config.InsecureSkipVerify = true
				}
				c, err := s.try(config)
				if c != nil {
					c.Close()
				}
				if served := err == nil; served != test.served || !served && !isAlert(err, "unrecognized name") {
					t.Errorf("%q with %s, %q: %v", test.name, tls.VersionName(version), alpn, err)
				}
			}
		}
	}
	config := s.config("one.example")
	config.ClientSessionCache = cache
	c := s.dial(t, config)
	if _, err := talk(c, "x"); err != nil { // the ticket has come
		t.Error(err)
	}
	config = config.Clone()
	config.ServerName = "www.one.example"
	config.ClientSessionCache = &oneSession{cache: cache, key: "one.example"}
	if _, err := s.try(config); !isAlert(err, "unrecognized name") {
		t.Errorf("with a session of another name: %v", err)
	}
}

// A oneSession returns the same session for every host.
type oneSession struct {
	cache tls.ClientSessionCache
	key   string
}

func (o *oneSession) Get(string) (*tls.ClientSessionState, bool) { return o.cache.Get(o.key) }

func (o *oneSession) Put(string, *tls.ClientSessionState) {}

// Goal: with plain bytes the client's protocol is taken if it offers one; sessions are resumed, by
// TLS 1.2 and 1.3; older versions are refused.
func TestProtocols(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "tcp://"+echo(t))
	for want, offered := range map[string][]string{
		"postgresql": {"postgresql"}, "h2": {"h2"}, "": nil, " ": {"a", "b"}, "  ": {"acme-tls/1", "b"},
	} {
		config := s.config("one.example")
		config.NextProtos = offered
		c := s.dial(t, config)
		if got := c.ConnectionState().NegotiatedProtocol; got != strings.TrimSpace(want) {
			t.Errorf("%q: %q", offered, got)
		}
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := s.config("one.example")
		config.MaxVersion, config.ClientSessionCache = version, tls.NewLRUClientSessionCache(1)
		for i := range 4 {
			if i > 1 {
				config.NextProtos = []string{"postgresql"}
			}
			c := s.dial(t, config)
			if got, err := talk(c, "x"); got != "x" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
			if c.ConnectionState().DidResume != (i > 0) {
				t.Errorf("%s, connection %d: resumed %v", tls.VersionName(version), i, i == 0)
			}
		}
	}
	config := s.config("one.example")
	config.MinVersion, config.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	if _, err := s.try(config); !isAlert(err, "protocol version not supported") {
		t.Errorf("TLS 1.1: %v", err)
	}
	// OpenSSL's client, as PostgreSQL's connects.
	cmd := exec.Command(hostdirtest.Need(t, "openssl"), "s_client", "-connect", s.addr, "-servername", "one.example", "-alpn", "postgresql", "-CAfile", s.caPEM, "-verify_return_error")
	cmd.Stdin = strings.NewReader("bytes\n")
	if got := output(t, cmd); !strings.Contains(got, "ALPN protocol: postgresql") {
		t.Errorf("%q", got)
	}
}

// Goal: with client-ca.pem only clients with a certificate from there are served; a new
// client-ca.pem counts within moments, also for those who have a session; a broken or missing one
// changes nothing.
func TestClientCA(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	file := filepath.Join(s.dir(t, "one.example"), clientCAFile)
	put(t, file, s.ca.pem())
	p := s.serve(t, "one.example", "tcp://"+echo(t))
	other := newAuthority(t)
	cache := tls.NewLRUClientSessionCache(1)
	// serves reports whether a client is served that has a certificate from there.
	serves := func(from *authority) bool {
		config := s.config("one.example")
		if from != nil {
			cert, key := from.issue(t, time.Hour, "alice")
			pair, err := tls.X509KeyPair(cert, key)
			hostdirtest.Must(t, err)
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
			if from == s.ca {
				config.ClientSessionCache = cache
			}
		}
		c, err := s.try(config)
		if err != nil {
			return false
		}
		defer c.Close()
		got, err := talk(c, "x")
		return err == nil && got == "x"
	}
	for range 2 { // the second time with a session
		if !serves(s.ca) || serves(nil) || serves(other) {
			t.Error("the wrong clients are served")
		}
	}
	put(t, file, []byte("broken"))
	p.lines.Await(t, "client-ca.pem is no good: there is no certificate in PEM in it; what was in use stays in use")
	hostdirtest.Must(t, os.Remove(file))
	p.lines.Await(t, "client-ca.pem is gone")
	if !serves(s.ca) || serves(nil) || serves(other) {
		t.Error("the wrong clients are served without a good file")
	}
	put(t, file, other.pem())
	hostdirtest.Await(t, "the new client-ca.pem", func() bool { return serves(other) })
	if serves(s.ca) || serves(nil) {
		t.Error("the wrong clients are served with the new file")
	}
}

// Goal: a certificate that is replaced, in files or behind symlinks such as those of certbot and
// lego, is used within moments, without a restart; half of it, a wrong key or nothing is reported
// once, and the one before stays in use.
func TestReload(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	dir, live := s.dir(t, "one.example"), hostdirtest.Dir(t)
	// certbot: live/NAME/fullchain.pem is a symlink to ../../archive/NAME/fullchainN.pem.
	hostdirtest.Must(t, os.MkdirAll(filepath.Join(live, "archive"), 0o755))
	hostdirtest.Must(t, os.MkdirAll(filepath.Join(live, "live"), 0o755))
	issue := func(n int) {
		cert, key := s.ca.issue(t, time.Hour, "one.example", fmt.Sprintf("n%d.example", n))
		for file, text := range map[string][]byte{"fullchain": cert, "privkey": key} {
			archived := fmt.Sprintf("../archive/%s%d.pem", file, n)
			put(t, filepath.Join(live, "live", archived), text)
			link := filepath.Join(live, "live", file+".pem")
			os.Remove(link)
			hostdirtest.Must(t, os.Symlink(archived, link))
		}
	}
	issue(1)
	hostdirtest.Must(t, os.Symlink(filepath.Join(live, "live/fullchain.pem"), filepath.Join(dir, certFile)))
	hostdirtest.Must(t, os.Symlink(filepath.Join(live, "live/privkey.pem"), filepath.Join(dir, keyFile)))
	p := s.serve(t, "one.example", "tcp://"+echo(t))
	serving := func(n int) bool {
		c := s.dial(t, s.config("one.example"))
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].DNSNames[1] == fmt.Sprintf("n%d.example", n)
	}
	if !serving(1) {
		t.Error("not the certificate of the files")
	}
	issue(2)
	hostdirtest.Await(t, "the new certificate", func() bool { return serving(2) })

	cert, key := s.ca.issue(t, time.Hour, "one.example", "n3.example")
	for _, test := range []struct {
		cert, key []byte
		line      string
	}{
		{cert, []byte("broken"), "cert.pem and key.pem are no good: failed to find any PEM data in key input; what was in use stays in use"},
		{cert[:100], key, "cert.pem and key.pem are no good: failed to find any PEM data in certificate input; "},
		{cert, nil, "there is no key.pem: cert.pem and key.pem must both be there, or neither; "},
		{nil, nil, "cert.pem and key.pem are gone; "},
	} {
		for file, text := range map[string][]byte{certFile: test.cert, keyFile: test.key} {
			if text == nil {
				os.Remove(filepath.Join(dir, file))
			} else {
				put(t, filepath.Join(dir, file), text)
			}
		}
		p.lines.Await(t, test.line)
		if !serving(2) {
			t.Errorf("another certificate: %s", test.line)
		}
	}
	hostdirtest.Must(t, os.Symlink("/nowhere", filepath.Join(dir, certFile)))
	p.lines.Await(t, "cannot read cert.pem: the symlink leads nowhere; ")
	// Until this is said the files have been read twice.
	put(t, filepath.Join(dir, clientCAFile), []byte("broken"))
	p.lines.Await(t, "client-ca.pem is no good")
	if n := strings.Count(p.lines.String(), "cannot read cert.pem: the symlink leads nowhere"); n != 1 {
		t.Errorf("it was said %d times:\n%s", n, &p.lines)
	}
	put(t, filepath.Join(dir, certFile), cert)
	put(t, filepath.Join(dir, keyFile), key)
	hostdirtest.Await(t, "the good certificate", func() bool { return serving(3) })
}

// Goal: a certificate that does not cover a NAME, or has expired, has a line, and is served.
func TestUnfitting(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "other.example")
	p := s.serve(t, "one.example", "tcp://"+echo(t))
	p.lines.Await(t, "the certificate in cert.pem does not cover one.example, only other.example")
	cert, key := s.ca.issue(t, -time.Minute, "one.example")
	s.dir(t, "two.example")
	put(t, filepath.Join(s.dir(t, "two.example"), certFile), cert)
	put(t, filepath.Join(s.dir(t, "two.example"), keyFile), key)
	p = s.serve(t, "two.example", "tcp://"+echo(t))
	p.lines.Await(t, "the certificate in cert.pem has expired on ")
	for _, host := range []string{"one.example", "two.example"} {
		config := s.config(host)
		config.InsecureSkipVerify = true
		s.dial(t, config)
	}
}

// Goal: a client has ten seconds for the handshake, with bytes as with requests.
func TestHandshakeTimeout(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.install(t, "two.example", "two.example")
	s.serve(t, "one.example", "tcp://"+echo(t))
	s.serve(t, "two.example", handler(t, func(http.ResponseWriter, *http.Request) {}))
	for _, host := range []string{"one.example", "two.example"} {
		t.Run(host, func(t *testing.T) {
			t.Parallel()
			// The client sends its hello, and nothing more.
			here, there := net.Pipe()
			go tls.Client(there, s.config(host)).Handshake()
			hello := make([]byte, 16<<10)
			n, err := here.Read(hello)
			hostdirtest.Must(t, err)
			here.Close()
			c, err := net.Dial("tcp", s.addr)
			hostdirtest.Must(t, err)
			defer c.Close()
			begin := time.Now()
			c.Write(hello[:n])
			c.SetDeadline(begin.Add(hostdirtest.Patience))
			io.Copy(io.Discard, c)
			if took := time.Since(begin); took < 9*time.Second || took > 25*time.Second {
				t.Errorf("it ended after %v", took)
			}
		})
	}
}
