package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/acme"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: a real CA issues a certificate by the challenge http-01: on port 80 it is sent to HTTPS,
// and there the host's own server behind sniproxy, with whatever certificate it has, has the
// answer.
func TestACME(t *testing.T) {
	t.Parallel()
	const host = "one.example"
	// The CA follows the redirect to port 443 of what the name means, which is an address of the
	// loopback interface that nobody else uses.
	ip := net.IPv4(127, 80, 43, byte(1+os.Getpid()%250)).String()
	https, err := net.Listen("tcp4", net.JoinHostPort(ip, "443"))
	if err != nil {
		t.Skipf("port 443 of %s cannot be had: %v", ip, err)
	}
	https.Close()
	dir := t.TempDir()
	pebble := hostdirtest.Pebble(t, dir)

	// The proxy and its host, whose server has a certificate of its own.
	hosts := hostdirtest.Dir(t)
	sniproxy := exec.Command(hostdirtest.Program(t, dir, "sniproxy"))
	sniproxy.Dir = hosts
	startWith(t, sniproxy, hostdirtest.ListenTCP(t, "tcp4", net.JoinHostPort(ip, "443")))
	socket := hostdirtest.Listen(t, filepath.Join(hosts, hostdirtest.Entry(host)))
	var answer atomic.Value // the path of the challenge, and the answer
	var asked atomic.Int64
	answer.Store([2]string{})
	certificate, key := selfSigned(t, host)
	pair, err := tls.X509KeyPair(certificate, key)
	hostdirtest.Must(t, err)
	server := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if want := answer.Load().([2]string); r.URL.Path == want[0] && r.Host == host {
				asked.Add(1)
				io.WriteString(w, want[1])
				return
			}
			http.NotFound(w, r)
		}),
	}
	go server.ServeTLS(socket, "", "")
	t.Cleanup(func() { server.Close() })

	// The redirect, and the CA.
	l := hostdirtest.ListenTCP(t, "tcp4", net.JoinHostPort(ip, "0"))
	startOn(t, l)
	directory := startPebble(t, pebble, dir, l.Addr().(*net.TCPAddr).Port, hostdirtest.NameServer(t, ip))

	ctx, cancel := context.WithTimeout(context.Background(), 2*hostdirtest.Patience)
	defer cancel()
	accountKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	ca := x509.NewCertPool()
	pem, err := os.ReadFile(filepath.Join(dir, "cert.pem"))
	hostdirtest.Must(t, err)
	ca.AppendCertsFromPEM(pem)
	client := &acme.Client{
		Key:          accountKey,
		DirectoryURL: directory,
		HTTPClient:   &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca}}},
	}
	_, err = client.Register(ctx, &acme.Account{}, acme.AcceptTOS)
	hostdirtest.Must(t, err)
	order, err := client.AuthorizeOrder(ctx, acme.DomainIDs(host))
	hostdirtest.Must(t, err)
	for _, url := range order.AuthzURLs {
		authorization, err := client.GetAuthorization(ctx, url)
		hostdirtest.Must(t, err)
		i := slices.IndexFunc(authorization.Challenges, func(c *acme.Challenge) bool { return c.Type == "http-01" })
		challenge := authorization.Challenges[i]
		response, err := client.HTTP01ChallengeResponse(challenge.Token)
		hostdirtest.Must(t, err)
		answer.Store([2]string{client.HTTP01ChallengePath(challenge.Token), response})
		_, err = client.Accept(ctx, challenge)
		hostdirtest.Must(t, err)
		_, err = client.WaitAuthorization(ctx, url)
		hostdirtest.Must(t, err)
	}
	hostKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{host}}, hostKey)
	hostdirtest.Must(t, err)
	chain, _, err := client.CreateCertFromOrder(ctx, order, request, true)
	hostdirtest.Must(t, err)
	issued, err := x509.ParseCertificate(chain[0])
	hostdirtest.Must(t, err)
	if err := issued.VerifyHostname(host); err != nil {
		t.Error(err)
	}
	if asked.Load() == 0 {
		t.Error("the CA has not asked the host's own server")
	}
}

// startPebble starts the CA, which validates on a port, and asks a DNS server for addresses. It
// returns the URL of its directory once it answers. Its own certificate is cert.pem in dir.
func startPebble(t *testing.T, pebble, dir string, port int, dns string) string {
	t.Helper()
	certificate, key := selfSigned(t, "localhost")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	hostdirtest.Must(t, err)
	addr := l.Addr().String()
	l.Close()
	for name, b := range map[string][]byte{"cert.pem": certificate, "key.pem": key} {
		hostdirtest.Must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	cmd := hostdirtest.PebbleCommand(t, pebble, dir, dns, map[string]any{"listenAddress": addr, "httpPort": port})
	startWith(t, cmd, nil)
	_, ca, _ := net.SplitHostPort(addr)
	hostdirtest.Await(t, "the CA to listen", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return fmt.Sprintf("https://localhost:%s/dir", ca)
}

// startWith starts a program with a listening socket as its standard input, if that is not nil. It
// is killed at the end of the test.
func startWith(t *testing.T, cmd *exec.Cmd, l *net.TCPListener) {
	t.Helper()
	var out hostdirtest.Lines
	cmd.Stdout, cmd.Stderr = &out, &out
	if l != nil {
		f, err := l.File()
		hostdirtest.Must(t, err)
		defer f.Close()
		cmd.Stdin = f
	}
	hostdirtest.Must(t, cmd.Start())
	if l != nil {
		l.Close()
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s:\n%s", cmd, &out)
		}
	})
}

// selfSigned returns a certificate for a name, and its key, in PEM.
func selfSigned(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	hostdirtest.Must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	hostdirtest.Must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}
