package hostdirtest

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/sni"
)

// The functions below make the directory of a host, dir, if it does not exist, and a socket in it
// that every user may connect to.

// Bind makes a socket that does not listen, and closes it at the end of the test. The kind is
// unix.SOCK_STREAM or another. The path may be longer than the address of a socket.
func Bind(t testing.TB, dir string, kind int) (fd int) {
	t.Helper()
	fd = bind(t, dir, kind)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func bind(t testing.TB, dir string, kind int) (fd int) {
	t.Helper()
	Must(t, os.MkdirAll(dir, 0o755))
	fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
	Must(t, err)
	unix.CloseOnExec(fd)
	path := filepath.Join(dir, "tls-socket")
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == unix.EINVAL { // it is too long
		short := filepath.Join(Dir(t), "s")
		Must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: short}))
		err = os.Rename(short, path)
	}
	Must(t, err)
	Must(t, os.Chmod(path, 0o777))
	return fd
}

// Listen makes a socket that listens.
func Listen(t testing.TB, dir string) *net.UnixListener {
	t.Helper()
	fd := bind(t, dir, unix.SOCK_STREAM)
	f := os.NewFile(uintptr(fd), "tls-socket")
	defer f.Close()
	Must(t, unix.Listen(fd, unix.SOMAXCONN))
	l, err := net.FileListener(f)
	Must(t, err)
	t.Cleanup(func() { l.Close() })
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(true)
	return u
}

// Serve calls handle, in a goroutine, for each connection, which is closed when handle returns.
func Serve(t testing.TB, dir string, handle func(*net.UnixConn)) {
	t.Helper()
	l := Listen(t, dir)
	l.SetUnlinkOnClose(false) // by then its file system may not answer
	go func() {
		var conns sync.WaitGroup
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(4 * Patience))
				handle(c)
			})
		}
	}()
}

// Abandon makes a socket whose backend has died.
func Abandon(t testing.TB, dir string) {
	t.Helper()
	fd := bind(t, dir, unix.SOCK_STREAM)
	Must(t, unix.Listen(fd, 1))
	Must(t, unix.Close(fd))
}

// FillBacklog makes a socket that listens and whose backlog is full. Only Linux reports that to
// clients.
func FillBacklog(t testing.TB, dir string) {
	t.Helper()
	Must(t, unix.Listen(Bind(t, dir, unix.SOCK_STREAM), 0))
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		Must(t, err)
		t.Cleanup(func() { unix.Close(fd) })
		unix.CloseOnExec(fd)
		Must(t, unix.SetNonblock(fd, true))
		switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "tls-socket")}); err {
		case nil:
		case unix.EAGAIN:
			return
		default:
			t.Fatal(err)
		}
	}
}

// Touch makes empty files, such as markers.
func Touch(t testing.TB, paths ...string) {
	t.Helper()
	for _, path := range paths {
		Must(t, os.WriteFile(path, nil, 0o644))
	}
}

// Greet is a backend that reads a ClientHello, answers "this is NAME" with the server name in it,
// and closes. The proxy must have routed the client by that name.
func Greet(c *net.UnixConn) {
	name, _, err := ReadHello(c)
	if err != nil {
		fmt.Fprintf(c, "error: %v", err)
		return
	}
	io.WriteString(c, "this is "+name)
}

// Echo is a backend that reads a ClientHello, and sends back all that follows.
func Echo(c *net.UnixConn) {
	_, rest, err := ReadHello(c)
	if err != nil {
		return
	}
	c.Write(rest)
	io.Copy(c, c)
}

// ReadHello reads a ClientHello, in one record, and returns its server name and what was read
// behind it.
func ReadHello(r io.Reader) (name string, rest []byte, err error) {
	var b []byte
	buf := make([]byte, 4096)
	for len(b) < 5 || len(b) < 5+int(b[3])<<8+int(b[4]) {
		n, err := r.Read(buf)
		if err != nil {
			return "", nil, fmt.Errorf("after %d bytes: %w", len(b), err)
		}
		b = append(b, buf[:n]...)
	}
	var p sni.Parser
	got, _, err := p.Parse(b)
	return string(got), b[5+int(b[3])<<8+int(b[4]):], err
}
