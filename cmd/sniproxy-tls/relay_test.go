package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/proxyproto"
)

// Goal: bytes go both ways unchanged, over TCP and Unix sockets, by TLS 1.2 and 1.3, and the end of
// one direction leaves the other as it is.
func TestBytes(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	sent := make([]byte, 5<<20)
	random := rand.NewChaCha8([32]byte{1})
	random.Read(sent)
	// It answers after its client has ended.
	handle := func(c net.Conn) {
		got, err := io.ReadAll(c)
		if err == nil {
			c.Write(got)
		}
	}
	path := filepath.Join(hostdirtest.Dir(t), "s")
	l, err := net.Listen("unix", path)
	hostdirtest.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				handle(c)
				c.Close()
			}()
		}
	}()
	for host, backend := range map[string]string{"tcp.example": "tcp://" + listen(t, handle), "unix.example": "unix://" + path} {
		s.install(t, host, host)
		s.serve(t, host, backend)
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			config := s.config(host)
			config.MaxVersion = version
			c := s.dial(t, config)
			got, err := talk(c, string(sent))
			if err != nil || got != string(sent) {
				t.Errorf("%s, %s: %d bytes, %v", host, tls.VersionName(version), len(got), err)
			}
		}
	}
}

// Goal: a service that ends first has its end passed on, and still gets what the client sends after
// it.
func TestServiceEndsFirst(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	got := make(chan string, 1)
	s.serve(t, "one.example", "tcp://"+listen(t, func(c net.Conn) {
		io.WriteString(c, "welcome")
		c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	}))
	c := s.dial(t, s.config("one.example"))
	if b, err := io.ReadAll(c); err != nil || string(b) != "welcome" {
		t.Errorf("%q, %v", b, err)
	}
	io.WriteString(c, "goodbye")
	c.CloseWrite()
	select {
	case b := <-got:
		if b != "goodbye" {
			t.Errorf("%q", b)
		}
	case <-time.After(hostdirtest.Patience):
		t.Error("the service got no end")
	}
}

// Goal: what was cut off never looks like an end: a client that ends without close_notify is a
// reset for the service, and a service that resets is one for the client.
func TestCutOff(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.install(t, "two.example", "two.example")
	ended := make(chan error, 1)
	s.serve(t, "one.example", "tcp://"+listen(t, func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
	}))
	c := s.dial(t, s.config("one.example"))
	io.WriteString(c, "half of a ")
	hostdirtest.Must(t, c.NetConn().(*net.TCPConn).CloseWrite())
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the service got %v", err)
	}
	s.serve(t, "two.example", "tcp://"+listen(t, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 1))
		c.(*net.TCPConn).SetLinger(0)
	}))
	c = s.dial(t, s.config("two.example"))
	io.WriteString(c, "x")
	if b, err := io.ReadAll(c); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client got %q, %v", b, err)
	}
}

// Goal: where the service is down the client is reset, and a line says what to do.
func TestNoService(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for backend, reason := range map[string]string{
		"tcp://" + freeAddr(t):    "nobody listens there: start the service",
		"unix:///no/such/socket.": "there is no such socket: start the service",
	} {
		s.install(t, "one.example", "one.example")
		p := s.serve(t, "one.example", backend)
		c := s.dial(t, s.config("one.example"))
		if _, err := io.ReadAll(c); err == nil {
			t.Error("no error")
		}
		p.lines.Await(t, "sniproxy-tls: cannot connect to "+backend+": "+reason)
	}
}

// Goal: clients of a service on a Unix socket whose backlog is full wait until there is room.
func TestBacklog(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	path := filepath.Join(hostdirtest.Dir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	hostdirtest.Must(t, err)
	hostdirtest.Must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	hostdirtest.Must(t, unix.Listen(fd, 0))
	file := os.NewFile(uintptr(fd), path)
	l, err := net.FileListener(file)
	hostdirtest.Must(t, err)
	file.Close()
	defer l.Close()
	l.(*net.UnixListener).SetDeadline(time.Now().Add(hostdirtest.Patience))
	p := s.serve(t, "one.example", "unix://"+path)
	var clients []*tls.Conn
	for range 8 {
		clients = append(clients, s.dial(t, s.config("one.example")))
	}
	answered := make(chan error, len(clients))
	for _, c := range clients {
		go func() {
			got, err := talk(c, "x")
			if err == nil && got != "x" {
				err = errors.New(got)
			}
			answered <- err
		}()
	}
	for range clients {
		c, err := l.Accept()
		hostdirtest.Must(t, err)
		go func() {
			io.Copy(struct{ io.Writer }{c}, c)
			c.Close()
		}()
	}
	for range clients {
		if err := <-answered; err != nil {
			t.Error(err)
		}
	}
	if p.lines.Find("cannot connect") != "" {
		t.Error("a client was refused")
	}
}

// Goal: Redis, which has a plain port, is reached by TLS.
func TestRedis(t *testing.T) {
	t.Parallel()
	redis, cli := hostdirtest.Need(t, "redis-server"), hostdirtest.Need(t, "redis-cli")
	s := newSite(t)
	s.install(t, "redis.example", "redis.example")
	addr := freeAddr(t)
	launch(t, exec.Command(redis, "--bind", "127.0.0.1", "--port", portOf(addr), "--save", "", "--dir", t.TempDir()))
	awaitListener(t, "tcp", addr)
	s.serve(t, "redis.example", "tcp://"+addr)
	value := strings.Repeat("value", 1000)
	for _, command := range [][]string{{"SET", "key", value, "OK"}, {"GET", "key", value}} {
		n := len(command) - 1
		got := output(t, exec.Command(cli, append([]string{"--tls", "--sni", "redis.example", "--cacert", s.caPEM, "-h", "127.0.0.1", "-p", portOf(s.addr)}, command[:n]...)...))
		if strings.TrimSpace(got) != command[n] {
			t.Errorf("%s: %q", command[0], got)
		}
	}
}

// Goal: HAProxy learns from the header who the client is and what it asked for.
func TestHAProxy(t *testing.T) {
	t.Parallel()
	haproxy := hostdirtest.Need(t, "haproxy")
	s := newSite(t)
	dir := hostdirtest.Dir(t)
	put(t, filepath.Join(dir, "config"), []byte(`
defaults
	mode http
	timeout connect 30s
	timeout client 30s
	timeout server 30s
frontend site
	bind unix@`+dir+`/s accept-proxy
	http-request return content-type text/plain lf-string "%[src] %[src_port] %[dst_port] %[fc_pp_authority]"
`))
	launch(t, exec.Command(haproxy, "-db", "-f", filepath.Join(dir, "config")))
	awaitListener(t, "unix", dir+"/s")
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "unix+proxy://"+dir+"/s")
	c := s.dial(t, s.config("one.example"))
	want := fmt.Sprintf("127.0.0.1 %s %s one.example", portOf(c.LocalAddr().String()), portOf(s.addr))
	if got, err := talk(c, "GET / HTTP/1.0\r\n\r\n"); err != nil || !strings.HasSuffix(got, "\r\n\r\n"+want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

// An addressed connection has addresses as given.
type addressed struct {
	net.Conn
	local, remote netip.AddrPort
}

func (a addressed) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(a.local) }
func (a addressed) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(a.remote) }

// Goal: the header names a client of a balancer that has another address family than the balancer.
func TestHeaderFamilies(t *testing.T) {
	for _, c := range []struct{ local, remote, want string }{
		{"10.0.0.1:443", "192.0.2.1:99", "10.0.0.1:443"},
		{"[::ffff:10.0.0.1]:443", "192.0.2.1:99", "10.0.0.1:443"},
		{"[fd00::1]:443", "192.0.2.1:99", "0.0.0.0:443"},
		{"10.0.0.1:443", "[2001:db8::1]:99", "[::]:443"},
		{"[fd00::1]:443", "[2001:db8::1]:99", "[fd00::1]:443"},
	} {
		conn := addressed{nil, netip.MustParseAddrPort(c.local), netip.MustParseAddrPort(c.remote)}
		b := header(&client{Conn: conn}, tls.ConnectionState{ServerName: "one.example"})
		h, n, err := proxyproto.Parse(b)
		if err != nil || n != len(b) || h.Client.String() != c.remote || h.Listener.String() != c.want {
			t.Errorf("from %s to %s: %+v, %v", c.remote, c.local, h, err)
		}
	}
}

// Goal: nginx learns from the header who the client is.
func TestNginx(t *testing.T) {
	t.Parallel()
	nginx := hostdirtest.Need(t, "nginx")
	s := newSite(t)
	dir, addr := hostdirtest.Dir(t), freeAddr(t)
	put(t, filepath.Join(dir, "config"), []byte(`
daemon off;
master_process off;
error_log stderr;
pid pid;
events {}
http {
	access_log off;
	client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
	server {
		listen `+addr+` proxy_protocol;
		return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port";
	}
}
`))
	launch(t, exec.Command(nginx, "-p", dir, "-e", "stderr", "-c", "config"))
	awaitListener(t, "tcp", addr)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "tcp+proxy://"+addr)
	c := s.dial(t, s.config("one.example"))
	want := fmt.Sprintf("127.0.0.1 %s %s", portOf(c.LocalAddr().String()), portOf(s.addr))
	if got, err := talk(c, "GET / HTTP/1.0\r\n\r\n"); err != nil || !strings.HasSuffix(got, "\r\n\r\n"+want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

// Goal: Varnish, which reads all of the header, learns the protocol, the version and cipher of TLS,
// and who the client is by its certificate, also when it resumes a session.
func TestVarnish(t *testing.T) {
	t.Parallel()
	varnish := hostdirtest.Need(t, "varnishd")
	s := newSite(t)
	dir := hostdirtest.Dir(t)
	addr := freeAddr(t)
	put(t, filepath.Join(dir, "vcl"), []byte(`vcl 4.1;
import proxy;
backend none none;
sub vcl_recv {
	return (synth(200, proxy.authority() + "|" + proxy.alpn() + "|" + proxy.is_ssl() + "|" + proxy.ssl_version() + "|" + proxy.ssl_cipher() +
		"|" + proxy.client_has_cert_sess() + "|" + proxy.client_has_cert_conn() + "|" + proxy.ssl_verify_result() + "|" + proxy.client_cert_cn()));
}
sub vcl_synth {
	set resp.body = resp.reason;
	return (deliver);
}
`))
	os.Chmod(filepath.Join(dir, "vcl"), 0o644)
	launch(t, exec.Command(varnish, "-F", "-j", "none", "-n", filepath.Join(dir, "n"), "-a", addr+",PROXY", "-f", filepath.Join(dir, "vcl"), "-s", "default,1m"))
	awaitListener(t, "tcp", addr)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "tcp+proxy://"+addr)
	s.install(t, "two.example", "two.example")
	put(t, filepath.Join(s.dir(t, "two.example"), clientCAFile), s.ca.pem())
	s.serve(t, "two.example", "tcp+proxy://"+addr)
	cert, key := s.ca.issue(t, time.Hour, "alice")
	pair, err := tls.X509KeyPair(cert, key)
	hostdirtest.Must(t, err)
	cache := tls.NewLRUClientSessionCache(1)
	for _, test := range []struct {
		host    string
		version uint16
		suite   uint16
		alpn    []string
		cert    bool
		want    string
	}{
		{"one.example", tls.VersionTLS13, 0, []string{"http/1.1"}, false, "one.example|http/1.1|true|TLSv1.3|TLS_AES_128_GCM_SHA256|false|false|1|"},
		{"one.example", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, nil, false, "one.example||true|TLSv1.2|ECDHE-ECDSA-AES128-GCM-SHA256|false|false|1|"},
		{"one.example", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, nil, false, "one.example||true|TLSv1.2|ECDHE-ECDSA-CHACHA20-POLY1305|false|false|1|"},
		{"one.example", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA, nil, false, "one.example||true|TLSv1.2|ECDHE-ECDSA-AES256-SHA|false|false|1|"},
		{"two.example", tls.VersionTLS13, 0, nil, true, "two.example||true|TLSv1.3|TLS_AES_128_GCM_SHA256|true|true|0|alice"},
		{"two.example", tls.VersionTLS13, 0, nil, true, "two.example||true|TLSv1.3|TLS_AES_128_GCM_SHA256|true|false|0|alice"},
	} {
		config := s.config(test.host)
		config.MinVersion, config.MaxVersion, config.NextProtos = test.version, test.version, test.alpn
		if test.suite != 0 {
			config.CipherSuites = []uint16{test.suite}
		}
		if test.cert {
			config.Certificates, config.ClientSessionCache = []tls.Certificate{pair}, cache
		}
		c := s.dial(t, config)
		if got, err := talk(c, "GET / HTTP/1.0\r\n\r\n"); err != nil || !strings.HasSuffix(got, "\r\n\r\n"+test.want) {
			t.Errorf("%q, %v, want %q", got, err, test.want)
		}
	}
}

// Goal: a connection that nobody uses holds no more than a few buffers, and thousands may be open.
func TestManyIdle(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "tcp://"+echo(t))
	const n = 200
	var all []*tls.Conn
	for range n {
		all = append(all, s.dial(t, s.config("one.example")))
	}
	for _, c := range all {
		io.WriteString(c, "ping")
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || !bytes.Equal(b, []byte("ping")) {
			t.Fatalf("%q, %v", b, err)
		}
	}
}
