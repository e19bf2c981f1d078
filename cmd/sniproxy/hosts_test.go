package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// badHosts are the ways in which a host cannot be connected to, each made at a path where
// its directory would be.
var badHosts = map[string]func(dir string) error{
	"no directory":              func(string) error { return nil },
	"file as directory":         func(dir string) error { return os.WriteFile(dir, nil, 0o644) },
	"dangling symlink":          func(dir string) error { return os.Symlink("nowhere", dir) },
	"symlink loop":              func(dir string) error { return os.Symlink(filepath.Base(dir), dir) },
	"symlink to impossible":     func(dir string) error { return os.Symlink(strings.Repeat("a", 256), dir) },
	"no socket":                 func(dir string) error { return os.Mkdir(dir, 0o755) },
	"dangling socket symlink":   inDir(func(path string) error { return os.Symlink("nowhere", path) }),
	"socket symlink loop":       inDir(func(path string) error { return os.Symlink("tls-socket", path) }),
	"regular file as socket":    inDir(func(path string) error { return os.WriteFile(path, nil, 0o777) }),
	"read-only file as socket":  inDir(func(path string) error { return os.WriteFile(path, nil, 0o444) }),
	"FIFO as socket":            inDir(func(path string) error { return unix.Mkfifo(path, 0o777) }),
	"directory as socket":       inDir(func(path string) error { return os.Mkdir(path, 0o777) }),
	"symlink to directory":      inDir(func(path string) error { return os.Symlink(".", path) }),
	"socket that does not hear": inDir(func(path string) error { return bindUnix(path, unix.SOCK_STREAM) }),
	"seqpacket socket":          inDir(func(path string) error { return bindUnix(path, unix.SOCK_SEQPACKET) }),
	"abandoned datagram socket": inDir(func(path string) error {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			return err
		}
		return l.Close()
	}),
	"abandoned socket": inDir(func(path string) error {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		return l.Close()
	}),
}

// inDir makes something at tls-socket in the directory.
func inDir(do func(path string) error) func(dir string) error {
	return func(dir string) error {
		return errors.Join(os.Mkdir(dir, 0o755), do(filepath.Join(dir, "tls-socket")))
	}
}

// bindUnix makes a socket of any type, which stays open until the end of the tests, and
// does not listen.
func bindUnix(path string, kind int) error {
	fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // then no such socket can be in the way
	}
	if err != nil {
		return err
	}
	unix.CloseOnExec(fd)
	return errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), os.Chmod(path, 0o777))
}

// Goal: whatever is wrong with a host, its clients get unrecognized_name, others are served, no
// descriptor is lost, and the host is served as soon as it is right.
func TestBadHosts(t *testing.T) {
	d := start(t)
	d.serve("good.example", hostdirtest.Greet)
	base := d.fds()
	for what, do := range badHosts {
		t.Run(what, func(t *testing.T) {
			name := "bad.example"
			dir := d.hostDir(name)
			hostdirtest.Must(t, do(dir))
			for range 3 {
				got, err := d.exchange(snitest.Hello(name))
				expectRecord(t, got, err, sni.UnrecognizedName)
			}
			hostdirtest.Must(t, os.RemoveAll(dir))
			l := hostdirtest.Listen(t, hostDir(d.dir, name))
			go func() {
				if c, err := l.AcceptUnix(); err == nil {
					hostdirtest.Greet(c)
					c.Close()
				}
			}()
			if err := d.greeted(name); err != nil {
				t.Error(err)
			}
			l.Close()
			hostdirtest.Must(t, os.RemoveAll(dir))
		})
	}
	if err := d.greeted("good.example"); err != nil {
		t.Error(err)
	}
	d.awaitFds(base)
}

// Goal: a directory or a socket that the daemon may not use gives unrecognized_name. The host is
// served once the daemon may.
func TestNotPermitted(t *testing.T) {
	d := start(t, ordinaryUser(t))
	d.serve("good.example", hostdirtest.Greet)
	hostdirtest.Must(t, d.greeted("good.example"))
	for _, c := range []struct{ name, file string }{
		{"directory.example", "."},
		{"socket.example", "tls-socket"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.serve(c.name, hostdirtest.Greet)
			path := d.hostPath(c.name, c.file)
			hostdirtest.Must(t, os.Chmod(path, 0))
			got, err := d.exchange(snitest.Hello(c.name))
			expectRecord(t, got, err, sni.UnrecognizedName)
			hostdirtest.Must(t, os.Chmod(path, 0o777))
			if err := d.greeted(c.name); err != nil {
				t.Error(err)
			}
		})
	}
}

// ordinaryUser runs the daemon as nobody if the test is run by root, for whom nothing is
// forbidden.
func ordinaryUser(t *testing.T) setup {
	t.Helper()
	if os.Geteuid() != 0 {
		return func(*exec.Cmd) {}
	}
	// The test binary is in a directory that only root can enter.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(hostdirtest.Dir(t), "sniproxy")
	if os.Link(self, path) != nil {
		hostdirtest.CopyProgram(t, self, path)
	}
	return func(cmd *exec.Cmd) {
		cmd.Path = path
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
}

// Goal: the daemon sees at once when hosts and sockets are made, removed and made again.
func TestHostComesAndGoes(t *testing.T) {
	d := start(t)
	for range 3 {
		d.expectAlert(snitest.Hello("a.example"), sni.UnrecognizedName)
		d.serve("a.example", hostdirtest.Greet)
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
		socket := d.hostPath("a.example", "tls-socket")
		hostdirtest.Must(t, os.Rename(socket, socket+"~"))
		d.expectAlert(snitest.Hello("a.example"), sni.UnrecognizedName)
		hostdirtest.Must(t, os.Rename(socket+"~", socket))
		if err := d.greeted("a.example"); err != nil {
			t.Error(err)
		}
		hostdirtest.Must(t, os.RemoveAll(filepath.Dir(socket)))
	}
}

// saying is a backend that reads a hello and answers with a word.
func saying(word string) func(*net.UnixConn) {
	return func(c *net.UnixConn) {
		if _, _, err := hostdirtest.ReadHello(c); err == nil {
			io.WriteString(c, word)
		}
	}
}

// expectWord fails the test unless a client that asks for name gets the word.
func expectWord(t *testing.T, d *daemon, name, word string) {
	t.Helper()
	if got, err := d.exchange(snitest.Named(name).Stream()); err != nil || string(got) != word {
		t.Errorf("%q: got %q, error %v, want %q", name, got, err, word)
	}
}

// Goal: the daemon follows symlinks wherever they lead: relative or absolute, to a directory or a
// socket, inside or outside the hosts directory, through one another.
func TestSymlinks(t *testing.T) {
	d := start(t)
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "target"), saying("outside"))
	outside := hostDir(elsewhere, "target")
	relative, err := filepath.Rel(d.dir, outside)
	if err != nil {
		t.Fatal(err)
	}
	d.serve("inside.example", saying("inside"))
	inside := hostDir("", "inside.example")

	for _, c := range []struct{ name, target, word string }{
		{"absolute.example", outside, "outside"},
		{"relative.example", relative, "outside"},
		{"inner.example", inside, "inside"},
		{"twice.example", hostDir("", "inner.example"), "inside"},
	} {
		hostdirtest.Must(t, os.Symlink(c.target, d.hostDir(c.name)))
		expectWord(t, d, c.name, c.word)
	}
	for _, c := range []struct{ name, target, word string }{
		{"absolute-socket.example", filepath.Join(outside, "tls-socket"), "outside"},
		{"relative-socket.example", filepath.Join("..", relative, "tls-socket"), "outside"},
		{"inner-socket.example", filepath.Join("..", inside, "tls-socket"), "inside"},
	} {
		hostdirtest.Must(t, os.Symlink(c.target, d.hostPath(c.name, "tls-socket")))
		expectWord(t, d, c.name, c.word)
	}
}

// Goal: while a host's symlink is switched between two directories, by renaming a new symlink over
// it, one or the other serves each client, and the backend gets a PROXY header exactly where a
// marker is beside the socket.
func TestAtomicSwitch(t *testing.T) {
	for _, marker := range []bool{false, true} {
		t.Run(fmt.Sprintf("marker %v", marker), func(t *testing.T) {
			d := start(t)
			elsewhere := hostdirtest.Dir(t)
			backend := func(word, begin string) {
				hostdirtest.Serve(t, hostDir(elsewhere, word), func(c *net.UnixConn) {
					got := make([]byte, len(begin))
					if _, err := io.ReadFull(c, got); err == nil && string(got) != begin {
						fmt.Fprintf(c, "%q for ", got)
					}
					io.Copy(io.Discard, c)
					io.WriteString(c, word)
				})
			}
			backend("green", "\x16")
			if marker {
				backend("blue", "PROXY ")
				hostdirtest.Touch(t, hostPath(t, elsewhere, "blue", "send-proxy-v1"))
			} else {
				backend("blue", "\x16")
			}
			point := func(word string) error {
				next := filepath.Join(d.dir, "next")
				return errors.Join(os.Symlink(hostDir(elsewhere, word), next), os.Rename(next, d.hostDir("a.example")))
			}
			hostdirtest.Must(t, point("blue"))

			// The next switch is made when the last one has been seen by a client.
			answers := make(chan string)
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for range 500 {
						got, err := d.tell(snitest.Named("a.example").Stream(), 1<<20, true)
						if err != nil {
							t.Error(err)
						}
						answers <- string(got)
					}
				})
			}
			go func() {
				clients.Wait()
				close(answers)
			}()
			now, next, switches := "blue", "green", 0
			for got := range answers {
				switch {
				case got == now:
					if err := point(next); err != nil {
						t.Error(err)
					}
					now, next = next, now
					switches++
				case got != next:
					t.Errorf("an answer is %q", got)
				}
			}
			if switches < 10 {
				t.Errorf("only %d switches", switches)
			}
		})
	}
}

// Goal: a name is looked up in lower case, without a dot at its end. It may have underscores, and
// hyphens within and at the end of labels. The backend gets it as the client sent it.
func TestNames(t *testing.T) {
	d := start(t)
	for _, c := range []struct{ sent, canonical string }{
		{"a", "a"},
		{"127", "127"},
		{"UPPER.Example", "upper.example"},
		{"Dot.Example.", "dot.example"},
		{"a_b.example", "a_b.example"},
		{"_dmarc.example_", "_dmarc.example_"},
		{"xn--fa-hia.de", "xn--fa-hia.de"},
		{"a-.b--c.example", "a-.b--c.example"},
		{strings.Repeat("a.", 25) + "example", strings.Repeat("a.", 25) + "example"},
	} {
		sent := snitest.Named(c.sent).Stream()
		d.serve(c.canonical, func(c *net.UnixConn) {
			got := make([]byte, len(sent))
			if _, err := io.ReadFull(c, got); err == nil && bytes.Equal(got, sent) {
				io.WriteString(c, "unchanged")
			}
		})
		expectWord(t, d, c.sent, "unchanged")
	}
}

// Goal: a name that is not canonical, apart from upper case, never becomes a path, even if there is
// a socket at that path.
func TestForbiddenNames(t *testing.T) {
	parent := hostdirtest.Dir(t)
	hosts := filepath.Join(parent, "hosts")
	hostdirtest.Must(t, os.Mkdir(hosts, 0o755))
	d := startOn(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hosts)
	d.serve("a", hostdirtest.Greet)
	d.serve("a/b", hostdirtest.Greet)
	for _, name := range []string{
		".", "..", "a.", "a..b", ".a", "-a", "b.-a", "a b", "a\nb", "a\\b", "*.b", "a:443", "\xc3\xa9", "\xff",
		"\u212a", "a,b", "a%00", "[::1]",
	} {
		d.serve(name, hostdirtest.Greet)
	}
	// A NUL would end the path here.
	hostdirtest.Must(t, os.Symlink(hostDir("", "a")+"/tls-socket", filepath.Join(hosts, "bare")))
	for _, name := range []string{
		"", ".", "..", "../hosts/a", "./a", "/a", "a/", "a/b", "/", parent + "/hosts/a",
		"a..", "a..b", ".a", "-a", "b.-a", "a b", "a\nb", "a\\b", "*.b", "a:443", "\xc3\xa9", "\xff",
		"\u212a", "a,b", "a%00", "[::1]", strings.Repeat("a.", 127) + "a",
		"\x00", "a\x00", "a\x00.example", "\x00a", "a/tls-socket\x00", "bare\x00",
		strings.Repeat("a", 256), strings.Repeat("a", 60_000),
	} {
		got, err := d.exchange(snitest.Named(name).Stream())
		if err != nil || alert(got) != int(sni.UnrecognizedName) {
			t.Errorf("%.80q: got %x, error %v", name, got, err)
		}
	}
	expectWord(t, d, "a", "this is a")
	expectWord(t, d, "a.", "this is a")
}

// Goal: names of up to 254 bytes are served if the path of the socket fits into a socket address,
// as the path of a hash always does, or if the daemon needs no path. Other names are unknown,
// although there is a directory.
func TestLongNames(t *testing.T) {
	d := start(t)
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "target"), saying("found"))
	var address unix.RawSockaddrUnix
	fits := len(address.Path) - 1 - len("/tls-socket")
	for _, n := range []int{63, fits - 1, fits, fits + 1, fits + 2, 253, 254, 255} {
		name := strings.Repeat("abcdefg.", 32)[:n]
		name = strings.TrimSuffix(name, ".") + strings.Repeat("x", n-len(strings.TrimSuffix(name, ".")))
		hostdirtest.Must(t, os.Symlink(hostDir(elsewhere, "target"), d.hostDir(name)))
		if n <= fits || (hostdir.Hashed || anyName) && n <= 254 {
			expectWord(t, d, name, "found")
			continue
		}
		got, err := d.exchange(snitest.Named(name).Stream())
		expectRecord(t, got, err, sni.UnrecognizedName)
	}
}

// firstRead is a backend that sends back what its first read gives, which is tried so often
// that it can hardly find two writes at once.
func firstRead(c *net.UnixConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 64<<10)
	n, late := 0, time.Now().Add(hostdirtest.Patience)
	raw.Control(func(fd uintptr) {
		for err = unix.EAGAIN; err == unix.EAGAIN && time.Now().Before(late); {
			n, err = unix.Read(int(fd), b)
		}
	})
	if err == nil {
		c.Write(b[:n])
	}
}

// Goal: with a marker of any kind of file, the backend gets the right header and the hello in one
// write. Without a marker it gets the hello alone.
func TestProxyHeader(t *testing.T) {
	markers := map[string]func(path string) error{
		"none":             nil,
		"empty file":       func(path string) error { return os.WriteFile(path, nil, 0) },
		"directory":        func(path string) error { return os.Mkdir(path, 0) },
		"dangling symlink": func(path string) error { return os.Symlink("nowhere", path) },
		"symlink loop":     func(path string) error { return os.Symlink("send-proxy-v1", path) },
		"FIFO":             func(path string) error { return unix.Mkfifo(path, 0) },
	}
	for _, c := range []struct{ network, listener, client, family string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1", "TCP4"},
		{"tcp4", "0.0.0.0:0", "127.0.0.1", "TCP4"},
		{"tcp6", "[::1]:0", "::1", "TCP6"},
		{"tcp6", "[::]:0", "::1", "TCP6"},
		{"tcp", "[::]:0", "127.0.0.1", "TCP4"},
		{"tcp", "[::]:0", "::1", "TCP6"},
	} {
		t.Run(fmt.Sprintf("%s %s from %s", c.network, c.listener, c.client), func(t *testing.T) {
			if c.network != "tcp4" {
				hostdirtest.NeedIPv6(t)
			}
			l := hostdirtest.ListenTCP(t, c.network, c.listener)
			d := startOn(t, l, hostdirtest.Dir(t))
			port := l.Addr().(*net.TCPAddr).Port
			d.addr = net.JoinHostPort(c.client, fmt.Sprint(port))
			for what, mark := range markers {
				name := strings.ToLower(strings.ReplaceAll(what, " ", "-")) + ".example"
				d.serve(name, firstRead)
				if mark != nil {
					hostdirtest.Must(t, mark(d.hostPath(name, "send-proxy-v1")))
				}
				sent := snitest.Named(name).Stream()
				for range 20 {
					client := d.dial()
					if _, err := client.Write(sent); err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(client)
					client.Close()
					want := string(sent)
					if mark != nil {
						want = fmt.Sprintf("PROXY %s %s %s %d %d\r\n%s", c.family, c.client, c.client,
							localAddr(client).Port(), port, sent)
					}
					if err != nil || string(got) != want {
						t.Fatalf("%s: the first read gave %q, error %v, want %q", what, got, err, want)
					}
				}
			}
		})
	}
}

// Goal: the header comes once, before all bytes of the client, however the hello is cut and
// whatever follows it.
func TestProxyHeaderFirst(t *testing.T) {
	d := start(t)
	d.serve("a.example", func(c *net.UnixConn) { io.Copy(c, c) })
	hostdirtest.Touch(t, d.hostPath("a.example", "send-proxy-v1"))
	sent := append(snitest.Records(snitest.Named("a.example").Bytes, 10), "and more"...)
	for _, piece := range []int{1 << 20, 1} {
		c := d.dial()
		go func() {
			for i := 0; i < len(sent); i += piece {
				c.Write(sent[i:min(i+piece, len(sent))])
			}
			c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		addr := localAddr(c)
		want := fmt.Sprintf("PROXY TCP4 127.0.0.1 127.0.0.1 %d %s\r\n%s", addr.Port(), d.addr[len("127.0.0.1:"):], sent)
		if err != nil || string(got) != want {
			t.Errorf("pieces of %d: got %q, error %v, want %q", piece, got, err, want)
		}
		c.Close()
	}
}
