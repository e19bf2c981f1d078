package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// With this in its environment the test binary is sniproxy-tls. The value shortens its pauses.
const runMain = "SNIPROXY_TLS_RUN_MAIN"

// programs is a directory for what the tests build.
var programs string

func TestMain(m *testing.M) {
	if pause := os.Getenv(runMain); pause != "" {
		d, err := time.ParseDuration(pause)
		if err != nil {
			panic(err)
		}
		rereadEvery, pauseFirst, pauseMost = d, d, 4*d
		main()
	}
	if service := os.Getenv(runPlain); service != "" {
		plain(service)
	}
	os.Exit(func() int {
		var err error
		if programs, err = os.MkdirTemp("", "snitls"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(programs)
		// The tests wait more than they work.
		flag.Parse()
		if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
			f.Value.Set("8")
		}
		return m.Run()
	}())
}

var build sync.Mutex

// program builds a program of this module, if no test has done so before, and returns its path.
func program(t testing.TB, name string) string {
	t.Helper()
	build.Lock()
	defer build.Unlock()
	path := filepath.Join(programs, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	return hostdirtest.Program(t, programs, name)
}

// A process is a program that runs until the end of the test.
type process struct {
	*exec.Cmd
	lines  hostdirtest.Lines
	exited chan struct{}
}

// launch starts a program. At the end of the test it is killed.
func launch(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.lines, &p.lines
	hostdirtest.Must(t, cmd.Start())
	go func() {
		cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("%s printed:\n%s", filepath.Base(cmd.Path), &p.lines)
		}
	})
	return p
}

// stop sends a signal, and waits for the exit status.
func (p *process) stop(t testing.TB, sig os.Signal) int {
	t.Helper()
	hostdirtest.Must(t, p.Process.Signal(sig))
	return p.wait(t)
}

func (p *process) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.exited:
		return p.ProcessState.ExitCode()
	case <-time.After(hostdirtest.Patience):
		t.Fatalf("%s does not end", p.Path)
		return -1
	}
}

// A site is a hosts directory with a sniproxy in front, and a certificate authority.
type site struct {
	hosts string
	addr  string // of the proxy
	ca    *authority
	caPEM string // path
	proxy *process
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{hosts: hostdirtest.Dir(t), ca: newAuthority(t)}
	s.caPEM = filepath.Join(hostdirtest.Dir(t), "ca.pem")
	hostdirtest.Must(t, os.WriteFile(s.caPEM, s.ca.pem(), 0o644))
	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	s.addr = l.Addr().String()
	stdin, err := l.File()
	hostdirtest.Must(t, err)
	l.Close()
	cmd := exec.Command(program(t, "sniproxy"))
	cmd.Dir, cmd.Stdin = s.hosts, stdin
	s.proxy = launch(t, cmd)
	stdin.Close()
	s.proxy.lines.Await(t, "listening on ")
	return s
}

// dir makes the directory of a host.
func (s *site) dir(t testing.TB, name string) string {
	t.Helper()
	dir := filepath.Join(s.hosts, hostdirtest.Entry(name))
	hostdirtest.Must(t, os.MkdirAll(dir, 0o755))
	return dir
}

// install gives a host a certificate for these names.
func (s *site) install(t testing.TB, host string, names ...string) {
	t.Helper()
	cert, key := s.ca.issue(t, time.Hour, names...)
	put(t, filepath.Join(s.dir(t, host), certFile), cert)
	put(t, filepath.Join(s.dir(t, host), keyFile), key)
}

// put replaces a file.
func put(t testing.TB, path string, text []byte) {
	t.Helper()
	hostdirtest.Must(t, os.WriteFile(path+".new", text, 0o600))
	hostdirtest.Must(t, os.Rename(path+".new", path))
}

// command returns sniproxy-tls in the directory of a host.
func (s *site) command(t testing.TB, host string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := hostdirtest.Command(t, runMain+"=100ms", args...)
	cmd.Dir = s.dir(t, host)
	cmd.Env = append(cmd.Env, "PWD="+cmd.Dir)
	return cmd
}

// serve serves a host by sniproxy-tls. The names are needed in a hashed build.
func (s *site) serve(t testing.TB, host, backend string, names ...string) *process {
	t.Helper()
	if hostdir.Hashed && len(names) == 0 {
		names = []string{host}
	}
	p := launch(t, s.command(t, host, append([]string{backend}, names...)...))
	p.lines.Await(t, "serving ")
	return p
}

// config is that of a client.
func (s *site) config(host string) *tls.Config {
	return &tls.Config{ServerName: host, RootCAs: s.ca.pool()}
}

// dial connects to a host.
func (s *site) dial(t testing.TB, config *tls.Config) *tls.Conn {
	t.Helper()
	c, err := s.try(config)
	hostdirtest.Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func (s *site) try(config *tls.Config) (*tls.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: hostdirtest.Patience}, Config: config}
	c, err := d.Dial("tcp", s.addr)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	return c.(*tls.Conn), nil
}

// isAlert reports whether an error is that the other side has sent this alert.
func isAlert(err error, alert string) bool {
	return err != nil && strings.HasSuffix(err.Error(), "remote error: tls: "+alert)
}

// client is an HTTP client of the site, with HTTP/2 or without.
func (s *site) client(t testing.TB, http2 bool) *http.Client {
	t.Helper()
	tr := &http.Transport{
		TLSClientConfig:    s.config(""),
		ForceAttemptHTTP2:  http2,
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
		},
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: hostdirtest.Patience}
}

// curl returns a curl that reaches a host.
func (s *site) curl(t testing.TB, host string, args ...string) *exec.Cmd {
	t.Helper()
	port := s.addr[strings.LastIndex(s.addr, ":")+1:]
	return exec.Command(hostdirtest.Need(t, "curl"), append([]string{
		"-sS", "--max-time", "30", "--noproxy", "*", "--cacert", s.caPEM, "--connect-to", host + ":443:127.0.0.1:" + port,
	}, args...)...)
}

// output runs a program and returns what it prints.
func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	stdout, stderr, status := hostdirtest.Run(t, cmd)
	if status != 0 {
		t.Fatalf("%q: exit status %d: %s%s", cmd.Args, status, stdout, stderr)
	}
	return stdout
}

// An authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	hostdirtest.Must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	hostdirtest.Must(t, err)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	return key
}

func serial() *big.Int {
	b := make([]byte, 8)
	rand.Read(b)
	return new(big.Int).SetBytes(b)
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// issue issues a certificate that ends after some time. The first name is the common name too.
func (a *authority) issue(t testing.TB, lifetime time.Duration, names ...string) (cert, key []byte) {
	t.Helper()
	k := newKey(t)
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(names[0]); ip != nil {
		template.DNSNames, template.IPAddresses = nil, []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, k.Public(), a.key)
	hostdirtest.Must(t, err)
	key, err = encodeKey(k)
	hostdirtest.Must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key
}

// echo starts a service that sends back what it gets, and ends when its client has. It returns its
// address.
func echo(t testing.TB) string {
	t.Helper()
	return listen(t, func(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) })
}

// listen starts a service that handles its connections and closes them. It returns its address.
func listen(t testing.TB, handle func(net.Conn)) string {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	return l.Addr().String()
}

// talk sends a text, ends, and returns all that comes back.
func talk(c interface {
	io.ReadWriter
	CloseWrite() error
}, text string) (string, error) {
	if _, err := io.WriteString(c, text); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// freeAddr returns an address that nobody listens on.
func freeAddr(t testing.TB) string {
	t.Helper()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(hostdirtest.FreePort(t, "127.0.0.1")))
}

// awaitListener waits until somebody listens.
func awaitListener(t testing.TB, network, addr string) {
	t.Helper()
	hostdirtest.Await(t, "a listener on "+addr, func() bool {
		c, err := net.Dial(network, addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// portOf returns the port of an address.
func portOf(addr string) string { return addr[strings.LastIndex(addr, ":")+1:] }
