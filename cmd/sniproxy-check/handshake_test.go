package main

import (
	"bytes"
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
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/proxyproto"
)

// The dates of certificates in the tests.
var (
	begin = time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)
	end   = time.Date(2101, 1, 1, 0, 0, 0, 0, time.UTC)
)

const good2101 = "until 2101-01-01"

// certify returns a certificate for names, which signs itself.
func certify(t *testing.T, from, to time.Time, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pemFile writes a certificate and its key into one file.
func pemFile(t *testing.T, c tls.Certificate) string {
	t.Helper()
	secret, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	must(t, err)
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})...)
	path := filepath.Join(hostdirtest.Dir(t), "pem")
	must(t, os.WriteFile(path, text, 0o644))
	return path
}

// launch starts a backend, which ends with the test, and waits until sockets of hosts are there.
func launch(t *testing.T, cmd *exec.Cmd, dirs ...string) *exec.Cmd {
	t.Helper()
	var output hostdirtest.Lines
	cmd.Stdout, cmd.Stderr = &output, &output
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", cmd.Path, output.String())
		}
	})
	for _, dir := range dirs {
		hostdirtest.Await(t, dir+" to be listened on", func() bool {
			c, err := net.Dial("unix", dir+"/tls-socket")
			if err == nil {
				c.Close()
			}
			return err == nil
		})
	}
	return cmd
}

// A tlsHosts is a hosts directory for handshakes, and what they must find out.
type tlsHosts struct {
	t     *testing.T
	dir   string
	names []string
	want  map[string]string // what the line of a name must begin with, behind the name
	ends  map[string]string // what else must be in it
}

func newTLSHosts(t *testing.T) *tlsHosts {
	return &tlsHosts{t: t, dir: hostdirtest.Dir(t), want: map[string]string{}, ends: map[string]string{}}
}

// add adds a host with markers, and returns its directory.
func (h *tlsHosts) add(name, begins, has string, markers ...string) (dir string) {
	h.t.Helper()
	h.names = append(h.names, name)
	h.want[name], h.ends[name] = begins, has
	dir = filepath.Join(h.dir, entryOf(name))
	must(h.t, os.Mkdir(dir, 0o755))
	for _, m := range markers {
		hostdirtest.Touch(h.t, filepath.Join(dir, m))
	}
	return dir
}

// check compares what sniproxy-check says of the hosts with what it must say.
func (h *tlsHosts) check() (stdout string) {
	h.t.Helper()
	stdout, stderr, status := check(h.t, users()[0], "", append([]string{"-t", h.dir}, h.names...)...)
	if stderr != "" || status != 1 {
		h.t.Errorf("exit status %d, stderr %q", status, stderr)
	}
	lines := byLabel(stdout)
	for _, name := range h.names {
		line := lines[name]
		if !strings.HasPrefix(line, h.want[name]) || !strings.Contains(line, h.ends[name]) {
			h.t.Errorf("%s: it says %q, want %q … %q", name, line, h.want[name], h.ends[name])
		}
	}
	return stdout
}

const (
	expectsNone   = "the backend expects no PROXY header; with send-proxy-"
	expectsHeader = "the backend expects a PROXY header of version 1; without send-proxy-v1 and send-proxy-v2 it must expect no PROXY header: have it do so, or make send-proxy-v1"
	plainHTTP     = "the backend speaks plain HTTP on tls-socket: "
	anothers      = "the certificate is not for "
)

// Goal: with nginx, whose version in Debian 12 speaks TLS 1.2 unless it is told otherwise, the five
// mistakes are found, except one that stops it, and what is right is ok.
func TestHandshakeNginx(t *testing.T) {
	t.Parallel()
	nginx := hostdirtest.Need(t, "nginx")
	h := newTLSHosts(t)
	crt := pemFile(t, certify(t, begin, end, "*.n.example"))
	conf := hostdirtest.Dir(t)
	var servers strings.Builder
	var dirs []string
	serve := func(dir, options string) {
		dirs = append(dirs, dir)
		fmt.Fprintf(&servers, "server { listen unix:%s/tls-socket %s; ssl_certificate %s; ssl_certificate_key %s; }\n", dir, options, crt, crt)
	}
	serve(h.add("good.n.example", "ok; TLS 1.2, with a certificate for *.n.example ", good2101+"; does not confirm ECH, which needs TLS 1.3"), "ssl")
	serve(h.add("v1.n.example", "ok, PROXY v1; TLS 1.2, with a certificate for *.n.example ", good2101, "send-proxy-v1"), "ssl proxy_protocol")
	serve(h.add("v2.n.example", "ok, PROXY v2; TLS 1.2, with a certificate for *.n.example ", good2101, "send-proxy-v2"), "ssl proxy_protocol")
	serve(h.add("marked1.n.example", expectsNone+"v1 ", "have it do so, or remove that marker", "send-proxy-v1"), "ssl")
	serve(h.add("marked2.n.example", expectsNone+"v2 ", "have it do so, or remove that marker", "send-proxy-v2"), "ssl")
	serve(h.add("unmarked.n.example", expectsHeader, ""), "ssl proxy_protocol")
	serve(h.add("http.n.example", plainHTTP, "ssl"), "")
	serve(h.add("http1.n.example", plainHTTP, "ssl", "send-proxy-v1"), "proxy_protocol")
	serve(h.add("another.example", anothers+"another.example but for *.n.example: ", ""), "ssl")
	config := filepath.Join(conf, "nginx.conf")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `
daemon off;
master_process off;
error_log stderr;
pid %[1]s/pid;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	%[2]s
}
`, conf, servers.String()), 0o644))
	launch(t, exec.Command(nginx, "-e", "stderr", "-p", conf, "-c", config), dirs...)
	h.check()
}

// Goal: the same with HAProxy. A backend that takes headers of both versions is good with either.
func TestHandshakeHAProxy(t *testing.T) {
	t.Parallel()
	haproxy := hostdirtest.Need(t, "haproxy")
	h := newTLSHosts(t)
	crt := pemFile(t, certify(t, begin, end, "*.h.example"))
	var config strings.Builder
	config.WriteString("defaults\n\tmode http\n\ttimeout client 60s\n\ttimeout server 60s\n\ttimeout connect 5s\n")
	var dirs []string
	serve := func(dir, options string) {
		dirs = append(dirs, dir)
		fmt.Fprintf(&config, "frontend f%d\n\tbind unix@%s/tls-socket mode 666 %s\n\thttp-request return status 200\n", len(dirs), dir, options)
	}
	ssl := "ssl crt " + crt
	serve(h.add("good.h.example", "ok; TLS 1.3, with a certificate for *.h.example ", good2101+"; does not confirm ECH"), ssl)
	serve(h.add("v1.h.example", "ok, PROXY v1; TLS 1.3", good2101, "send-proxy-v1"), "accept-proxy "+ssl)
	serve(h.add("v2.h.example", "ok, PROXY v2; TLS 1.3", good2101, "send-proxy-v2"), "accept-proxy "+ssl)
	serve(h.add("marked.h.example", expectsNone+"v2 ", "have it do so, or remove that marker", "send-proxy-v2"), ssl)
	serve(h.add("unmarked.h.example", expectsHeader, ""), "accept-proxy "+ssl)
	serve(h.add("http.h.example", plainHTTP, "ssl crt"), "")
	serve(h.add("http2.h.example", plainHTTP, "ssl crt", "send-proxy-v2"), "accept-proxy")
	serve(h.add("another.example", anothers+"another.example but for *.h.example: ", ""), ssl)
	serve(h.add("strict.example", "the backend refuses a handshake for strict.example: ", "unrecognized name"), ssl+" strict-sni")
	path := filepath.Join(hostdirtest.Dir(t), "haproxy.cfg")
	must(t, os.WriteFile(path, []byte(config.String()), 0o644))
	launch(t, exec.Command(haproxy, "-db", "-f", path), dirs...)
	h.check()
}

// Goal: OpenSSL's server, with old versions of TLS, with a certificate that has expired or is not
// yet valid, behind a marker, and stopped: then the answer comes after ten seconds.
func TestHandshakeOpenSSL(t *testing.T) {
	t.Parallel()
	openssl := hostdirtest.Need(t, "openssl")
	h := newTLSHosts(t)
	serve := func(dir string, c tls.Certificate, options ...string) *exec.Cmd {
		crt := pemFile(t, c)
		cmd := exec.Command(openssl, append([]string{"s_server", "-unix", "tls-socket", "-cert", crt, "-key", crt, "-quiet"}, options...)...)
		cmd.Dir = dir // a long path would not do
		return launch(t, cmd, dir)
	}
	names := []string{"*.o.example"}
	valid := certify(t, begin, end, names...)
	serve(h.add("good.o.example", "ok; TLS 1.3, with a certificate for *.o.example ", good2101+"; does not confirm ECH"), valid)
	serve(h.add("retry.o.example", "ok; TLS 1.3", good2101+"; does not confirm ECH"), valid, "-groups", "P-384")
	serve(h.add("old.o.example", "ok; TLS 1.0, with a certificate for *.o.example ", good2101), valid, "-tls1", "-cipher", "ALL:@SECLEVEL=0")
	serve(h.add("marked.o.example", expectsNone+"v1 ", "", "send-proxy-v1"), valid)
	serve(h.add("expired.o.example", "the certificate has expired on 2002-02-02: renew it", ""), certify(t, begin, time.Date(2002, 2, 2, 0, 0, 0, 0, time.UTC), names...))
	serve(h.add("early.o.example", "the certificate is not valid before 2100-01-01: ", ""), certify(t, end.AddDate(-1, 0, 0), end, names...))
	serve(h.add("both.example", anothers+"both.example but for *.o.example: give the backend one for both.example; the certificate has expired on 2002-02-02", ""),
		certify(t, begin, time.Date(2002, 2, 2, 0, 0, 0, 0, time.UTC), names...))
	serve(h.add("nameless.example", anothers+"nameless.example but for no name (a common name does not count): ", ""), certify(t, begin, end))
	serve(h.add("client.o.example", "ok; TLS, with a certificate for *.o.example "+good2101+"; the backend then ended the handshake, perhaps since it wants a certificate of the client's: remote error: tls: handshake failure", ""),
		valid, "-tls1_2", "-Verify", "1")
	stopped := serve(h.add("stopped.o.example", "the backend gave no answer to a ClientHello for ten seconds: it is stopped ", ""), valid)
	must(t, stopped.Process.Signal(syscall.SIGSTOP))
	h.check()
}

// speak makes a host whose backend speaks TLS. It expects a PROXY header if there is a marker for
// version 2.
func speak(t *testing.T, dir string, cert tls.Certificate) {
	t.Helper()
	hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
		var in []byte
		if _, err := os.Stat(dir + "/send-proxy-v2"); err == nil {
			_, in = readHeader(c)
		}
		tls.Server(&rewound{c, in}, &tls.Config{Certificates: []tls.Certificate{cert}}).Handshake()
	})
}

// Goal: for a wildcard the backend is asked for a name that the wildcard serves, and the header of
// version 2 names it too. What serves everything need not have a certificate for that name.
func TestHandshakeWildcard(t *testing.T) {
	t.Parallel()
	h := newTLSHosts(t)
	cert := certify(t, begin, end, "*.w.example", "single.example")
	var mu sync.Mutex
	asked := map[string]bool{}
	serve := func(dir string) {
		hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
			header, in := readHeader(c)
			client := tls.Server(&rewound{c, in}, &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
				mu.Lock()
				defer mu.Unlock()
				asked[hello.ServerName] = strings.Contains(header, hello.ServerName)
				return &cert, nil
			}})
			client.Handshake()
		})
	}
	serve(h.add("*.w.example", "ok, PROXY v2; TLS 1.3", good2101, "send-proxy-v2"))
	serve(h.add("*.x.example", anothers+"sniproxy-check.x.example but for *.w.example, single.example: ", "", "send-proxy-v2"))
	serve(h.add("*", "ok, PROXY v2; TLS 1.3", good2101, "send-proxy-v2"))
	h.names = append(h.names, "a.w.example")
	h.want["a.w.example"] = "ok, PROXY v2, served by *.w.example; TLS 1.3"
	h.check()
	mu.Lock()
	defer mu.Unlock()
	for _, name := range []string{"sniproxy-check.w.example", "sniproxy-check.x.example", "sniproxy-check", "a.w.example"} {
		if inHeader, ok := asked[name]; !ok || !inHeader {
			t.Errorf("asked for %s: %t, named it in the header: %t", name, ok, inHeader)
		}
	}
	long := strings.Repeat("a.", 125) + "bb"
	if got := askedName([]byte("*." + long)); got != "a."+long {
		t.Errorf("of a long wildcard it asks for %s", got)
	}
}

// readHeader reads what comes first, and returns the PROXY header in it, and the rest.
func readHeader(c net.Conn) (header string, rest []byte) {
	b := make([]byte, 1<<16)
	n, _ := c.Read(b)
	_, size, _ := proxyproto.Parse(b[:n])
	return string(b[:size]), b[size:n]
}

// Goal: a backend that is handed its connections is handed one, with the ClientHello, behind the
// header that the marker asks for, and is judged like any other.
func TestHandshakeHanded(t *testing.T) {
	t.Parallel()
	h := newTLSHosts(t)
	listen := func(dir string, c tls.Certificate) {
		l, err := backend.Listen(dir)
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{c}}).Handshake()
				}()
			}
		}()
	}
	listen(h.add("good.example", "ok, handed over; TLS 1.3, with a certificate for good.example ", good2101+"; "+noECH), certify(t, begin, end, "good.example"))
	listen(h.add("marked.example", "ok, handed over, PROXY v2; TLS 1.3", good2101, "send-proxy-v2"), certify(t, begin, end, "marked.example"))
	listen(h.add("another.example", anothers+"another.example but for good.example: ", ""), certify(t, begin, end, "good.example"))
	// Like a stream backend that expects no header.
	cert := certify(t, begin, end, "strict.example")
	strict := func(dir string) {
		hostdirtest.ServeDatagram(t, dir, func(c *net.TCPConn, first []byte) {
			tls.Server(&rewound{c, first}, &tls.Config{Certificates: []tls.Certificate{cert}}).Handshake()
		})
	}
	strict(h.add("strict.example", expectsNone+"v1 ", "", "send-proxy-v1"))
	must(t, os.Mkdir(filepath.Join(h.dir, entryOf("full.example")), 0o755))
	h.names = append(h.names, "full.example")
	h.want["full.example"] = "the backlog of tls-socket is full: the backend has taken no connection for ten seconds"
	hostdirtest.ListenDatagram(t, filepath.Join(h.dir, entryOf("full.example")))
	fillQueue(t, filepath.Join(h.dir, entryOf("full.example"), "tls-socket"))
	h.check()
}

// fillQueue sends a datagram socket as much as there is room for.
func fillQueue(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.SetNonblock(fd, true))
	must(t, unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
	for err == nil {
		_, err = unix.Write(fd, []byte("x"))
	}
}

// A rewound connection begins with bytes that were read before.
type rewound struct {
	net.Conn
	first []byte
}

func (r *rewound) Read(b []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(b, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.Conn.Read(b)
}

// Goal: no hostile backend takes more than its ten seconds, and nothing that one says reaches the
// terminal as it is.
func TestHandshakeHostile(t *testing.T) {
	t.Parallel()
	h := newTLSHosts(t)
	backend := func(dir string, handle func(c *net.UnixConn)) {
		hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
			c.Read(make([]byte, 1<<16))
			handle(c)
		})
	}
	// It says a byte each time that the clock of the test's own client ticks.
	drip := func(c *net.UnixConn) {
		c.Write([]byte{22, 3, 3, 0x3f, 0xff, 2, 0, 0x3f, 0xfb})
		for tick := range time.Tick(100 * time.Millisecond) {
			if _, err := c.Write([]byte{byte(tick.Second())}); err != nil {
				return
			}
		}
	}
	backend(h.add("dripping.example", "the backend did not complete its answer to a ClientHello for ten seconds", ""), drip)
	backend(h.add("endless.example", "", "handshake"), func(c *net.UnixConn) {
		for junk := bytes.Repeat([]byte{22, 3, 3, 0, 1, 0}, 1000); ; {
			if _, err := c.Write(junk); err != nil {
				return
			}
		}
	})
	backend(h.add("garbage.example", "the backend answers a ClientHello with something other than TLS: ", ""), func(c *net.UnixConn) {
		io.WriteString(c, "\x1b[2J\x1b]0;owned\x07\r\n")
	})
	backend(h.add("closing.example", "the backend has closed the connection without an answer; without send-proxy-v1 and send-proxy-v2 it must expect no PROXY header, and TLS: ", ""), func(c *net.UnixConn) {})
	backend(h.add("silent.example", "the backend gave no answer to a ClientHello for ten seconds: ", ""), func(c *net.UnixConn) { io.Copy(io.Discard, c) })
	serve := func(dir string, c tls.Certificate) {
		hostdirtest.Serve(t, dir, func(conn *net.UnixConn) {
			tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{c}}).Handshake()
		})
	}
	serve(h.add("control.example", anothers+`control.example but for "\x1b[2J\x1b]0;owned\a", "a\nb.example: ok": `, ""), certify(t, begin, end, "\x1b[2J\x1b]0;owned\x07", "a\nb.example: ok"))
	var many []string
	for i := range 600 {
		many = append(many, fmt.Sprintf("%s%d.example", strings.Repeat("x", 250), i))
	}
	serve(h.add("many.example", anothers, " and 595 more"), certify(t, begin, end, many...))
	serve(h.add("broken.example", "no handshake can be made: ", "certificate"), tls.Certificate{Certificate: [][]byte{{0x30, 3, 1, 2, 3}}, PrivateKey: certify(t, begin, end).PrivateKey})
	stdout := h.check()
	if strings.ContainsFunc(stdout, func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f }) || strings.Count(stdout, "\n") != len(h.names) || len(stdout) > 2000*len(h.names) {
		t.Errorf("stdout %q", stdout)
	}
}

// Goal: an attempt has its own time limit, whatever is left of it.
func TestHandshakeLimit(t *testing.T) {
	t.Parallel()
	if handshakeLimit != 10*time.Second {
		t.Errorf("the limit is %v", handshakeLimit)
	}
	dir := hostdirtest.Dir(t)
	hostdirtest.Serve(t, dir, func(c *net.UnixConn) { io.Copy(io.Discard, c) })
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	must(t, unix.SetNonblock(fd, true))
	must(t, unix.Connect(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}))
	s := session{name: "one.example", limit: shortLimit}
	a := s.try(hostdir.Backend{FD: fd}, 0, time.Now().Add(50*time.Millisecond))
	if !a.late() || s.failure(a) == "" || !strings.Contains(s.failure(a), "for a second") {
		t.Errorf("the attempt ended with %v: %s", a.err, s.failure(a))
	}
}

// Goal: handshakes that nearly take the whole time count together as if some had; quick ones do
// not.
func TestHandshakeAllowance(t *testing.T) {
	t.Parallel()
	var a allowance
	for range 10_000 {
		a.took(1, slowAnswer-1)
	}
	for i := range 2 * ownerNone {
		want := lookupLimit
		if i >= 2*ownerShort {
			want = shortLimit
		}
		if got := a.limit(2); got != want {
			t.Errorf("after %d handshakes that took half the time the limit is %v", i, got)
		}
		a.took(2, lookupLimit/2)
	}
	if quick, slow := a.limit(1), a.limit(2); quick != lookupLimit || slow != 0 {
		t.Errorf("at the end the limits are %v and %v", quick, slow)
	}
}

// Goal: where nobody can tell the name of an entry, no handshake is made, and a remark says so.
func TestHandshakeHashed(t *testing.T) {
	t.Parallel()
	if !hostdir.Hashed {
		t.Skip("needs a build with hashes")
	}
	hosts := hostdirtest.Dir(t)
	serve(t, filepath.Join(hosts, entryOf("one.example")))
	stdout, _, status := check(t, users()[0], "", "-t", hosts)
	if !strings.HasSuffix(stdout, ": ok; no handshake is made, as the name is not known: give it as NAME\n") || status != 0 {
		t.Errorf("stdout %q, exit status %d", stdout, status)
	}
}
