package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// headerV2 returns the header that a backend with send-proxy-v2 must get, from Section 2.2 of the
// specification.
func headerV2(client, listener netip.AddrPort, name string) []byte {
	var rest []byte
	family := byte(0x11)
	if client.Addr().Is6() {
		family = 0x21
	}
	rest = append(rest, client.Addr().AsSlice()...)
	rest = append(rest, listener.Addr().AsSlice()...)
	rest = binary.BigEndian.AppendUint16(rest, client.Port())
	rest = binary.BigEndian.AppendUint16(rest, listener.Port())
	if name != "" {
		rest = append(rest, 0x02) // PP2_TYPE_AUTHORITY
		rest = binary.BigEndian.AppendUint16(rest, uint16(len(name)))
		rest = append(rest, name...)
	}
	header := []byte("\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A\x21")
	header = append(header, family)
	header = binary.BigEndian.AppendUint16(header, uint16(len(rest)))
	return append(header, rest...)
}

// expectFirst fails the test unless the first read of a backend that is like firstRead gives
// the header for the client, and with it all that the client has sent.
func (d *daemon) expectFirst(what string, sent []byte, header func(client, listener netip.AddrPort) []byte) {
	d.t.Helper()
	c := d.dial()
	defer c.Close()
	if _, err := c.Write(sent); err != nil {
		d.t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	want := append(header(localAddr(c), c.RemoteAddr().(*net.TCPAddr).AddrPort()), sent...)
	if err != nil || !bytes.Equal(got, want) {
		d.t.Errorf("%s: the first read gave %.400q (%d bytes), error %v, want %.400q (%d bytes)", what, got, len(got), err, want, len(want))
	}
}

// v2For returns what makes the header of a client that asked for a name.
func v2For(name string) func(client, listener netip.AddrPort) []byte {
	return func(client, listener netip.AddrPort) []byte { return headerV2(client, listener, name) }
}

// onFamilies runs a test with a daemon for each kind of address that clients and listeners can
// have.
func onFamilies(t *testing.T, test func(t *testing.T, d *daemon)) {
	for _, tt := range []struct{ network, listener, client string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1"},
		{"tcp4", "0.0.0.0:0", "127.0.0.1"},
		{"tcp6", "[::1]:0", "::1"},
		{"tcp", "[::]:0", "127.0.0.1"},
		{"tcp", "[::]:0", "::1"},
	} {
		t.Run(fmt.Sprintf("%s %s from %s", tt.network, tt.listener, tt.client), func(t *testing.T) {
			if tt.network != "tcp4" {
				hostdirtest.NeedIPv6(t)
			}
			l := hostdirtest.ListenTCP(t, tt.network, tt.listener)
			d := startOn(t, l, hostdirtest.Dir(t))
			d.addr = net.JoinHostPort(tt.client, fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
			test(t, d)
		})
	}
}

// Goal: with send-proxy-v2, of any kind of file, the backend gets the header of version 2, exact to
// the byte, with the canonical name, and the hello in the same write. It does so if there is a
// send-proxy-v1 as well, which alone gives a header of version 1.
func TestProxyV2(t *testing.T) {
	markers := map[string]func(path string) error{
		"empty file":       func(path string) error { return os.WriteFile(path, nil, 0) },
		"text":             func(path string) error { return os.WriteFile(path, []byte("no"), 0o644) },
		"directory":        func(path string) error { return os.Mkdir(path, 0) },
		"dangling symlink": func(path string) error { return os.Symlink("nowhere", path) },
		"symlink loop":     func(path string) error { return os.Symlink("send-proxy-v2", path) },
		"FIFO":             func(path string) error { return unix.Mkfifo(path, 0) },
	}
	onFamilies(t, func(t *testing.T, d *daemon) {
		for what, mark := range markers {
			name := strings.ReplaceAll(strings.ToLower(what), " ", "_") + ".example"
			d.serve(name, firstRead)
			hostdirtest.Must(t, mark(d.hostPath(name, "send-proxy-v2")))
			for range 5 {
				d.expectFirst(what, sayHello(name), v2For(name))
				d.expectFirst(what, snitest.Hello(strings.ToUpper(name)), v2For(name))
			}
			hostdirtest.Must(t, mark(d.hostPath(name, "send-proxy-v1")))
			d.expectFirst(what+", both", sayHello(name), v2For(name))
			hostdirtest.Must(t, os.RemoveAll(d.hostPath(name, "send-proxy-v2")))
			d.expectFirst(what+", version 1 left", sayHello(name), func(client, listener netip.AddrPort) []byte {
				family := "TCP4"
				if client.Addr().Is6() {
					family = "TCP6"
				}
				return fmt.Appendf(nil, "PROXY %s %v %v %d %d\r\n", family, client.Addr(), listener.Addr(), client.Port(), listener.Port())
			})
			hostdirtest.Must(t, os.RemoveAll(d.hostPath(name, "send-proxy-v1")))
			d.expectFirst(what+", none left", sayHello(name), func(netip.AddrPort, netip.AddrPort) []byte { return nil })
		}
	})
}

// Goal: the header has the name that the client asked for, in lower case, also if it is as long as
// names get, and if a wildcard or * serves it, whose marker then counts. For a client that named no
// host the header has no name.
func TestProxyV2Names(t *testing.T) {
	onFamilies(t, func(t *testing.T, d *daemon) {
		for _, entry := range []string{"exact.example", "*.example", "*"} {
			d.serve(entry, firstRead)
		}
		none := func(netip.AddrPort, netip.AddrPort) []byte { return nil }
		long := strings.Repeat(strings.Repeat("a", 62)+".", 4) + "bc"
		if len(long) != 254 || len(headerV2(netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.1:1"), long)) != 16+12+3+254 {
			t.Fatal("the test does not measure what it means to")
		}
		for _, marked := range []string{"", "*", "*.example", "exact.example"} {
			if marked != "" {
				hostdirtest.Touch(t, d.hostPath(marked, "send-proxy-v2"))
			}
			for name, entry := range map[string]string{
				"exact.example": "exact.example", "a.example": "*.example", "_a-.example": "*.example",
				"b": "*", "a.b.example": "*", long: "*", "": "*",
			} {
				header := none
				if entry == marked {
					header = v2For(name)
				}
				what := fmt.Sprintf("%q, marker in %q", name, marked)
				if name == "" {
					d.expectFirst(what, snitest.Hello(""), header)
					continue
				}
				d.expectFirst(what, sayHello(name), header)
				d.expectFirst(what, sayHello(strings.ToUpper(name)), header)
			}
			if marked != "" {
				hostdirtest.Must(t, os.Remove(d.hostPath(marked, "send-proxy-v2")))
			}
		}
	})
}

// Goal: the header comes once, before all bytes of the client, however the hello is cut and
// whatever follows it.
func TestProxyV2First(t *testing.T) {
	d := start(t)
	d.serve("a.example", func(c *net.UnixConn) { io.Copy(c, c) })
	hostdirtest.Touch(t, d.hostPath("a.example", "send-proxy-v2"))
	bulk := randomBytes(300_000)
	for _, piece := range []int{1 << 20, 100, 1} {
		for _, following := range [][]byte{nil, []byte("and more"), bulk} {
			if piece < 100 && len(following) == len(bulk) {
				continue
			}
			sent := append(snitest.Records(snitest.Named("A.example").Bytes, 10), following...)
			c := d.dial()
			go func() {
				for i := 0; i < len(sent); i += piece {
					c.Write(sent[i:min(i+piece, len(sent))])
				}
				c.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			want := append(headerV2(localAddr(c), c.RemoteAddr().(*net.TCPAddr).AddrPort(), "a.example"), sent...)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("pieces of %d, %d bytes after the hello: got %.80q (%d bytes), error %v, want %.80q (%d bytes)",
					piece, len(following), got, len(got), err, want, len(want))
			}
			c.Close()
		}
	}
}

// Goal: servers that require the PROXY header accept version 2, also for clients that named no
// host. They learn the real addresses of the client's connection from it and, if they can, the
// name.
func TestProxyV2Backends(t *testing.T) {
	for _, tt := range []struct {
		name      string
		config    string // of the socket, a certificate with its key, and a directory
		args      []string
		authority string // what is in the configuration for the name
		since     version
		most      int     // bytes of a header that it takes
		unlimited version // since which it takes all
	}{
		{"nginx", nginxConfig, []string{"-e", "stderr", "-c"}, " $proxy_protocol_tlv_authority", version{1, 23, 2}, 108, version{1, 23, 3}},
		{"haproxy", haproxyConfig, []string{"-db", "-f"}, " %%[fc_pp_authority]", version{}, 0, version{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := versionOf(t, tt.name)
			ca := newAuthority(t)
			hosts := hostdirtest.Dir(t)
			config, known := tt.config, !now.before(tt.since)
			if known {
				for _, last := range []string{"$proxy_protocol_server_port", "%%[dst_port]"} {
					config = strings.Replace(config, last+`"`, last+tt.authority+`"`, 1)
				}
			}
			socket := hostPath(t, hosts, "*", "tls-socket")
			file := writeFile(t, "config", fmt.Appendf(nil, config, socket, pemFile(t, ca.issue(t, "site.example")), t.TempDir()))
			startBackend(t, socket, tt.name, append(tt.args, file)...)
			for _, marker := range []string{"send-proxy-v1", "send-proxy-v2"} {
				hostdirtest.Touch(t, hostPath(t, hosts, "*", marker))
			}
			for _, on := range []struct{ listener, network, addr, client string }{
				{"IPv4", "tcp4", "127.0.0.1:0", "127.0.0.1"},
				{"IPv6", "tcp6", "[::1]:0", "::1"},
				{"dual-stack, IPv4", "tcp", "[::]:0", "127.0.0.1"},
			} {
				t.Run(on.listener, func(t *testing.T) {
					if on.network != "tcp4" {
						hostdirtest.NeedIPv6(t)
					}
					l := hostdirtest.ListenTCP(t, on.network, on.addr)
					startOn(t, l, hosts)
					_, port, _ := net.SplitHostPort(l.Addr().String())
					longest := 254
					if now.before(tt.unlimited) {
						longest = tt.most - len(headerV2(netip.AddrPortFrom(netip.MustParseAddr(on.client), 1), netip.AddrPortFrom(netip.MustParseAddr(on.client), 1), "")) - 3
					}
					long := strings.Repeat("a", longest-len(".example")) + ".example"
					for name, authority := range map[string]string{"site.example": "site.example", "SITE.Example": "site.example", long: long, "": ""} {
						got, c, err := getAs(name, net.JoinHostPort(on.client, port))
						if err != nil {
							t.Errorf("name %q: %v", name, err)
							continue
						}
						client, listener := c.LocalAddr().(*net.TCPAddr), c.RemoteAddr().(*net.TCPAddr)
						want := fmt.Sprint(client.IP, " ", client.Port, " ", listener.IP, " ", listener.Port)
						if known {
							want += " " + authority
						}
						if strings.TrimSpace(got) != strings.TrimSpace(want) {
							t.Errorf("name %q: the backend was told %q, want %q", name, got, want)
						}
					}
				})
			}
		})
	}
}

// A version is that of a program.
type version [3]int

func (v version) before(w version) bool { return slices.Compare(v[:], w[:]) < 0 }

// versionOf returns the version of a program, which must be installed.
func versionOf(t *testing.T, program string) (v version) {
	t.Helper()
	out, err := exec.Command(hostdirtest.Need(t, program), "-v").CombinedOutput()
	m := regexp.MustCompile(`[ /](\d+)\.(\d+)\.(\d+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%s -v: %q, error %v", program, out, err)
	}
	for i := range v {
		v[i], _ = strconv.Atoi(string(m[1+i]))
	}
	return v
}

// getAs returns the page that a client gets that asks for a host or, if name is empty, names
// none, and its connection, which is closed. Whose certificate it is does not matter.
func getAs(name, addr string) (page string, c *tls.Conn, err error) {
	return getWith(addr, &tls.Config{ServerName: name, InsecureSkipVerify: true})
}
