package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: servers that require the PROXY header accept ours, and learn the real addresses of the
// client's connection from it.
func TestProxyHeaderBackends(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		config string // of the socket, a certificate with its key, and a directory
		args   []string
	}{
		{"nginx", nginxConfig, []string{"-e", "stderr", "-c"}},
		{"haproxy", haproxyConfig, []string{"-db", "-f"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			hostdirtest.Need(t, tt.name)
			ca := newAuthority(t)
			hosts := hostdirtest.Dir(t)
			socket := hostPath(t, hosts, "site.example", "tls-socket")
			config := writeFile(t, "config", fmt.Appendf(nil, tt.config, socket, pemFile(t, ca.issue(t, "site.example")), t.TempDir()))
			startBackend(t, socket, tt.name, append(tt.args, config)...)

			l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
			startOn(t, l, hosts)
			if got, c, err := get(t, ca, l.Addr().String()); err == nil {
				t.Fatalf("without the header, %v was told %q: the backend does not require it", c, got)
			}
			hostdirtest.Must(t, os.WriteFile(filepath.Join(filepath.Dir(socket), "send-proxy-v1"), nil, 0o644))

			for _, tt := range []struct{ listener, network, addr, client string }{
				{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
				{"IPv6", "tcp6", "[::1]:0", "::1"},
				{"dual-stack, IPv4", "tcp", "[::]:0", "127.0.0.1"},
				{"dual-stack, IPv6", "tcp", "[::]:0", "::1"},
			} {
				t.Run(tt.listener, func(t *testing.T) {
					if tt.network != "tcp4" {
						hostdirtest.NeedIPv6(t)
					}
					l := hostdirtest.ListenTCP(t, tt.network, tt.addr)
					startOn(t, l, hosts)
					_, port, _ := net.SplitHostPort(l.Addr().String())
					got, c, err := get(t, ca, net.JoinHostPort(tt.client, port))
					if err != nil {
						t.Fatal(err)
					}
					client, listener := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
					want := fmt.Sprint(client.IP, " ", client.Port, " ", listener.IP, " ", listener.Port)
					if got != want {
						t.Errorf("the backend was told %q, want %q", got, want)
					}
				})
			}
		})
	}
}

// nginx runs as one process, of the user that runs the test.
const nginxConfig = `
daemon off;
master_process off;
error_log stderr;
pid %[3]s/pid;
events {}
http {
	access_log off;
	client_body_temp_path %[3]s/body;
	proxy_temp_path %[3]s/proxy;
	fastcgi_temp_path %[3]s/fastcgi;
	uwsgi_temp_path %[3]s/uwsgi;
	scgi_temp_path %[3]s/scgi;
	server {
		listen unix:%[1]s ssl proxy_protocol;
		ssl_certificate %[2]s;
		ssl_certificate_key %[2]s;
		return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port";
	}
}
`

const haproxyConfig = `
defaults
	mode http
	timeout connect 30s
	timeout client 30s
	timeout server 30s
frontend site
	bind unix@%[1]s mode 666 accept-proxy ssl crt %[2]s
	http-request return content-type text/plain lf-string "%%[src] %%[src_port] %%[dst] %%[dst_port]"
`

// get returns the page that a client gets, and the client's connection, which is closed.
func get(t testing.TB, ca *authority, addr string) (page string, c *tls.Conn, err error) {
	t.Helper()
	return getWith(addr, &tls.Config{ServerName: "site.example", RootCAs: ca.pool})
}

func getWith(addr string, config *tls.Config) (page string, c *tls.Conn, err error) {
	c, err = tls.DialWithDialer(&net.Dialer{Timeout: hostdirtest.Patience}, "tcp", addr, config)
	if err != nil {
		return "", nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: site.example\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", c, err
	}
	body, err := io.ReadAll(response.Body)
	return string(body), c, err
}
