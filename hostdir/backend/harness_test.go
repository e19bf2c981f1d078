package backend_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
)

// must fails the test if there is an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hostDir returns the directory of a new host.
func hostDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(hostdirtest.Dir(t), "one.example")
	must(t, os.Mkdir(dir, 0o755))
	return dir
}

func listen(t testing.TB, dir string) *backend.Listener {
	t.Helper()
	l, err := backend.Listen(dir)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

// accept accepts a connection, which the test closes at its end.
func accept(t testing.TB, l net.Listener) *backend.Conn {
	t.Helper()
	late := time.AfterFunc(hostdirtest.Patience, func() { l.Close() })
	defer late.Stop()
	nc, err := l.Accept()
	must(t, err)
	c := nc.(*backend.Conn)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	return c
}

// pair returns a client of a TCP connection, and a blocking descriptor of the other end.
func pair(t testing.TB) (client *net.TCPConn, fd int) {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(hostdirtest.Patience))
	c, err := l.AcceptTCP()
	must(t, err)
	defer c.Close()
	return nc.(*net.TCPConn), dup(t, c)
}

// dup returns a blocking descriptor of what c is, on a description that is blocking as well.
func dup(t testing.TB, c interface{ File() (*os.File, error) }) int {
	t.Helper()
	fd, err := dupBlocking(c)
	must(t, err)
	return fd
}

func dupBlocking(c interface{ File() (*os.File, error) }) (int, error) {
	f, err := c.File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.SetNonblock(fd, false)
}

func newSocket(t testing.TB, family, kind int) int {
	t.Helper()
	fd, err := unix.Socket(family, kind, 0)
	must(t, err)
	unix.CloseOnExec(fd)
	return fd
}

// A sender sends messages as the proxy does.
type sender struct {
	fd   int
	path string
}

func newSender(t testing.TB, dir string) sender {
	t.Helper()
	fd := newSocket(t, unix.AF_UNIX, unix.SOCK_DGRAM)
	must(t, unix.SetNonblock(fd, true))
	t.Cleanup(func() { unix.Close(fd) })
	return sender{fd, filepath.Join(dir, "tls-socket")}
}

// try sends a message, which may fail with EAGAIN.
func (s sender) try(data []byte, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	return unix.Sendmsg(s.fd, data, rights, &unix.SockaddrUnix{Name: s.path}, 0)
}

// send sends a message, and waits for room in the queue.
func (s sender) send(data []byte, fds ...int) (err error) {
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		err = s.try(data, fds...)
		return err != unix.EAGAIN
	}) {
		return errors.New("the queue is full")
	}
	return err
}

// send sends a message to the backend in dir. The descriptors are closed then.
func send(t testing.TB, dir, data string, fds ...int) {
	t.Helper()
	must(t, newSender(t, dir).send([]byte(data), fds...))
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// handOver hands a new connection to the backend in dir, with the first bytes, and returns its
// client.
func handOver(t testing.TB, dir, first string) *net.TCPConn {
	t.Helper()
	client, fd := pair(t)
	send(t, dir, first, fd)
	return client
}

// startProxy starts what hands connections over: it reads of each once, and sends that, behind a
// header, to the backend in dir. It returns its address.
func startProxy(t testing.TB, dir, header string) string {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	s := newSender(t, dir)
	ended := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	go func() {
		defer close(ended)
		buf := make([]byte, 64<<10)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			n, err := c.Read(buf)
			fd := -1
			if err == nil {
				fd, err = dupBlocking(c)
			}
			if err == nil {
				err = s.send(append([]byte(header), buf[:n]...), fd)
				unix.Close(fd)
			}
			if err != nil {
				t.Errorf("a client was not handed over: %v", err)
			}
			c.Close()
		}
	}()
	return l.Addr().String()
}

var (
	exampleDir        string // the directory of the host in examples
	certFile, keyFile string // have a certificate of one.example, which signs itself, and its key
	cacheDir          string // has the same for package autocert
)

// roots has the certificate.
var roots = x509.NewCertPool()

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "backend")
	if err == nil {
		exampleDir = filepath.Join(dir, "one.example")
		err = errors.Join(os.Mkdir(exampleDir, 0o755), makeCertificate(dir))
	}
	if err != nil {
		log.Fatal(err)
	}
	status := m.Run()
	os.RemoveAll(dir)
	os.Exit(status)
}

func makeCertificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"one.example"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(90 * 24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	roots.AddCert(cert)
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: secret})
	certFile, keyFile, cacheDir = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "cache")
	return errors.Join(
		os.WriteFile(certFile, certPEM, 0o644),
		os.WriteFile(keyFile, keyPEM, 0o600),
		os.Mkdir(cacheDir, 0o700),
		os.WriteFile(filepath.Join(cacheDir, "one.example"), append(keyPEM, certPEM...), 0o600),
	)
}

// clientConfig is that of a client of one.example.
func clientConfig() *tls.Config { return &tls.Config{ServerName: "one.example", RootCAs: roots} }

// get gets a page through a proxy, over a connection of its own. It returns the client's address as
// well.
func get(proxy string) (page, client string, err error) {
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	web := http.Client{Transport: &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return c, nil },
		TLSClientConfig:   clientConfig(),
		ForceAttemptHTTP2: true,
	}}
	defer web.CloseIdleConnections()
	answer, err := web.Get("https://one.example/")
	if err != nil {
		return "", "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return string(body), c.LocalAddr().String(), err
}

// visit is the client of an example: it sends a request to the host in exampleDir, over TLS, ends
// its side, and returns the last line of the answer.
func visit(request string) string {
	answer, err := exchange(request)
	if err != nil {
		return err.Error()
	}
	return string(answer[bytes.LastIndexByte(answer, '\n')+1:])
}

func exchange(request string) (answer []byte, err error) {
	client, server, err := exampleConnection()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(hostdirtest.Patience))
	handed := make(chan error, 1)
	go func() { handed <- handExample(server) }()
	c := tls.Client(client, clientConfig())
	if _, err := io.WriteString(c, request); err != nil {
		return nil, errors.Join(err, <-handed)
	}
	if err := c.CloseWrite(); err != nil {
		return nil, err
	}
	return io.ReadAll(c)
}

// exampleConnection makes a TCP connection.
func exampleConnection() (client net.Conn, server *net.TCPConn, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	server, err = l.(*net.TCPListener).AcceptTCP()
	return client, server, err
}

// handExample is the proxy of an example.
func handExample(server *net.TCPConn) error {
	defer server.Close()
	buf := make([]byte, 64<<10)
	n, err := server.Read(buf)
	if err != nil {
		return err
	}
	fd, err := dupBlocking(server)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	return sender{s, filepath.Join(exampleDir, "tls-socket")}.send(buf[:n], fd)
}
