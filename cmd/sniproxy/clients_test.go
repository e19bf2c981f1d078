package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: the clients in use reach the site that they ask for, and negotiate end to end with it. They
// tell their user when the name is unknown.
func TestClients(t *testing.T) {
	t.Parallel()
	d := start(t)
	ca := newAuthority(t)
	for _, host := range []string{"site.example", "localhost"} {
		d.serveHTTPS(host, &tls.Config{Certificates: []tls.Certificate{ca.issue(t, host)}})
	}
	_, port, _ := net.SplitHostPort(d.addr)

	upload := make([]byte, 4<<20)
	rand.Read(upload)
	uploadFile := writeFile(t, "upload", upload)
	body := fmt.Sprintf("body=%x", sha256.Sum256(upload))

	curl := func(args ...string) func(string) []string {
		return func(host string) []string {
			return append([]string{"-q", "-sS", "--noproxy", "*", "--cacert", ca.file,
				"--resolve", host + ":" + port + ":127.0.0.1", "https://" + host + ":" + port + "/"}, args...)
		}
	}
	openssl := func(args ...string) func(string) []string {
		return func(host string) []string { return append(sClient(d, ca, host), args...) }
	}
	gnutls := func(host string) []string {
		return []string{"--x509cafile", ca.file, "--sni-hostname", host, "--verify-hostname", host, "--port", port, "127.0.0.1"}
	}
	python := func(host string) []string { return []string{"-c", pythonClient, host, port, ca.file} }
	// wget has no way to be told an address.
	wget := func(string) []string {
		return []string{"--no-config", "--no-proxy", "-4", "-nv", "--tries=1", "-O-", "--ca-certificate", ca.file, "https://localhost:" + port + "/"}
	}

	for _, tt := range []struct {
		program string
		name    string
		args    func(host string) []string
		want    []string // in what the program prints
		refused string   // what it prints for an unknown name
	}{
		{"curl", ", HTTP/1.1", curl("--http1.1"), []string{"proto=HTTP/1.1 host=site.example"}, "unrecognized name"},
		{"curl", ", HTTP/2", curl("--http2"), []string{"proto=HTTP/2.0 host=site.example"}, "unrecognized name"},
		{"curl", ", HTTP/1.1 upload", curl("--http1.1", "--data-binary", "@"+uploadFile), []string{"proto=HTTP/1.1", body}, "unrecognized name"},
		{"curl", ", HTTP/2 upload", curl("--http2", "--data-binary", "@"+uploadFile), []string{"proto=HTTP/2.0", body}, "unrecognized name"},
		{"openssl", ", TLS 1.2", openssl("-tls1_2"), []string{"host=site.example tls=TLS 1.2", "New, TLSv1.2"}, "alert number 112"},
		{"openssl", ", TLS 1.3", openssl("-tls1_3"), []string{"host=site.example tls=TLS 1.3", "New, TLSv1.3"}, "alert number 112"},
		{"gnutls-cli", "", gnutls, []string{"host=site.example", "The certificate is trusted"}, "Received alert [112]"},
		{"python3", "", python, []string{"host=site.example"}, "UNRECOGNIZED_NAME"},
		{"wget", "", wget, []string{"host=localhost"}, ""},
	} {
		t.Run(tt.program+tt.name, func(t *testing.T) {
			t.Parallel()
			out, status := execute(t, tt.program, tt.args("site.example")...)
			for _, want := range tt.want {
				if status != 0 || !strings.Contains(out, want) {
					t.Errorf("exit status %d, want 0 and %q", status, want)
				}
			}
			if tt.refused == "" {
				return
			}
			out, status = execute(t, tt.program, tt.args("unknown.example")...)
			if status == 0 || !strings.Contains(out, tt.refused) {
				t.Errorf("unknown name: exit status %d, want another than 0 and %q", status, tt.refused)
			}
		})
	}
}

const pythonClient = `
import socket, ssl, sys
host, port, ca = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
with socket.create_connection(("127.0.0.1", port)) as s, context.wrap_socket(s, server_hostname=host) as t:
    t.sendall(b"GET / HTTP/1.0\r\n\r\n")
    while b := t.recv(4096):
        print(b.decode())
`

// Goal: a client resumes its session with the backend.
func TestResumption(t *testing.T) {
	t.Parallel()
	d := start(t)
	ca := newAuthority(t)
	d.serveHTTPS("site.example", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, "site.example")}})
	for _, tt := range []struct{ option, version string }{
		{"-tls1_2", "TLSv1.2"},
		{"-tls1_3", "TLSv1.3"},
	} {
		t.Run(tt.version, func(t *testing.T) {
			t.Parallel()
			args := append(sClient(d, ca, "site.example"), tt.option)
			session := filepath.Join(t.TempDir(), "session")
			out, _ := execute(t, "openssl", append(args, "-sess_out", session)...)
			if !strings.Contains(out, "New, "+tt.version) || !strings.Contains(out, "resumed=false") {
				t.Fatal("there is no new session")
			}
			out, _ = execute(t, "openssl", append(args, "-sess_in", session)...)
			if !strings.Contains(out, "Reused, "+tt.version) || !strings.Contains(out, "resumed=true") {
				t.Error("the session was not resumed")
			}
		})
	}
}

// Goal: early data, which the client sends right behind its hello, reaches the backend and is
// accepted.
func TestEarlyData(t *testing.T) {
	t.Parallel()
	d := start(t)
	ca := newAuthority(t)
	socket := d.hostPath("site.example", "tls-socket")
	file := pemFile(t, ca.issue(t, "site.example"))
	// openssl refuses a path of more than 31 bytes.
	server := startBackend(t, socket, "openssl", "s_server", "-unix", "tls-socket", "-cert", file, "-key", file, "-tls1_3", "-early_data")

	args := append(sClient(d, ca, "site.example"), "-tls1_3")
	session := filepath.Join(t.TempDir(), "session")
	first := spawn(t, "", "openssl", append(args, "-sess_out", session)...)
	hostdirtest.Await(t, "a session ticket", func() bool {
		b, _ := os.ReadFile(session)
		return bytes.Contains(b, []byte("END SSL SESSION"))
	})
	first.end(t)

	var early strings.Builder
	for i := range 800 { // openssl handles 8 KiB at a time
		fmt.Fprintf(&early, "line %d\n", i)
	}
	second := spawn(t, "", "openssl", append(args, "-sess_in", session, "-early_data", writeFile(t, "early", []byte(early.String())))...)
	second.out.Await(t, "Early data was accepted")
	second.end(t)
	server.out.Await(t, "End of early data")
	if !strings.Contains(server.out.String(), early.String()) {
		t.Error("the backend did not get all of the early data")
	}
}

// Goal: a client shows its certificate to a backend that requires one. Without it the backend
// refuses the client.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	d := start(t)
	ca := newAuthority(t)
	d.serveHTTPS("site.example", &tls.Config{
		Certificates: []tls.Certificate{ca.issue(t, "site.example")},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca.pool,
	})
	args := sClient(d, ca, "site.example")
	file := pemFile(t, ca.issue(t, "alice.example"))
	out, _ := execute(t, "openssl", append(args, "-cert", file, "-key", file)...)
	if !strings.Contains(out, "client=alice.example") {
		t.Error("the backend did not get the certificate")
	}
	// It says nothing after the handshake: the backend would leave that unread, and end with
	// a reset, which may overtake the alert.
	p := spawn(t, "", "openssl", args...)
	if status := p.wait(t); status == 0 || !strings.Contains(p.out.String(), "alert number 116") {
		t.Errorf("without a certificate: exit status %d, want another than 0 and alert 116, certificate_required", status)
	}
}

// Goal: real handshakes and what follows them go through however the client cuts its bytes: with a
// post-quantum key share, with the protocol of ACME's tls-alpn-01, and with a hello in several
// records.
func TestGoClient(t *testing.T) {
	t.Parallel()
	const acmeProto = "acme-tls/1"
	// RFC 8737, Section 3: the certificate for a challenge has this extension, critical.
	acmeIdentifier := pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 31}, Critical: true,
		Value: append([]byte{4, sha256.Size}, make([]byte, sha256.Size)...)}

	d := start(t)
	ca := newAuthority(t)
	site, challenge := ca.issue(t, "site.example"), ca.issue(t, "site.example", acmeIdentifier)
	config := &tls.Config{
		NextProtos: []string{acmeProto, "echo"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if slices.Contains(hello.SupportedProtos, acmeProto) {
				return &challenge, nil
			}
			return &site, nil
		},
	}
	d.serve("site.example", func(c *net.UnixConn) {
		s := tls.Server(c, config)
		io.Copy(s, s)
		s.Close()
	})

	var protos []string
	for i := range 100 {
		protos = append(protos, fmt.Sprintf("%0250d", i))
	}
	for _, tt := range []struct {
		name   string
		config *tls.Config
		check  func(tls.ConnectionState) bool
	}{
		{"X25519MLKEM768", &tls.Config{RootCAs: ca.pool, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}},
			func(s tls.ConnectionState) bool { return s.CurveID == tls.X25519MLKEM768 }},
		// The extension is critical, and known to none but an ACME server.
		{acmeProto, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{acmeProto}},
			func(s tls.ConnectionState) bool {
				return s.NegotiatedProtocol == acmeProto && slices.ContainsFunc(s.PeerCertificates[0].Extensions,
					func(e pkix.Extension) bool { return e.Id.Equal(acmeIdentifier.Id) })
			}},
		{"25 kB", &tls.Config{RootCAs: ca.pool, NextProtos: append(protos, "echo")},
			func(s tls.ConnectionState) bool { return s.NegotiatedProtocol == "echo" }},
	} {
		for _, size := range []int{1, 7, 1 << 20} {
			t.Run(fmt.Sprintf("%s in pieces of %d", tt.name, size), func(t *testing.T) {
				t.Parallel()
				c, err := d.tryDial()
				if err != nil {
					t.Fatal(err)
				}
				c.SetDeadline(time.Now().Add(hostdirtest.Patience))
				config := tt.config.Clone()
				config.ServerName = "site.example"
				client := tls.Client(pieces{c, size}, config)
				sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<10)
				if _, err := client.Write(sent); err != nil {
					t.Fatal(err)
				}
				client.CloseWrite()
				if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d bytes came back, error %v, want the %d that were sent", len(got), err, len(sent))
				}
				if s := client.ConnectionState(); !tt.check(s) {
					t.Errorf("curve %v, protocol %q, certificate %v", s.CurveID, s.NegotiatedProtocol, s.PeerCertificates[0].Subject)
				}
			})
		}
	}
}

// pieces is a connection that writes at most size bytes at a time.
type pieces struct {
	net.Conn
	size int
}

func (p pieces) Write(b []byte) (n int, err error) {
	for piece := range slices.Chunk(b, p.size) {
		m, err := p.Conn.Write(piece)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// serveHTTPS makes a host whose pages tell a client what the server knows of it.
func (d *daemon) serveHTTPS(name string, config *tls.Config) {
	d.t.Helper()
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body := sha256.New()
			io.Copy(body, r.Body)
			client := ""
			if len(r.TLS.PeerCertificates) > 0 {
				client = r.TLS.PeerCertificates[0].Subject.CommonName
			}
			fmt.Fprintf(w, "proto=%s host=%s tls=%s resumed=%t client=%s body=%x\n", r.Proto, r.TLS.ServerName,
				tls.VersionName(r.TLS.Version), r.TLS.DidResume, client, body.Sum(nil))
		}),
		TLSConfig: config,
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	l := d.host(name)
	go server.ServeTLS(l, "", "")
	d.t.Cleanup(func() { server.Close() })
}

// sClient returns the arguments with which openssl asks for a host.
func sClient(d *daemon, ca *authority, host string) []string {
	return slices.Clip([]string{"s_client", "-connect", d.addr, "-servername", host,
		"-CAfile", ca.file, "-verify_hostname", host, "-verify_return_error"})
}

// A program is a client or a backend that runs.
type program struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	out    hostdirtest.Lines // its standard output and error
	exited chan struct{}     // closed when it has ended
}

// spawn starts a program in a directory. It is killed at the end of the test, if it still
// runs; what it printed is logged if the test fails.
func spawn(t testing.TB, dir, name string, args ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(hostdirtest.Need(t, name), args...), exited: make(chan struct{})}
	p.cmd.Dir = dir
	p.cmd.WaitDelay = time.Second // a process that it has started may outlive it, and hold its output
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	hostdirtest.Must(t, p.cmd.Start())
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("%s printed:\n%s", name, &p.out)
		}
	})
	return p
}

// wait waits for the end of the program and returns its exit status.
func (p *program) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(hostdirtest.Patience):
		t.Fatalf("%s does not end", p.cmd.Args)
	}
	return p.cmd.ProcessState.ExitCode()
}

// end ends the program's input, and waits for it to end.
func (p *program) end(t testing.TB) {
	t.Helper()
	p.stdin.Close()
	p.wait(t)
}

// execute runs a client, which may take an HTTP request from standard input, until the backend
// closes. It returns what the client prints, and its exit status.
func execute(t testing.TB, name string, args ...string) (out string, status int) {
	t.Helper()
	p := spawn(t, "", name, args...)
	io.WriteString(p.stdin, "GET / HTTP/1.0\r\n\r\n")
	status = p.wait(t)
	return p.out.String(), status
}

// startBackend starts a server program in the directory of its socket, and waits until it accepts
// connections there.
func startBackend(t testing.TB, socket, name string, args ...string) *program {
	t.Helper()
	p := spawn(t, filepath.Dir(socket), name, args...)
	hostdirtest.Await(t, name+" to listen", func() bool {
		select {
		case <-p.exited:
			t.Fatalf("%s has ended", name)
		default:
		}
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p
}

// An authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	file string // its certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	ca := &authority{pool: x509.NewCertPool()}
	ca.cert = &x509.Certificate{
		Subject:               pkix.Name{CommonName: "sniproxy test authority"},
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	cert := ca.sign(t, ca.cert)
	ca.cert, ca.key = cert.Leaf, cert.PrivateKey.(*ecdsa.PrivateKey)
	ca.pool.AddCert(ca.cert)
	ca.file = pemFile(t, cert)
	return ca
}

// issue returns a certificate for a server or a client.
func (ca *authority) issue(t testing.TB, name string, extensions ...pkix.Extension) tls.Certificate {
	t.Helper()
	return ca.sign(t, &x509.Certificate{
		Subject:         pkix.Name{CommonName: name},
		DNSNames:        []string{name},
		KeyUsage:        x509.KeyUsageDigitalSignature,
		ExtKeyUsage:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		ExtraExtensions: extensions,
	})
}

// sign makes a key, and signs a certificate for it: with that key itself for the authority.
func (ca *authority) sign(t testing.TB, template *x509.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := ca.key
	if signer == nil {
		signer = key
	}
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// pemFile returns a file with a certificate and its key.
func pemFile(t testing.TB, cert tls.Certificate) string {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "cert.pem", slices.Concat(
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
}

// writeFile returns a new file.
func writeFile(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	hostdirtest.Must(t, os.WriteFile(path, content, 0o644))
	return path
}
