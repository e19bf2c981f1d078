package examples_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// startHanding starts a proxy that hands each connection over to the tls-socket in a directory, and
// returns its address. It reads once before, some bytes at most.
func startHanding(t *testing.T, dir string, most int) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, most)
			n, err := c.Read(b)
			if err == nil {
				err = handOver(dir, b[:n], c.(*net.TCPConn))
			}
			if err != nil {
				t.Errorf("a client was not handed over: %v", err)
			}
			c.Close()
		}
	}()
	return l.Addr().String()
}

// handOver hands a connection over, as a blocking descriptor.
func handOver(dir string, data []byte, c *net.TCPConn) error {
	f, err := c.File()
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	if err := syscall.SetNonblock(fd, false); err != nil {
		return err
	}
	return sendDescriptors(dir, data, fd)
}

// sendDescriptors sends a message to the tls-socket in a directory.
func sendDescriptors(dir string, data []byte, fds ...int) error {
	s, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	syscall.CloseOnExec(s)
	defer syscall.Close(s)
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	return syscall.Sendmsg(s, data, rights, &syscall.SockaddrUnix{Name: filepath.Join(dir, "tls-socket")}, 0)
}

// testHanded runs an example of a backend that is handed its connections. It serves clients and
// knows their addresses, whatever else it is sent, also if an earlier run was killed.
func testHanded(t *testing.T, backend func(s *backendSite) *exec.Cmd) {
	t.Helper()
	s := newBackendSite(t)
	// Sniproxy, and one that has read only a part of the ClientHello.
	for _, addr := range []string{s.addr, startHanding(t, s.dir, 100)} {
		s.addr = addr
		cmd := backend(s)
		s.run(cmd)
		for range 3 {
			s.expect(true)
		}
		before := descriptors(t, cmd)
		s.sendOther()
		s.expect(true)
		hostdirtest.Await(t, "all that is not served to be closed", func() bool { return descriptors(t, cmd) <= before })
		cmd.Process.Kill()
		cmd.Wait()
	}
}

// descriptors returns how many descriptors a program has, 0 where that cannot be found out.
func descriptors(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	if runtime.GOOS != "linux" {
		return 0
	}
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// sendOther sends the backend what is not one TCP connection, and a client that does not speak TLS.
func (s *backendSite) sendOther() {
	s.t.Helper()
	fail := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	descriptor := func(f *os.File, err error) int {
		s.t.Helper()
		fail(err)
		s.t.Cleanup(func() { f.Close() })
		return int(f.Fd())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fail(err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	fail(err)
	defer c.Close()
	connection := descriptor(c.(*net.TCPConn).File())
	listener := descriptor(l.(*net.TCPListener).File())
	file := descriptor(os.Open("/dev/null"))
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	fail(err)
	defer syscall.Close(fds[0])
	defer syscall.Close(fds[1])
	for _, other := range [][]int{
		nil, {connection, connection}, {connection, file}, {file}, {listener}, {fds[0]},
	} {
		fail(sendDescriptors(s.dir, []byte("hello"), other...))
	}

	c, err = net.Dial("tcp", s.addr)
	fail(err)
	defer c.Close()
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
	fail(err)
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	io.Copy(io.Discard, c) // an alert, or nothing
}

// Goal: the example for Python serves a host, and knows its clients.
func TestHandedPython(t *testing.T) {
	t.Parallel()
	python := hostdirtest.Need(t, "python3")
	testHanded(t, func(s *backendSite) *exec.Cmd {
		return exec.Command(python, s.configure("backends/handed/server.py"))
	})
}

// Goal: the same for C.
func TestHandedC(t *testing.T) {
	t.Parallel()
	cc := hostdirtest.Need(t, "cc")
	if exec.Command(cc, "-E", "-include", "openssl/ssl.h", "-xc", "/dev/null").Run() != nil {
		hostdirtest.Missing(t, "OpenSSL for C programs")
	}
	testHanded(t, func(s *backendSite) *exec.Cmd {
		source := s.configure("backends/handed/server.c")
		server := filepath.Join(filepath.Dir(source), "server")
		command(t, cc, "-Wall", "-Wextra", "-Werror", "-o", server, source, "-lssl", "-lcrypto", "-pthread")
		return exec.Command(server)
	})
}
