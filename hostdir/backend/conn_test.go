package backend_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: however a connection is read, the first bytes come first, and all others follow.
func TestReading(t *testing.T) {
	const first = "the first bytes, "
	rest := strings.Repeat("and the rest; ", 3000)
	type destination struct {
		w   io.Writer
		end func() error  // called when all is written
		r   io.ReadCloser // gives what was written
	}
	descriptor := func(fd int) *os.File { return os.NewFile(uintptr(fd), "") }
	destinations := map[string]func() destination{
		"a buffer": func() destination {
			r, w := io.Pipe()
			return destination{w, w.Close, r}
		},
		"a file": func() destination {
			w, err := os.Create(filepath.Join(t.TempDir(), "f"))
			must(t, err)
			r, err := os.Open(w.Name())
			must(t, err)
			return destination{w, w.Close, r}
		},
		"a TCP connection": func() destination {
			w, fd := pair(t)
			return destination{w, w.CloseWrite, descriptor(fd)}
		},
		"a Unix connection": func() destination {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			must(t, err)
			f := descriptor(fds[0])
			defer f.Close()
			w, err := net.FileConn(f)
			must(t, err)
			return destination{w, w.Close, descriptor(fds[1])}
		},
		"a pipe": func() destination {
			r, w, err := os.Pipe()
			must(t, err)
			return destination{w, w.Close, r}
		},
	}
	ways := map[string]func(w io.Writer, c net.Conn) error{
		"io.Copy": func(w io.Writer, c net.Conn) error {
			_, err := io.Copy(w, c)
			return err
		},
		"io.CopyBuffer, a byte at a time": func(w io.Writer, c net.Conn) error {
			_, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{c}, make([]byte, 1))
			return err
		},
		"io.CopyN": func(w io.Writer, c net.Conn) error {
			if _, err := io.CopyN(w, c, 1); err != nil {
				return err
			}
			_, err := io.Copy(w, c)
			return err
		},
		"WriteTo": func(w io.Writer, c net.Conn) error {
			_, err := c.(io.WriterTo).WriteTo(w)
			return err
		},
		"ReadFrom": func(w io.Writer, c net.Conn) error {
			if r, ok := w.(io.ReaderFrom); ok {
				_, err := r.ReadFrom(c)
				return err
			}
			b := bufio.NewWriterSize(w, 16)
			_, err := b.ReadFrom(c)
			return errors.Join(err, b.Flush())
		},
		"bufio": func(w io.Writer, c net.Conn) error {
			r := bufio.NewReader(c)
			if _, err := r.Peek(1); err != nil {
				return err
			}
			_, err := r.WriteTo(w)
			return err
		},
		"a byte, and io.Copy": func(w io.Writer, c net.Conn) error {
			b := make([]byte, 1)
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
			if _, err := w.Write(b); err != nil {
				return err
			}
			_, err := io.Copy(w, c)
			return err
		},
		"Read of no bytes": func(w io.Writer, c net.Conn) error {
			for range 3 {
				if n, err := c.Read(nil); n != 0 || err != nil {
					return errors.New("bytes or an error")
				}
			}
			_, err := io.Copy(w, c)
			return err
		},
	}
	dir := hostDir(t)
	l := listen(t, dir)
	for way, read := range ways {
		for to, open := range destinations {
			client := handOver(t, dir, first)
			c := accept(t, l)
			d := open()
			var writers sync.WaitGroup
			writers.Go(func() {
				io.WriteString(client, rest)
				client.CloseWrite()
			})
			writers.Go(func() {
				if err := errors.Join(read(d.w, c), d.end()); err != nil {
					t.Errorf("%s to %s: %v", way, to, err)
				}
			})
			if to == "a file" {
				writers.Wait()
			}
			b, err := io.ReadAll(d.r)
			writers.Wait()
			d.r.Close()
			must(t, err)
			got := string(b)
			if got != first+rest {
				t.Errorf("%s to %s: got %d bytes, %.30q, want %d, %.30q", way, to, len(got), got, len(first+rest), first)
			}
		}
	}
}

// Goal: several who read at once share the bytes, and none comes twice.
func TestReadingAtOnce(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	first, rest := strings.Repeat("a", 1000), strings.Repeat("b", 1000)
	client := handOver(t, dir, first)
	c := accept(t, l)
	io.WriteString(client, rest)
	client.CloseWrite()
	var mu sync.Mutex
	var got []byte
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			b := make([]byte, 7)
			for {
				n, err := c.Read(b)
				mu.Lock()
				got = append(got, b[:n]...)
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if a, b := bytes.Count(got, []byte("a")), bytes.Count(got, []byte("b")); a != 1000 || b != 1000 || len(got) != 2000 {
		t.Errorf("%d and %d bytes were read, want 1000 each", a, b)
	}
}

// Goal: a connection that was handed over blocking has deadlines, half-close and options, also
// before its first bytes are read, and ends when it is closed.
func TestConn(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	client := handOver(t, dir, "hello")
	c := accept(t, l)
	b := make([]byte, 10)

	must(t, c.SetReadDeadline(time.Now().Add(-time.Second)))
	n, err := c.Read(b)
	if e, ok := errors.AsType[*net.OpError](err); n != 0 || !ok || e.Op != "read" || !e.Timeout() {
		t.Errorf("after the deadline: read %d bytes, error %v", n, err)
	}
	var w bytes.Buffer
	if n, err := c.WriteTo(&w); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: wrote %d bytes, error %v", n, err)
	}
	must(t, c.SetReadDeadline(time.Time{}))
	if n, err := c.Read(b); string(b[:n]) != "hello" || err != nil {
		t.Errorf("read %q, error %v", b[:n], err)
	}
	// If the socket were blocking, this would wait for ever.
	must(t, c.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
	if n, err := c.Read(b); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: read %d bytes, error %v", n, err)
	}
	must(t, c.SetDeadline(time.Now().Add(hostdirtest.Patience)))

	must(t, c.SetKeepAlive(false))
	must(t, c.SetNoDelay(false))
	raw, err := c.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		for option, level := range map[int]int{unix.SO_KEEPALIVE: unix.SOL_SOCKET, unix.TCP_NODELAY: unix.IPPROTO_TCP} {
			if on, err := unix.GetsockoptInt(int(fd), level, option); on != 0 || err != nil {
				t.Errorf("option %d is %d, error %v, want it off", option, on, err)
			}
		}
	}))
	if _, err := c.Write([]byte("bye")); err != nil {
		t.Error(err)
	}
	must(t, c.CloseWrite())
	if got, err := io.ReadAll(client); string(got) != "bye" || err != nil {
		t.Errorf("the client read %q, error %v", got, err)
	}
	io.WriteString(client, "yes")
	if n, err := c.Read(b); string(b[:n]) != "yes" || err != nil {
		t.Errorf("read %q, error %v", b[:n], err)
	}
	ended := make(chan error)
	go func() {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	}()
	must(t, c.Close())
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read at the end: %v", err)
	}

	handOver(t, dir, "hello")
	c = accept(t, l)
	must(t, c.Close())
	if n, err := c.Read(b); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("read %d bytes, error %v, after Close", n, err)
	}
}

// Goal: nothing that others do with the descriptor misses the first bytes.
func TestConnUnread(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	client := handOver(t, dir, "hello")
	io.WriteString(client, ", world")
	c := accept(t, l)

	if f, err := c.File(); err == nil {
		f.Close()
		t.Error("File gives out a descriptor while there are unread bytes")
	}
	raw, err := c.SyscallConn()
	must(t, err)
	if err := raw.Read(func(uintptr) bool { return true }); err == nil {
		t.Error("Read of SyscallConn calls while there are unread bytes")
	}
	var written int
	must(t, raw.Write(func(fd uintptr) bool {
		written, err = unix.Write(int(fd), []byte("hi"))
		return true
	}))
	if written != 2 || err != nil {
		t.Errorf("wrote %d bytes, error %v", written, err)
	}
	if _, err := io.ReadFull(client, make([]byte, 2)); err != nil {
		t.Error(err)
	}
	b := make([]byte, 20)
	if n, err := c.Read(b); string(b[:n]) != "hello" || err != nil {
		t.Errorf("read %q, error %v", b[:n], err)
	}

	var n int
	must(t, raw.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		return err != unix.EAGAIN
	}))
	if string(b[:n]) != ", world" || err != nil {
		t.Errorf("read %q, error %v", b[:n], err)
	}
	f, err := c.File()
	must(t, err)
	f.Close()
	if _, err := c.SyscallConn(); err != nil {
		t.Error(err)
	}
}
