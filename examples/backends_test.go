package examples_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// A backendSite is a hosts directory with one.example in it, sniproxy that serves it, and an
// application for the backends that pass requests on to one.
type backendSite struct {
	t           *testing.T
	dir         string // of one.example
	addr        string // of sniproxy
	application string // its address
	chain       string // the file with the certificate
	key         string // the file with its key
	both        string // the file with both
	pool        *x509.CertPool
}

func newBackendSite(t *testing.T) *backendSite {
	t.Helper()
	hosts := hostdirtest.Dir(t)
	s := &backendSite{t: t, dir: filepath.Join(hosts, hostdirtest.Entry("one.example")), addr: startProxy(t, hosts)}
	hostdirtest.Must(t, os.Mkdir(s.dir, 0o755))
	s.makeCertificate()
	application := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "This is %s for %s.\n", r.Host, r.Header.Get("X-Forwarded-For"))
	}))
	t.Cleanup(application.Close)
	s.application = application.Listener.Addr().String()
	return s
}

// startProxy starts a daemon for a hosts directory, and returns its address.
func startProxy(t *testing.T, hosts string) (addr string) {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	cmd := exec.Command(daemon(t))
	cmd.Dir, cmd.Stdin = hosts, socket
	start(t, cmd)
	return l.Addr().String()
}

// certificate returns a certificate for names, which signs itself.
func certificate(t *testing.T, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     names,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	hostdirtest.Must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// makeCertificate makes a certificate for one.example, which signs itself.
func (s *backendSite) makeCertificate() {
	s.t.Helper()
	made := certificate(s.t, "one.example")
	der := made.Certificate[0]
	cert, err := x509.ParseCertificate(der)
	hostdirtest.Must(s.t, err)
	s.pool = x509.NewCertPool()
	s.pool.AddCert(cert)
	secret, err := x509.MarshalPKCS8PrivateKey(made.PrivateKey)
	hostdirtest.Must(s.t, err)
	chainPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	dir := hostdirtest.Dir(s.t)
	s.chain, s.key, s.both = filepath.Join(dir, "chain"), filepath.Join(dir, "key"), filepath.Join(dir, "both")
	hostdirtest.Must(s.t, os.WriteFile(s.chain, chainPEM, 0o644))
	hostdirtest.Must(s.t, os.WriteFile(s.key, keyPEM, 0o644))
	hostdirtest.Must(s.t, os.WriteFile(s.both, append(chainPEM, keyPEM...), 0o644))
}

// configure writes an example of a backend into a new directory, with the paths and the address of
// the application replaced, and what else is given.
func (s *backendSite) configure(file string, oldnew ...string) (path string) {
	s.t.Helper()
	all := []string{"/srv/sniproxy/one.example/tls-socket", filepath.Join(s.dir, "tls-socket")}
	content := fileText(s.t, file)
	for _, r := range [][2]string{
		{"/etc/ssl/one.example.crt", s.chain},
		{"/etc/ssl/private/one.example.key", s.key},
		{"/etc/ssl/private/one.example.pem", s.both},
		{"127.0.0.1:8080", s.application},
	} {
		if strings.Contains(content, r[0]) {
			all = append(all, r[:]...)
		}
	}
	content = strings.NewReplacer(append(all, oldnew...)...).Replace(content)
	path = filepath.Join(hostdirtest.Dir(s.t), filepath.Base(file))
	hostdirtest.Must(s.t, os.WriteFile(path, []byte(content), 0o644))
	return path
}

// mark makes a marker.
func (s *backendSite) mark(name string) {
	s.t.Helper()
	hostdirtest.Touch(s.t, filepath.Join(s.dir, name))
}

// run starts a backend, and waits until every user may connect to its socket, of either kind.
func (s *backendSite) run(cmd *exec.Cmd) {
	s.t.Helper()
	start(s.t, cmd)
	socket := filepath.Join(s.dir, "tls-socket")
	hostdirtest.Await(s.t, cmd.String()+" to listen", func() bool {
		info, err := os.Stat(socket)
		if err != nil || info.Mode().Perm()&0o222 != 0o222 {
			return false
		}
		for _, network := range []string{"unix", "unixgram"} {
			if c, err := net.Dial(network, socket); err == nil {
				c.Close()
				return true
			}
		}
		return false
	})
}

// page gets the page of one.example through sniproxy. It returns the client's address as well.
func (s *backendSite) page() (page, client string, err error) {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: hostdirtest.Patience}, "tcp", s.addr, &tls.Config{ServerName: "one.example", RootCAs: s.pool})
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	client, _, _ = net.SplitHostPort(c.LocalAddr().String())
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: one.example\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", client, err
	}
	body, err := io.ReadAll(response.Body)
	return string(body), client, err
}

// expect fails the test if the page is another one. With withClient it must have the client's
// address.
func (s *backendSite) expect(withClient bool) {
	s.t.Helper()
	got, client, err := s.page()
	want := "This is one.example.\n"
	if withClient {
		want = "This is one.example for " + client + ".\n"
	}
	if err != nil || got != want {
		s.t.Errorf("the page is %q, error %v; want %q", got, err, want)
	}
	if line, ok := s.check(); !ok || !strings.Contains(line, "with a certificate for one.example until ") {
		s.t.Errorf("sniproxy-check -t says %q", line)
	}
}

// check returns what sniproxy-check -t says of the host, and whether it is ok.
func (s *backendSite) check() (line string, ok bool) {
	s.t.Helper()
	cmd := exec.Command(build(s.t, "sniproxy-check"), "-t", "-u", fmt.Sprint(os.Geteuid()), filepath.Dir(s.dir), "one.example")
	line, _, status := hostdirtest.Run(s.t, cmd)
	return line, strings.HasPrefix(line, "one.example: ok") && status == 0
}

// expectFailure fails the test if the backend serves a client without a PROXY header.
func (s *backendSite) expectFailure() {
	s.t.Helper()
	if got, _, err := s.page(); err == nil {
		s.t.Errorf("without a marker the page is %q; want none, since the backend wants a header", got)
	}
	if line, ok := s.check(); ok || !strings.HasPrefix(line, "one.example: the backend expects a PROXY header of version ") {
		s.t.Errorf("without a marker sniproxy-check -t says %q", line)
	}
}

// Goal: nginx with the example serves a host, and learns the client's address from either version
// of the PROXY header.
func TestBackendNginx(t *testing.T) {
	t.Parallel()
	nginx := hostdirtest.Need(t, "nginx")
	s := newBackendSite(t)
	dir := hostdirtest.Dir(t)
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
daemon off;
master_process off;
error_log stderr;
pid %[1]s/pid;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	include %[2]s;
}
`, dir, s.configure("backends/nginx.conf")), 0o644); err != nil {
		t.Fatal(err)
	}
	s.run(exec.Command(nginx, "-e", "stderr", "-c", config))
	s.expectFailure()
	s.mark("send-proxy-v1")
	s.expect(true)
	s.mark("send-proxy-v2")
	s.expect(true)
}

// Goal: the same for HAProxy, also if an earlier run was killed.
func TestBackendHAProxy(t *testing.T) {
	t.Parallel()
	haproxy := hostdirtest.Need(t, "haproxy")
	s := newBackendSite(t)
	defaults := filepath.Join(hostdirtest.Dir(t), "haproxy.cfg")
	hostdirtest.Must(t, os.WriteFile(defaults, []byte("defaults\n\ttimeout connect 30s\n\ttimeout client 30s\n\ttimeout server 30s\n"), 0o644))
	config := s.configure("backends/haproxy.cfg")
	run := func() *exec.Cmd {
		cmd := exec.Command(haproxy, "-db", "-f", defaults, "-f", config)
		s.run(cmd)
		return cmd
	}
	first := run()
	s.expectFailure()
	s.mark("send-proxy-v1")
	s.expect(true)
	first.Process.Kill()
	first.Wait()
	run()
	s.mark("send-proxy-v2")
	s.expect(true)
}

// Goal: Caddy with the example serves a host, also if an earlier run was killed; since 2.7 also with
// the lines about the PROXY header, from which it learns the client's address.
func TestBackendCaddy(t *testing.T) {
	t.Parallel()
	caddy := hostdirtest.Need(t, "caddy")
	version := regexp.MustCompile(`^v?2\.(\d+)\.`).FindStringSubmatch(command(t, caddy, "version"))
	if version == nil {
		t.Fatalf("caddy is not of version 2: %s", command(t, caddy, "version"))
	}
	old := len(version[1]) == 1 && version[1] < "7"
	run := func(s *backendSite, oldnew ...string) *exec.Cmd {
		t.Helper()
		dir := hostdirtest.Dir(t)
		// Its administrator's port is one for all.
		oldnew = append(oldnew, "\tauto_https", "\tadmin off\n\tauto_https")
		config := s.configure("backends/Caddyfile", append(oldnew,
			"unix//srv/sniproxy/one.example/tls-socket", "unix/"+filepath.Join(s.dir, "tls-socket"))...)
		cmd := exec.Command(caddy, "run", "--config", config, "--adapter", "caddyfile")
		cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
		if old { // and so as the comment in the file says
			cmd.Args = append([]string{"sh", "-c", `umask 0; exec "$@"`, "sh"}, cmd.Args...)
			cmd.Path = hostdirtest.Need(t, "sh")
		}
		s.run(cmd)
		return cmd
	}
	s := newBackendSite(t)
	for range 2 {
		var cmd *exec.Cmd
		if old {
			cmd = run(s, "|0666", "")
		} else {
			cmd = run(s)
		}
		page, _, err := s.page()
		if err != nil || !strings.HasPrefix(page, "This is one.example for ") {
			t.Errorf("the page is %q, error %v", page, err)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
	if old {
		return
	}
	s = newBackendSite(t)
	run(s, "\t\t#l", "\t\tl", "\t\t#\t", "\t\t\t", "\t\t#}", "\t\t}")
	s.mark("send-proxy-v2")
	s.expect(true)
}

// Goal: the example for Node.js serves a host, also if an earlier run was killed.
func TestBackendNode(t *testing.T) {
	t.Parallel()
	node := hostdirtest.Need(t, "node")
	s := newBackendSite(t)
	script := s.configure("backends/server.js")
	for range 2 {
		cmd := exec.Command(node, script)
		s.run(cmd)
		s.expect(false)
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// Goal: the same for Go.
func TestBackendGo(t *testing.T) {
	t.Parallel()
	s := newBackendSite(t)
	build := exec.Command(hostdirtest.Need(t, "go"), "build", "-o", "server", filepath.Base(s.configure("backends/server.go")))
	build.Dir = filepath.Dir(s.configure("backends/server.go"))
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for range 2 {
		cmd := exec.Command(filepath.Join(build.Dir, "server"))
		s.run(cmd)
		s.expect(false)
		cmd.Process.Kill()
		cmd.Wait()
	}
}
