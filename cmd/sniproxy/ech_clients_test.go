package main

import (
	"bytes"
	"crypto/ecdh"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/ech"
)

// publicName is the name that the network sees in place of hidden ones.
const publicName = "public.example"

// newECHKey makes a key for Encrypted Client Hello.
func newECHKey(t testing.TB) *ech.Key {
	t.Helper()
	key, err := ech.GenerateKey(publicName)
	hostdirtest.Must(t, err)
	return key
}

// echKeys gives a daemon key files before it starts.
func echKeys(t testing.TB, files ...[]byte) setup {
	return func(cmd *exec.Cmd) {
		dir := filepath.Join(cmd.Dir, ".ech")
		hostdirtest.Must(t, os.Mkdir(dir, 0o700))
		for i, file := range files {
			hostdirtest.Must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.pem", i)), file, 0o600))
		}
	}
}

// shared returns a key as crypto/tls takes it, which in shared mode opens hellos itself.
func shared(t testing.TB, key *ech.Key) tls.EncryptedClientHelloKey {
	t.Helper()
	block, _ := pem.Decode(key.MarshalPEM())
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	hostdirtest.Must(t, err)
	return tls.EncryptedClientHelloKey{Config: key.ConfigList()[2:], PrivateKey: private.(*ecdh.PrivateKey).Bytes(), SendAsRetry: true}
}

// A tap is the network in front of a daemon: it passes connections on, and keeps what clients send.
type tap struct {
	addr string
	hold bool // to hold back the answers of all connections but the first, until they have early data

	mu   sync.Mutex
	sent []*tapped
}

// tapped is what a client has sent.
type tapped struct {
	mu    sync.Mutex
	bytes []byte
	early chan struct{} // closed once there is application data in it
}

func (d *daemon) tap(hold bool) *tap {
	d.t.Helper()
	l := hostdirtest.ListenTCP(d.t, "tcp4", "127.0.0.1:0")
	tp := &tap{addr: l.Addr().String(), hold: hold}
	go func() {
		for {
			client, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go tp.pass(client, d.addr)
		}
	}()
	return tp
}

func (tp *tap) pass(client *net.TCPConn, addr string) {
	defer client.Close()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return
	}
	defer c.Close()
	kept := &tapped{early: make(chan struct{})}
	tp.mu.Lock()
	tp.sent = append(tp.sent, kept)
	hold := tp.hold && len(tp.sent) > 1
	tp.mu.Unlock()
	go func() {
		io.Copy(c, io.TeeReader(client, kept))
		c.(*net.TCPConn).CloseWrite()
	}()
	if hold {
		<-kept.early
	}
	io.Copy(client, c)
}

// Write keeps what a client sends.
func (k *tapped) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.bytes = append(k.bytes, b...)
	for rest := k.bytes; len(rest) >= 5; {
		const applicationData = 23
		if rest[0] == applicationData {
			select {
			case <-k.early:
			default:
				close(k.early)
			}
		}
		rest = rest[min(len(rest), 5+int(rest[3])<<8+int(rest[4])):]
	}
	return len(b), nil
}

// expectHidden fails the test if anybody on the network has seen a name other than the public one.
func (tp *tap) expectHidden(t testing.TB) {
	t.Helper()
	tp.mu.Lock()
	defer tp.mu.Unlock()
	if len(tp.sent) == 0 {
		t.Error("nobody has connected")
	}
	for _, k := range tp.sent {
		k.mu.Lock()
		if name, _, err := hostdirtest.ReadHello(bytes.NewReader(k.bytes)); name != publicName && len(k.bytes) > 0 {
			t.Errorf("the network has seen %q, error %v", name, err)
		}
		if bytes.Contains(k.bytes, []byte("hidden")) {
			t.Error("the network has seen the hidden name")
		}
		k.mu.Unlock()
	}
}

// forward passes a connection on to an address, as for a backend that has no Unix socket. It tries
// until somebody listens there.
func forward(addr string) func(*net.UnixConn) {
	return func(c *net.UnixConn) {
		var to net.Conn
		if !hostdirtest.AwaitFor(hostdirtest.Patience, func() (ok bool) {
			var err error
			to, err = net.Dial("tcp", addr)
			return err == nil
		}) {
			return // the client says it
		}
		defer to.Close()
		go func() {
			io.Copy(to, c)
			to.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(c, to)
	}
}

// Goal: BoringSSL and NSS as clients, and crypto/tls and BoringSSL as backends without a key, agree
// on Encrypted Client Hello in split mode; also across a HelloRetryRequest, with early data that
// the backend accepts, and with early data that it rejects by a HelloRetryRequest. The network sees
// the public name alone. The key files are ours, and one made by BoringSSL.
func TestECHClients(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	cert := ca.issue(t, "hidden.example")
	certFile := pemFile(t, cert)
	for _, tt := range []struct {
		backend string
		retry   bool
	}{
		{"crypto/tls", false},
		{"crypto/tls", true},
		{"bssl-tool", false},
		{"bssl-tool", true},
	} {
		t.Run(fmt.Sprintf("%s, retry %t", tt.backend, tt.retry), func(t *testing.T) {
			t.Parallel()
			bssl := hostdirtest.Need(t, "bssl-tool")
			key := newECHKey(t)
			file, list := bsslKey(t)
			d := start(t, echKeys(t, key.MarshalPEM(), file))
			d.logAll()
			switch tt.backend {
			case "crypto/tls":
				list = key.ConfigList()
				config := &tls.Config{Certificates: []tls.Certificate{cert}}
				if tt.retry {
					retry(config)
				}
				d.serveHTTPS("hidden.example", config)
			default:
				addr := freeAddr(t, "127.0.0.1")
				_, port, _ := net.SplitHostPort(addr)
				args := []string{"server", "-accept", port, "-key", certFile, "-early-data", "-loop", "-www"}
				if tt.retry {
					args = append(args, "-curves", "P-384")
				}
				spawn(t, "", bssl, args...)
				d.serve("hidden.example", forward(addr))
			}
			group := "X25519"
			if tt.retry {
				group = "P-384"
			}

			network := d.tap(false)
			out, _ := execute(t, "bssl-tool", "client", "-connect", network.addr, "-server-name", "hidden.example",
				"-ech-config-list", writeFile(t, "list", list), "-root-certs", ca.file, "-curves", "X25519:P-384")
			for _, want := range []string{"Encrypted ClientHello: yes", "ECDHE curve: " + group, "HTTP/1.0 200 OK"} {
				if !strings.Contains(out, want) {
					t.Errorf("the client does not say %q", want)
				}
			}
			network.expectHidden(t)
			d.err.Await(t, " for hidden.example: ")

			if tt.backend == "bssl-tool" { // crypto/tls takes no early data
				d.tryEarlyData(ca, list, !tt.retry)
			}
		})
	}
}

// tryEarlyData lets a client of NSS make a session, resume it, and send early data before the
// backend answers. The backend's page says what it has made of that. The exit status says nothing:
// the backend ends after its page, with a reset if the client has sent more by then.
func (d *daemon) tryEarlyData(ca *authority, list []byte, accepted bool) {
	t := d.t
	t.Helper()
	network := d.tap(true)
	host, port, _ := net.SplitHostPort(network.addr)
	request := writeFile(t, "request", []byte("GET / HTTP/1.0\r\n\r\n"))
	out, _ := execute(t, "tstclnt", "-h", host, "-p", port, "-a", "hidden.example", "-d", nssDatabase(t, hostdirtest.Dir(t), ca),
		"-N", base64.StdEncoding.EncodeToString(list), "-V", "tls1.3:", "-I", "x25519,P384", "-Z", "-L", "2", "-A", request)
	_, second, _ := strings.Cut(out, "Resumed session: no")
	early := map[bool]string{true: "yes", false: "no"}[accepted]
	for _, want := range []string{"Resumed session: yes", "Early data: " + early, "Client sent SNI: hidden.example"} {
		if !strings.Contains(second, want) {
			t.Errorf("the backend does not say %q of the second connection", want)
		}
	}
	network.expectHidden(t)
}

// nssDatabase makes the database of NSS in a directory, as Firefox, Chromium and NSS's own programs
// use it, with the certificate of the authority.
func nssDatabase(t testing.TB, dir string, ca *authority) string {
	t.Helper()
	certutil := hostdirtest.Need(t, "certutil")
	hostdirtest.Must(t, os.MkdirAll(dir, 0o755))
	for _, args := range [][]string{{"-N", "--empty-password"}, {"-A", "-n", "ca", "-t", "C,,", "-i", ca.file}} {
		if out, err := exec.Command(certutil, append([]string{"-d", "sql:" + dir}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("certutil: %v\n%s", err, out)
		}
	}
	return "sql:" + dir
}

// bsslKey lets BoringSSL make a key. It returns the key file, which BoringSSL has no form for, and
// the list for clients.
func bsslKey(t testing.TB) (file, list []byte) {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command(hostdirtest.Need(t, "bssl-tool"), "generate-ech", "-out-ech-config-list", filepath.Join(dir, "list"),
		"-out-ech-config", filepath.Join(dir, "config"), "-out-private-key", filepath.Join(dir, "key"),
		"-public-name", publicName, "-config-id", "7", "-max-name-length", "0").CombinedOutput()
	if err != nil {
		t.Fatalf("generate-ech: %v\n%s", err, out)
	}
	list, err = os.ReadFile(filepath.Join(dir, "list"))
	hostdirtest.Must(t, err)
	raw, err := os.ReadFile(filepath.Join(dir, "key"))
	hostdirtest.Must(t, err)
	private, err := ecdh.X25519().NewPrivateKey(raw)
	hostdirtest.Must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	hostdirtest.Must(t, err)
	file = append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "ECHCONFIG", Bytes: list})...)
	return file, list
}
