package proxyproto_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/proxyproto"
	"sniproxy/sni"
)

// A connection is what goes into a header of version 2, and what a receiver reads from it.
type connection struct{ client, listener, authority, want string }

// connections returns connections of each kind, also without and with a long authority.
func connections() []connection {
	long := strings.Repeat(strings.Repeat("a", 62)+".", 4) + "bc" // as long as can be
	return []connection{
		{"192.0.2.1:56324", "198.51.100.2:443", "site.example", "192.0.2.1 56324 198.51.100.2 443 site.example"},
		{"192.0.2.1:56324", "198.51.100.2:443", "", "192.0.2.1 56324 198.51.100.2 443 "},
		{"192.0.2.1:56324", "198.51.100.2:443", long, "192.0.2.1 56324 198.51.100.2 443 " + long},
		{"[2001:db8::1]:1", "[2001:db8::ff00:2]:65535", "site.example", "2001:db8::1 1 2001:db8::ff00:2 65535 site.example"},
		{"[2001:db8::1]:1", "[2001:db8::ff00:2]:65535", "", "2001:db8::1 1 2001:db8::ff00:2 65535 "},
		{"[2001:db8::1]:1", "[2001:db8::ff00:2]:65535", long, "2001:db8::1 1 2001:db8::ff00:2 65535 " + long},
		{"[::ffff:192.0.2.1]:2", "[::ffff:198.51.100.2]:443", "site.example", "192.0.2.1 2 198.51.100.2 443 site.example"},
		{"[fe80::1%eth0]:3", "[fe80::2%eth0]:443", "site.example", "fe80::1 3 fe80::2 443 site.example"},
	}
}

func (c connection) header() []byte {
	return proxyproto.AppendV2(nil, netip.MustParseAddrPort(c.client), netip.MustParseAddrPort(c.listener), []byte(c.authority))
}

// Goal: HAProxy learns from the header who the client is and what it asked for.
func TestV2HAProxy(t *testing.T) {
	haproxy := hostdirtest.Need(t, "haproxy")
	t.Chdir(t.TempDir())
	serve(t, `
defaults
	mode http
	timeout connect 30s
	timeout client 30s
	timeout server 30s
frontend site
	bind unix@socket accept-proxy
	http-request return content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority]"
`, haproxy, "-db", "-f", "config")
	for _, c := range connections() {
		if got, err := get(c.header()); got != c.want || err != nil {
			t.Errorf("client %s: HAProxy read %q, %v, want %q", c.client, got, err, c.want)
		}
	}
}

// Goal: nginx learns from the header who the client is and, if it is not too old, what it asked
// for.
func TestV2Nginx(t *testing.T) {
	nginx := hostdirtest.Need(t, "nginx")
	t.Chdir(t.TempDir())

	authority := "$proxy_protocol_tlv_authority"
	if old(t, nginx) {
		authority = ""
	}
	// One process, which belongs to the user who runs the test.
	serve(t, `
daemon off;
master_process off;
error_log stderr;
pid pid;
events {}
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	server {
		listen unix:socket proxy_protocol;
		return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port `+authority+`";
	}
}
`, nginx, "-p", ".", "-e", "stderr", "-c", "config")
	for _, c := range connections() {
		if authority == "" {
			c.want = strings.TrimSuffix(c.want, c.authority)
		}
		if got, err := get(c.header()); got != c.want || err != nil {
			t.Errorf("client %s: nginx read %q, %v, want %q", c.client, got, err, c.want)
		}
	}
}

// old reports whether nginx is older than 1.23.2, which is the first version with variables for
// what follows the addresses.
func old(t *testing.T, nginx string) bool {
	t.Helper()
	out, err := exec.Command(nginx, "-v").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var major, minor, patch int
	if _, err := fmt.Sscanf(string(out), "nginx version: nginx/%d.%d.%d", &major, &minor, &patch); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return major < 1 || major == 1 && (minor < 23 || minor == 23 && patch < 2)
}

// serve starts a server program with the configuration in the working directory, and waits until it
// accepts connections on the socket there.
func serve(t *testing.T, config, program string, args ...string) {
	t.Helper()
	if err := os.WriteFile("config", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	var out hostdirtest.Lines
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("%s printed:\n%s", program, &out)
		}
	})

	hostdirtest.Await(t, program+" to listen", func() bool {
		select {
		case <-exited:
			t.Fatalf("%s has ended", program)
		default:
		}
		c, err := net.Dial("unix", "socket")
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// get sends a request with the header before it, in one write, and returns the page.
func get(header []byte) (string, error) {
	c, err := net.Dial("unix", "socket")
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if _, err := c.Write(append(header, "GET / HTTP/1.1\r\nHost: site.example\r\nConnection: close\r\n\r\n"...)); err != nil {
		return "", err
	}
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	page, err := io.ReadAll(response.Body)
	return string(page), err
}

// buildReader builds a program around a Go parser of somebody else, and returns its path.
func buildReader(t testing.TB) string {
	const (
		module  = "github.com/pires/go-proxyproto"
		version = "v0.15.0"
	)
	goTool := hostdirtest.Need(t, "go")
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module reader\n\ngo 1.26\n", "main.go": reader} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) error {
		cmd := exec.Command(goTool, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Logf("go %s: %v\n%s", args, err, out)
		}
		return err
	}
	// Only tests use the module, so it is not in go.mod. It may not be available.
	if run("get", module+"@"+version) != nil {
		hostdirtest.Missing(t, module)
	}
	if run("build", "-o", "reader", ".") != nil {
		t.FailNow()
	}
	return filepath.Join(dir, "reader")
}

// Goal: a Go parser of somebody else reads thousands of headers, one behind the other, to the byte.
func TestV2GoProxyproto(t *testing.T) {
	program := buildReader(t)

	all := connections()
	random := rand.New(rand.NewPCG(1, 2))
	addr := func(size int) netip.AddrPort {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		a, _ := netip.AddrFromSlice(b)
		return netip.AddrPortFrom(a, uint16(random.Uint32()))
	}
	for range 2000 {
		size := 4 + 12*random.IntN(2)
		client, listener := addr(size), addr(size)
		authority := strings.Repeat("x", random.IntN(sni.MaxName+1))
		all = append(all, connection{client.String(), listener.String(), authority, fmt.Sprint(
			client.Addr(), " ", client.Port(), " ", listener.Addr(), " ", listener.Port(), " ", authority)})
	}
	var stream []byte
	for _, c := range all {
		stream = append(stream, c.header()...)
	}
	cmd := exec.Command(program)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(stream), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(got) != len(all) {
		t.Fatalf("%d headers were read, want %d", len(got), len(all))
	}
	for i, c := range all {
		if got[i] != c.want {
			t.Errorf("client %s: it read %q, want %q", c.client, got[i], c.want)
		}
	}
}

// Goal: Parse and the Go parser of somebody else agree on what a header is, where it ends, and what
// addresses are in it, but for what is known here.
func FuzzParseGoProxyproto(f *testing.F) {
	for _, test := range headers {
		f.Add([]byte(test.header + "more"))
		f.Add([]byte(test.header[:len(test.header)-1]))
	}
	for _, header := range []string{
		"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "PROXY TCP6 192.0.2.1 ::1 1 2\r\n", "PROXY TCP6 fe80::1%a ::1 1 2\r\n", "PROXY\r\n",
		v2(0x21, 0x12, addrs4), v2(0x21, 0x13, addrs4), v2(0x22, 0, ""), v2(0x21, 0x11, addrs4[1:]),
	} {
		f.Add([]byte(header))
	}
	cmd := exec.Command(buildReader(f), "each")
	in, err := cmd.StdinPipe()
	hostdirtest.Must(f, err)
	out, err := cmd.StdoutPipe()
	hostdirtest.Must(f, err)
	cmd.Stderr = os.Stderr
	hostdirtest.Must(f, cmd.Start())
	f.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	answers := bufio.NewReader(out)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), 2*proxyproto.MaxParse)]
		if _, err := in.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
			t.Fatal(err)
		}
		theirs, err := answers.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		theirs = strings.TrimSuffix(theirs, "\n")
		h, n, err := proxyproto.Parse(b)
		ours := "none"
		switch {
		case n > 0 && h.Client.IsValid():
			ours = fmt.Sprint(n, " ", h.Client, " ", h.Listener)
		case n > 0:
			ours = fmt.Sprint(n, " local")
		}
		switch {
		case ours == theirs:
		case ours == "none" && bytes.HasPrefix(b, []byte("PROXY UNKNOWN ")) && strings.HasSuffix(theirs, " local") &&
			bytes.Contains(b[:bytes.IndexByte(b, '\n')-1], []byte{'\r'}): // a CR within the line
		case ours == "none" && len(b) > 13 && (b[13] == 0x12 || b[13] == 0x22): // UDP
		case theirs == "none" && len(b) > 13 && b[0] == '\r' && b[12] == 0x20: // LOCAL, "including the family which is ignored"
		case theirs == "none" && len(b) > 13 && b[0] == '\r' && b[13] == 0: // UNSPEC, which a receiver may accept
		default:
			t.Errorf("%q: %s and error %v here, %s there", b, ours, err, theirs)
		}
	})
}

// reader prints a line for each header of version 2 that it reads, one behind the other. With an
// argument it is given beginnings of connections, each behind its length, and says of each what is
// in its header, of either version.
const reader = `package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"

	"github.com/pires/go-proxyproto"
)

func main() {
	in := bufio.NewReader(os.Stdin)
	if len(os.Args) > 1 {
		each(in)
		return
	}
	for {
		if _, err := in.Peek(1); err != nil {
			return
		}
		header, err := proxyproto.Read(in)
		if err != nil {
			log.Fatal(err)
		}
		client, listener, ok := header.TCPAddrs()
		if !ok || header.Version != 2 || !header.Command.IsProxy() {
			log.Fatalf("not for a connection over TCP: %+v", header)
		}
		tlvs, err := header.TLVs()
		if err != nil {
			log.Fatal(err)
		}
		var authority []byte
		for i, tlv := range tlvs {
			if i > 0 || tlv.Type != proxyproto.PP2_TYPE_AUTHORITY {
				log.Fatalf("unexpected: %+v", tlvs)
			}
			authority = tlv.Value
		}
		fmt.Printf("%v %d %v %d %s\n", client.IP, client.Port, listener.IP, listener.Port, authority)
	}
}

func each(in io.Reader) {
	for {
		var length uint32
		if err := binary.Read(in, binary.BigEndian, &length); err != nil {
			return
		}
		b := make([]byte, length)
		if _, err := io.ReadFull(in, b); err != nil {
			log.Fatal(err)
		}
		rest := bytes.NewReader(b)
		buffered := bufio.NewReaderSize(rest, len(b)+1)
		header, err := proxyproto.Read(buffered)
		if err != nil {
			fmt.Println("none")
			continue
		}
		n := len(b) - rest.Len() - buffered.Buffered()
		client, listener, ok := header.TCPAddrs()
		if !ok || header.Command.IsLocal() {
			fmt.Println(n, "local")
			continue
		}
		fmt.Println(n, unmap(client), unmap(listener))
	}
}

func unmap(a *net.TCPAddr) netip.AddrPort {
	p := a.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
`
