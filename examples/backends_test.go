package examples_test

import (
	"bufio"
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
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	return startProxyLogged(t, hosts, nil)
}

// startProxyLogged starts one whose log is collected.
func startProxyLogged(t *testing.T, hosts string, log *hostdirtest.Lines) (addr string) {
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
	if log != nil {
		cmd.Stderr = log
	}
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
		Subject:      pkix.Name{CommonName: "sniproxy test"},
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
	page, err = get(c)
	return page, client, err
}

// many is how many clients a recipe is tried with at once.
func many() int {
	if testing.Short() {
		return 100
	}
	return 1000
}

// expectMany opens many connections, and expects the page from each while all are open.
func (s *backendSite) expectMany() {
	s.t.Helper()
	config := &tls.Config{ServerName: "one.example", RootCAs: s.pool}
	conns := make([]*tls.Conn, many())
	each := func(what string, do func(i int) error) {
		s.t.Helper()
		failed := inParallel(len(conns), do)
		if len(failed) > 0 {
			s.t.Errorf("%d of %d clients at once: %s: %v", len(failed), len(conns), what, failed[0])
		}
	}
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	each("handshake", func(i int) error {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: hostdirtest.Patience}, "tcp", s.addr, config)
		if err == nil {
			c.SetDeadline(time.Now().Add(2 * hostdirtest.Patience))
			conns[i] = c
		}
		return err
	})
	if s.t.Failed() {
		return
	}
	each("request", func(i int) error {
		_, err := get(conns[i])
		return err
	})
}

// inParallel does something n times, and returns the errors.
func inParallel(n int, do func(i int) error) (failed []error) {
	var mu sync.Mutex
	var next atomic.Int64
	var workers sync.WaitGroup
	for range 32 {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					mu.Lock()
					failed = append(failed, err)
					mu.Unlock()
				}
			}
		})
	}
	workers.Wait()
	return failed
}

// get asks for the page on a connection, and returns it.
func get(c *tls.Conn) (page string, err error) {
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: one.example\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, body)
	}
	return string(body), err
}

// startPages has clients get the page, over and over.
func (s *backendSite) startPages() *load {
	return startLoadOf(s.t, func() error {
		page, _, err := s.page()
		if err == nil && !strings.HasPrefix(page, "This is one.example") {
			err = fmt.Errorf("the page is %q", page)
		}
		return err
	})
}

// expectReplaced tests that a second run of a backend replaces the first, under load, so that no
// client is lost, and that the end of the first takes nothing from the second.
func (s *backendSite) expectReplaced(backend func() *exec.Cmd) {
	s.t.Helper()
	socket := filepath.Join(s.dir, "tls-socket")
	first := backend()
	s.run(first)
	pages := s.startPages()
	pages.more(20)
	before, err := os.Stat(socket)
	hostdirtest.Must(s.t, err)
	start(s.t, backend())
	hostdirtest.Await(s.t, "another socket", func() bool {
		after, err := os.Stat(socket)
		return err == nil && !os.SameFile(before, after)
	})
	pages.more(50)
	hostdirtest.Must(s.t, first.Process.Signal(syscall.SIGTERM))
	if err := first.Wait(); err != nil {
		s.t.Errorf("the first run ended with: %v", err)
	}
	pages.more(20)
	pages.end()
}

// kill kills a backend. Its socket stays, as after a power loss.
func (s *backendSite) kill(cmd *exec.Cmd) {
	s.t.Helper()
	cmd.Process.Kill()
	cmd.Wait()
	if _, err := os.Lstat(filepath.Join(s.dir, "tls-socket")); err != nil {
		s.t.Errorf("the killed backend has left no socket: %v", err)
	}
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

// expectECH fails the test unless sniproxy-check -t says that the backend confirms Encrypted Client
// Hello, or does not: sniproxy-ech(7) says so too.
func (s *backendSite) expectECH(confirms bool) {
	s.t.Helper()
	want := map[bool]string{true: "; confirms ECH", false: "; does not confirm ECH"}[confirms]
	if line, ok := s.check(); !ok || !strings.Contains(line, want) {
		s.t.Errorf("sniproxy-check -t says %q, want %q in it", line, want)
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

// nginxMain is a main configuration for nginx, in which the paths of its directory and of the
// example are missing.
const nginxMain = `
daemon off;
error_log stderr;
pid %[1]s/pid;
worker_rlimit_nofile 65536;
events { worker_connections 20000; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	include %[2]s;
}
`

// Goal: nginx with the example serves a host, and learns the client's address from either version
// of the PROXY header. It serves many clients at once, with the limits that the example names, and
// a reload loses none.
func TestBackendNginx(t *testing.T) {
	t.Parallel()
	nginx := hostdirtest.Need(t, "nginx")
	s := newBackendSite(t)
	dir := hostdirtest.Dir(t)
	config := filepath.Join(dir, "nginx.conf")
	hostdirtest.Must(t, os.WriteFile(config, fmt.Appendf(nil, nginxMain, dir, s.configure("backends/nginx.conf")), 0o644))
	cmd := exec.Command(nginx, "-e", "stderr", "-c", config)
	s.run(cmd)
	t.Cleanup(func() { terminate(cmd) }) // with its workers
	s.expectFailure()
	s.mark("send-proxy-v1")
	s.expect(true)
	s.mark("send-proxy-v2")
	s.expect(true)
	s.expectECH(false)
	s.expectMany()
	pages := s.startPages()
	pages.more(20)
	workers := children(cmd.Process.Pid)
	hostdirtest.Must(t, cmd.Process.Signal(syscall.SIGHUP))
	hostdirtest.Await(t, "new workers", func() bool {
		now := children(cmd.Process.Pid)
		return len(now) > 0 && !slices.ContainsFunc(now, func(pid int) bool { return slices.Contains(workers, pid) })
	})
	pages.more(20)
	pages.end()
}

// terminate ends a program with SIGTERM, and waits for it.
func terminate(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
}

// Goal: the same for HAProxy, also if an earlier run was killed, and if one takes over from
// another, as at a reload.
func TestBackendHAProxy(t *testing.T) {
	t.Parallel()
	haproxy := hostdirtest.Need(t, "haproxy")
	s := newBackendSite(t)
	defaults := haproxyDefaults(t)
	config := s.configure("backends/haproxy.cfg")
	command := func(args ...string) *exec.Cmd {
		return exec.Command(haproxy, append([]string{"-db", "-f", defaults, "-f", config}, args...)...)
	}
	first := command()
	s.run(first)
	s.expectFailure()
	s.mark("send-proxy-v1")
	s.expect(true)
	s.kill(first)
	second := command()
	s.run(second)
	s.mark("send-proxy-v2")
	s.expect(true)
	s.expectECH(false)
	s.expectMany()
	pages := s.startPages()
	pages.more(20)
	start(t, command("-sf", strconv.Itoa(second.Process.Pid)))
	second.Wait()
	pages.more(20)
	pages.end()
}

// Goal: HAProxy and Caddy take the socket of systemd, as one.example.service says.
func TestBackendActivated(t *testing.T) {
	t.Parallel()
	service := fileText(t, "backends/one.example.service")
	for name, bind := range map[string]string{"HAProxy": "bind fd@3", "Caddy": "bind fd/3"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if !strings.Contains(service, "`"+bind+"`") {
				t.Errorf("one.example.service does not have %q", bind)
			}
			s := newBackendSite(t)
			if name == "HAProxy" {
				config := s.configure("backends/haproxy.cfg", "bind /srv/sniproxy/one.example/tls-socket mode 666", bind)
				s.activate(s, hostdirtest.Need(t, "systemd-socket-activate"), hostdirtest.Need(t, "haproxy"), "-db", "-f", haproxyDefaults(t), "-f", config)
			} else {
				if testing.Short() {
					t.Skip("takes long to build")
				}
				caddy, err := caddyPath()
				if err != nil {
					hostdirtest.Missing(t, "caddy "+caddyVersion+": "+err.Error())
				}
				config := s.configure("backends/Caddyfile", "bind unix//srv/sniproxy/one.example/tls-socket|0666", bind, "\tauto_https", "\tadmin off\n\tauto_https")
				s.activate(s, hostdirtest.Need(t, "systemd-socket-activate"), caddy, "run", "--config", config, "--adapter", "caddyfile")
			}
			s.mark("send-proxy-v2")
			s.expect(true)
		})
	}
}

// haproxyDefaults returns the path of a file with what Debian's haproxy.cfg has in front of an
// example.
func haproxyDefaults(t *testing.T) string {
	t.Helper()
	path := filepath.Join(hostdirtest.Dir(t), "defaults.cfg")
	hostdirtest.Must(t, os.WriteFile(path, []byte("defaults\n\ttimeout connect 5s\n\ttimeout client 50s\n\ttimeout server 50s\n"), 0o644))
	return path
}

// caddyVersion is the version of Caddy that the Caddyfile is for. Debian has none so new: see
// caddyPath.
const caddyVersion = "v2.10.0"

// caddyPath returns the path of that Caddy, which it builds, once.
var caddyPath = sync.OnceValues(func() (string, error) {
	build := exec.Command("go", "install", "github.com/caddyserver/caddy/v2/cmd/caddy@"+caddyVersion)
	build.Dir = workspace
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOBIN="+workspace)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v\n%s", err, out)
	}
	return filepath.Join(workspace, "caddy"), nil
})

// runCaddy starts a Caddy with the example, in which some strings are replaced.
func (s *backendSite) runCaddy(caddy string, umask int, oldnew ...string) *exec.Cmd {
	s.t.Helper()
	dir := hostdirtest.Dir(s.t)
	config := s.configure("backends/Caddyfile", append(oldnew,
		"\tauto_https", "\tadmin unix/"+filepath.Join(dir, "admin")+"\n\tauto_https", // its port is one for all
		"unix//srv/sniproxy/one.example/tls-socket", "unix/"+filepath.Join(s.dir, "tls-socket"))...)
	cmd := exec.Command(hostdirtest.Need(s.t, "sh"), "-c", fmt.Sprintf(`umask %03o; exec "$@"`, umask), "sh",
		caddy, "run", "--config", config, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	s.run(cmd)
	return cmd
}

// Goal: Caddy with the example serves a host, with the clients' addresses if there is a marker,
// also if an earlier run was killed, and after a reload; it serves many clients at once.
func TestBackendCaddy(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes long to build")
	}
	hostdirtest.Need(t, "go")
	caddy, err := caddyPath()
	if err != nil {
		hostdirtest.Missing(t, "caddy "+caddyVersion+": "+err.Error())
	}
	s := newBackendSite(t)
	cmd := s.runCaddy(caddy, 0o22)
	if page, _, err := s.page(); err != nil || !strings.HasPrefix(page, "This is one.example for ") {
		t.Errorf("without a marker the page is %q, error %v", page, err)
	}
	s.mark("send-proxy-v2")
	s.expect(true)
	s.expectECH(true)
	s.kill(cmd)
	cmd = s.runCaddy(caddy, 0o22)
	s.expect(true)
	s.expectMany()
	config := cmd.Args[slices.Index(cmd.Args, "--config")+1]
	reload := exec.Command(caddy, "reload", "--force", "--config", config, "--adapter", "caddyfile")
	reload.Env = cmd.Env
	if out, err := reload.CombinedOutput(); err != nil {
		t.Errorf("reload: %v\n%s", err, out)
	}
	s.expect(true)
}

// Goal: the Caddy of Debian serves a host with what the comment in the example says of it.
func TestBackendOldCaddy(t *testing.T) {
	t.Parallel()
	caddy := hostdirtest.Need(t, "caddy")
	if version := command(t, caddy, "version"); !strings.HasPrefix(version, "2.6.") && !strings.HasPrefix(version, "v2.6.") {
		t.Skipf("this is Caddy %s", version)
	}
	s := newBackendSite(t)
	for range 2 {
		cmd := s.runCaddy(caddy, 0, "|0666", "",
			"\t\tlistener_wrappers {\n\t\t\tproxy_protocol\n\t\t\ttls\n\t\t}\n", "")
		page, _, err := s.page()
		if err != nil || !strings.HasPrefix(page, "This is one.example for ") {
			t.Errorf("the page is %q, error %v", page, err)
		}
		s.kill(cmd)
	}
}

// testServer tests a server that makes its own socket, or takes that of systemd: it serves many
// clients at once, is no worse for an earlier run that was killed, and lets a second run replace
// it.
func testServer(t *testing.T, s *backendSite, confirmsECH bool, server func() *exec.Cmd) {
	t.Helper()
	first := server()
	s.run(first)
	s.expect(false)
	s.expectECH(confirmsECH)
	s.kill(first)
	s.expectReplaced(server)
	s.expectMany()

	activate := hostdirtest.Need(t, "systemd-socket-activate")
	activated := newBackendSite(t)
	s.activate(activated, activate, server().Args...)
	activated.pool = s.pool
	activated.expect(false)
}

// activate starts a server with the socket of another site, as systemd does.
func (s *backendSite) activate(other *backendSite, activate string, args ...string) {
	s.t.Helper()
	socket := filepath.Join(other.dir, "tls-socket")
	start(s.t, exec.Command(activate, append([]string{"--listen=" + socket}, args...)...))
	hostdirtest.AwaitListening(s.t, socket) // to connect would start the server
	hostdirtest.Must(s.t, os.Chmod(socket, 0o666))
}

// Goal: the example for Node.js serves a host.
func TestBackendNode(t *testing.T) {
	t.Parallel()
	node := hostdirtest.Need(t, "node")
	s := newBackendSite(t)
	script := s.configure("backends/server.js")
	testServer(t, s, false, func() *exec.Cmd { return exec.Command(node, script) })
}

// Goal: the same for Python.
func TestBackendPython(t *testing.T) {
	t.Parallel()
	python := hostdirtest.Need(t, "python3")
	s := newBackendSite(t)
	script := s.configure("backends/server.py")
	testServer(t, s, false, func() *exec.Cmd { return exec.Command(python, script) })
}

// Goal: at the stop, the example for Python closes connections that are kept without a request, at
// once, and lets one that is under way have its answer.
func TestBackendPythonStop(t *testing.T) {
	t.Parallel()
	python := hostdirtest.Need(t, "python3")
	s := newBackendSite(t)
	cmd := exec.Command(python, s.configure("backends/server.py", "SILENCE = 10", "SILENCE = 3600", "STOP = 25", "STOP = 3600"))
	s.run(cmd)
	const half, rest = "GET / HTTP/1.1\r\n", "Host: one.example\r\n\r\n"
	dial := func() (*tls.Conn, *bufio.Reader) {
		t.Helper()
		c, err := tls.Dial("tcp", s.addr, &tls.Config{ServerName: "one.example", RootCAs: s.pool})
		hostdirtest.Must(t, err)
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(2 * hostdirtest.Patience))
		return c, bufio.NewReader(c)
	}
	expectPage := func(r *bufio.Reader) {
		t.Helper()
		response, err := http.ReadResponse(r, nil)
		hostdirtest.Must(t, err)
		if page, err := io.ReadAll(response.Body); err != nil || string(page) != "This is one.example.\n" {
			t.Errorf("the page is %q, error %v", page, err)
		}
	}
	kept, fromKept := dial()
	busy, fromBusy := dial()
	for range 2 {
		io.WriteString(kept, half+rest)
		expectPage(fromKept)
		io.WriteString(busy, half+rest)
		expectPage(fromBusy)
	}
	io.WriteString(busy, half)
	first, fromFirst := dial() // it has made its handshake, and no request yet
	hostdirtest.Must(t, cmd.Process.Signal(syscall.SIGTERM))
	// It ends without a close_notify, which is the end of no answer.
	if _, err := fromKept.ReadByte(); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a connection that is kept has ended with %v", err)
	}
	for c, r := range map[*tls.Conn]*bufio.Reader{busy: fromBusy, first: fromFirst} {
		if c == first {
			io.WriteString(c, half)
		}
		io.WriteString(c, rest)
		expectPage(r)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the server ended with: %v", err)
	}
}

// Goal: the same for Go.
func TestBackendGo(t *testing.T) {
	t.Parallel()
	s := newBackendSite(t)
	source := s.configure("backends/server.go")
	server := filepath.Join(filepath.Dir(source), "server")
	command(t, hostdirtest.Need(t, "go"), "build", "-o", server, source)
	testServer(t, s, true, func() *exec.Cmd { return exec.Command(server) })
}
