package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// behind returns the daemon as clients of a balancer in front of it see it.
func (d *daemon) behind(balancer string) *daemon {
	return &daemon{t: d.t, cmd: d.cmd, dir: d.dir, addr: balancer, out: d.out, err: d.err, exited: d.exited}
}

// freeAddr returns an address that nobody listens on.
func freeAddr(t testing.TB, ip string) string {
	t.Helper()
	return net.JoinHostPort(ip, strconv.Itoa(hostdirtest.FreePort(t, ip)))
}

// awaitListener waits until somebody listens at an address, which that may take for a client that
// sends nothing.
func awaitListener(t testing.TB, what, addr string) {
	t.Helper()
	hostdirtest.Await(t, what+" to listen", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// expectFront fails the test unless the hosts of frontHosts, and the log, see clients that come
// through a balancer as they are.
func (d *daemon) expectFront(balancer string) {
	d.t.Helper()
	b := d.behind(balancer)
	for version := range 3 {
		name := fmt.Sprintf("v%d.example", version)
		for range 3 {
			var client netip.AddrPort
			b.expectFirst(name, sayHello(name), func(c, listener netip.AddrPort) []byte {
				client = c
				return headerFor(version, c, listener, name)
			})
			d.err.Await(d.t, fmt.Sprintf("served %v for %s: ", client, name))
		}
	}
	b.expectAlert(snitest.Hello("no.example"), 112)
	d.serve("echo.example", hostdirtest.Echo)
	more := randomBytes(500_000)
	c := b.dial()
	go func() {
		c.Write(append(snitest.Hello("echo.example"), more...))
		c.CloseWrite()
	}()
	if got, err := io.ReadAll(c); !bytes.Equal(got, more) || err != nil {
		d.t.Errorf("%d bytes came back, error %v, want %d", len(got), err, len(more))
	}
	c.Close()
}

// expectChecks fails the test unless health checks of a balancer are counted, and nothing but the
// one client of expectFront was refused.
func (d *daemon) expectChecks(least int) {
	d.t.Helper()
	before := d.counters().empty
	hostdirtest.Await(d.t, "health checks", func() bool { return d.counters().empty >= before+least })
	if got := d.counters().refused; got != "112: 1" {
		d.t.Errorf("refused %q, want the one client", got)
	}
	if n := strings.Count(d.err.String(), "sniproxy: refused "); n != 1 {
		d.t.Errorf("%d lines about refused clients, want 1:\n%s", n, d.err)
	}
}

// Goal: behind HAProxy, which sends either version and checks the daemon's health in each way that
// it knows, the daemon sees the clients' addresses, and the checks leave no line.
func TestBehindHAProxy(t *testing.T) {
	hostdirtest.Need(t, "haproxy")
	for _, options := range []string{
		"send-proxy check",
		"send-proxy-v2 check",
		"send-proxy-v2 proxy-v2-options crc32c,unique-id check", // with TLVs
		"send-proxy-v2 check check-send-proxy port PORT",
		"send-proxy check port PORT", // without a header
		"send-proxy-v2 check check-send-proxy check-sni v0.example check-ssl verify none",
	} {
		t.Run(options, func(t *testing.T) {
			t.Parallel()
			d := startFront(t)
			d.frontHosts()
			_, port, _ := net.SplitHostPort(d.addr)
			addr := freeAddr(t, "127.0.0.1")
			config := writeFile(t, "haproxy.cfg", fmt.Appendf(nil, `
defaults
	mode tcp
	timeout connect 30s
	timeout client 30s
	timeout server 30s
	unique-id-format %%{+X}o\ %%ci:%%cp
listen front
	bind %s
	server sniproxy %s %s inter 50
`, addr, d.addr, strings.Replace(options, "PORT", port, 1)))
			haproxy := spawn(t, t.TempDir(), "haproxy", "-db", "-f", config)
			awaitListener(t, "haproxy", addr)
			if strings.Contains(options, "check-ssl") { // then a check asks for a host, as any client
				hostdirtest.Await(t, "a check that was served", func() bool { return strings.Contains(d.err.String(), " for v0.example: ") })
				return
			}
			d.expectFront(addr)
			if strings.Contains(options, "send-proxy check port") {
				d.expectChecks(0) // HAProxy resets what it has not acknowledged, so nobody sees these
			} else {
				d.expectChecks(5)
			}
			if out := haproxy.out.String(); strings.Contains(out, "DOWN") {
				t.Errorf("haproxy says %s", out)
			}
		})
	}
}

// Goal: behind nginx with proxy_protocol the daemon sees the clients' addresses.
func TestBehindNginx(t *testing.T) {
	hostdirtest.Need(t, "nginx")
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		hostdirtest.Missing(t, "nginx's stream module")
	}
	d := startFront(t)
	d.frontHosts()
	addr := freeAddr(t, "127.0.0.1")
	config := writeFile(t, "nginx.conf", fmt.Appendf(nil, `
load_module %s;
daemon off;
master_process off;
pid %s/pid;
events {}
stream {
	server {
		listen %s;
		proxy_pass %s;
		proxy_protocol on;
		proxy_half_close on;
	}
}
`, module, t.TempDir(), addr, d.addr))
	spawn(t, t.TempDir(), "nginx", "-e", "stderr", "-c", config)
	awaitListener(t, "nginx", addr)
	d.expectFront(addr)
	hostdirtest.Await(t, "the client that sent nothing to be counted", func() bool { return d.counters().empty >= 1 })
	d.expectChecks(0)
}

// Goal: of two daemons in a row over TCP, where a host of the first is a forwarder, the second sees
// the clients' addresses, if the first sends them and the second reads them. A third one in
// between, which does both, passes them on. It does not matter whether the last hands connections
// over.
func TestTwoInARow(t *testing.T) {
	hostdirtest.Need(t, "socat")
	last := startFront(t)
	last.frontHosts()
	for _, marker := range []string{"send-proxy-v1", "send-proxy-v2"} {
		t.Run(marker, func(t *testing.T) {
			first, middle := start(t), startFront(t)
			for _, hop := range []struct{ from, to *daemon }{{first, middle}, {middle, last}} {
				path := hop.from.hostPath("*", "tls-socket")
				hostdirtest.Touch(t, hop.from.hostPath("*", marker))
				spawn(t, filepath.Dir(path), "socat", "-t", "3600", "UNIX-LISTEN:"+path+",fork,mode=0666,backlog=100", "TCP:"+hop.to.addr)
				hostdirtest.AwaitListening(t, path)
			}
			last.t = t
			last.expectFront(first.addr)
			for version := range 3 {
				name := fmt.Sprintf("handed%d.example", version)
				l := last.bindDatagram(name)
				if version > 0 {
					hostdirtest.Touch(t, last.hostPath(name, fmt.Sprintf("send-proxy-v%d", version)))
				}
				c := first.dial()
				hello := sayHello(name)
				say(t, c, hello)
				end, b := receive(t, l)
				want := append(headerFor(version, localAddr(c), c.RemoteAddr().(*net.TCPAddr).AddrPort(), name), hello...)
				if !bytes.Equal(b, want) {
					t.Errorf("the backend was handed %q, want %q", b, want)
				}
				ping(t, c, end)
				ping(t, end, c)
				hostdirtest.Must(t, os.RemoveAll(last.hostDir(name)))
			}
			hostdirtest.Must(t, os.RemoveAll(last.hostDir("echo.example")))
		})
	}
}
