package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// A halfConn is either end of a relayed connection.
type halfConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// pair makes a connection through the daemon to the host that l is the socket of, and
// returns its two ends once the hello has come through.
func (d *daemon) pair(l *net.UnixListener, name string) (client *net.TCPConn, backend *net.UnixConn) {
	d.t.Helper()
	client = d.dial()
	sent := snitest.Hello(name)
	if _, err := client.Write(sent); err != nil {
		d.t.Fatal(err)
	}
	l.SetDeadline(time.Now().Add(hostdirtest.Patience))
	backend, err := l.AcceptUnix()
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { backend.Close() })
	backend.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(backend, got); err != nil || !bytes.Equal(got, sent) {
		d.t.Fatalf("the backend got %x, error %v, want %x", got, err, sent)
	}
	return client, backend
}

// ping fails the test unless a message gets through from one end to the other.
func ping(t testing.TB, from, to net.Conn) {
	t.Helper()
	const message = "are you there?"
	if _, err := io.WriteString(from, message); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(to, got); err != nil || string(got) != message {
		t.Fatalf("got %q, error %v, want %q", got, err, message)
	}
}

// randomBytes returns n bytes that do not repeat.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

// both runs a test for each direction of a connection.
func both(t *testing.T, test func(t *testing.T, from, to halfConn)) {
	d := start(t)
	l := d.host("relay.example")
	t.Run("client to backend", func(t *testing.T) {
		client, backend := d.pair(l, "relay.example")
		test(t, client, backend)
	})
	t.Run("backend to client", func(t *testing.T) {
		client, backend := d.pair(l, "relay.example")
		test(t, backend, client)
	})
}

// Goal: 64 MiB of random data in both directions at once arrive as they were sent, in
// chunks of odd sizes, and with readers that are slower than the writers.
func TestRelayBulk(t *testing.T) {
	const size = 64 << 20
	send := func(c halfConn, seed byte, chunks []int) ([]byte, error) {
		sum := sha256.New()
		random := rand.NewChaCha8([32]byte{seed})
		buf := make([]byte, 1<<20)
		for i, left := 0, size; left > 0; i++ {
			b := buf[:min(chunks[i%len(chunks)], left)]
			random.Read(b)
			sum.Write(b)
			if _, err := c.Write(b); err != nil {
				return nil, fmt.Errorf("writing with %d bytes left: %w", left, err)
			}
			left -= len(b)
		}
		return sum.Sum(nil), c.CloseWrite()
	}
	// A slow reader takes at most a megabyte per tick.
	receive := func(c io.Reader, slow bool, chunks []int) ([]byte, error) {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		sum := sha256.New()
		buf := make([]byte, 1<<20)
		total, pause := 0, 0
		for i := 0; ; i++ {
			n, err := c.Read(buf[:chunks[i%len(chunks)]])
			sum.Write(buf[:n])
			total += n
			if err == io.EOF && total == size {
				return sum.Sum(nil), nil
			}
			if err != nil {
				return nil, fmt.Errorf("reading after %d bytes: %w", total, err)
			}
			if slow && total > pause {
				pause = total + 1<<20
				<-tick.C
			}
		}
	}
	tests := []struct {
		name                     string
		slowClient, slowBackend  bool
		writeChunks, readChunks  []int
		clientBuffer, unixBuffer int
	}{
		{name: "large chunks", writeChunks: []int{1 << 20}, readChunks: []int{1 << 20}},
		{name: "odd chunks", writeChunks: []int{1, 65535, 65537, 3, 131071, 17, 40001}, readChunks: []int{7, 70001, 1, 65536, 4093}},
		{name: "slow client", slowClient: true, writeChunks: []int{65537, 100003}, readChunks: []int{30011, 1, 99991}, clientBuffer: 16 << 10},
		{name: "slow backend", slowBackend: true, writeChunks: []int{65535, 11}, readChunks: []int{8191, 50021}, unixBuffer: 8 << 10},
	}
	d := start(t)
	l := d.host("bulk.example")
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			client, backend := d.pair(l, "bulk.example")
			if test.clientBuffer > 0 {
				client.SetReadBuffer(test.clientBuffer)
			}
			if test.unixBuffer > 0 {
				backend.SetWriteBuffer(test.unixBuffer)
			}
			var sent, got [2][]byte
			var errs [4]error
			var flows sync.WaitGroup
			flows.Go(func() { sent[0], errs[0] = send(client, 1, test.writeChunks) })
			flows.Go(func() { sent[1], errs[1] = send(backend, 2, test.writeChunks) })
			flows.Go(func() { got[0], errs[2] = receive(backend, test.slowBackend, test.readChunks) })
			flows.Go(func() { got[1], errs[3] = receive(client, test.slowClient, test.readChunks) })
			flows.Wait()
			hostdirtest.Must(t, errors.Join(errs[:]...))
			for i, direction := range []string{"client to backend", "backend to client"} {
				if !bytes.Equal(got[i], sent[i]) {
					t.Errorf("%s: the SHA-256 is %x, want %x", direction, got[i], sent[i])
				}
			}
		})
	}
}

// Goal: small messages arrive at once and in order, in both directions, on many
// connections at the same time.
func TestRelayPingPong(t *testing.T) {
	const conns, rounds = 20, 300
	d := start(t)
	d.serve("echo.example", hostdirtest.Echo)
	talk := func(seed uint32) error {
		c, err := d.tryDial()
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write(snitest.Hello("echo.example")); err != nil {
			return err
		}
		for i := range uint32(rounds) {
			message := binary.BigEndian.AppendUint32(nil, seed)
			message = binary.BigEndian.AppendUint32(message, i)
			message = append(message, make([]byte, i%50)...)
			if _, err := c.Write(message); err != nil {
				return err
			}
			got := make([]byte, len(message))
			if _, err := io.ReadFull(c, got); err != nil {
				return err
			}
			if !bytes.Equal(got, message) {
				return fmt.Errorf("got %x, want %x", got, message)
			}
		}
		return nil
	}
	var talks sync.WaitGroup
	for i := range uint32(conns) {
		talks.Go(func() {
			if err := talk(i); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	talks.Wait()
}

// Goal: when one end stops sending, the other learns of it and can go on sending for as long as it
// wants.
func TestRelayHalfClose(t *testing.T) {
	both(t, func(t *testing.T, from, to halfConn) {
		before, after := randomBytes(100_000), randomBytes(8<<20)
		var sending sync.WaitGroup
		defer sending.Wait()
		ended := make(chan struct{})
		sending.Go(func() {
			if _, err := to.Write(before); err != nil {
				t.Error(err)
			}
			<-ended
			if _, err := to.Write(after); err != nil {
				t.Error(err)
			}
			to.CloseWrite()
		})
		got := make([]byte, len(before)/2) // the rest is under way when the end comes
		if _, err := io.ReadFull(from, got); err != nil {
			t.Error(err)
		}
		io.WriteString(from, "the last words")
		from.CloseWrite()
		if got, err := io.ReadAll(to); err != nil || string(got) != "the last words" {
			t.Errorf("before its end the other side said %q, error %v", got, err)
		}
		close(ended)
		rest, err := io.ReadAll(from)
		if err != nil || !bytes.Equal(append(got, rest...), append(before, after...)) {
			t.Errorf("got %d bytes, error %v, want the %d that were sent", len(got)+len(rest), err, len(before)+len(after))
		}
	})
}

// Goal: an end that follows right behind the last bytes does not cut them off.
func TestRelayEndWithLastBytes(t *testing.T) {
	for _, size := range []int{1, 1000, 64 << 10, 64<<10 + 1, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			want := randomBytes(size)
			both(t, func(t *testing.T, from, to halfConn) {
				go func() {
					from.Write(want)
					from.Close()
				}()
				if got, err := io.ReadAll(to); err != nil || !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, error %v, want the %d that were sent", len(got), err, len(want))
				}
			})
		})
	}
}

// Goal: a client that has sent everything, and its end, before there is even a backend loses
// nothing, and gets the answer.
func TestRelayEndWithHello(t *testing.T) {
	d := start(t)
	d.serve("echo.example", hostdirtest.Echo)
	want := randomBytes(100_000)
	for range 20 {
		c := d.dial()
		go func() {
			c.Write(append(snitest.Hello("echo.example"), want...))
			c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("got %d bytes, error %v, want the %d that were sent", len(got), err, len(want))
		}
	}
}

// Goal: when a backend closes with input unread, as a crashing one does, the client gets a reset,
// and never takes what it has for everything.
func TestRelayBackendReset(t *testing.T) {
	d := start(t)
	l := d.host("reset.example")
	tests := []struct {
		name string
		prep func(client *net.TCPConn, backend *net.UnixConn) // brings unread input about
	}{
		{"idle client", func(client *net.TCPConn, backend *net.UnixConn) {
			client.Write(make([]byte, 1000))
		}},
		{"after an answer", func(client *net.TCPConn, backend *net.UnixConn) {
			client.Write(make([]byte, 1000))
			io.WriteString(backend, "an answer")
			io.ReadFull(client, make([]byte, len("an answer")))
		}},
		{"client has ended", func(client *net.TCPConn, backend *net.UnixConn) {
			client.Write(make([]byte, 1000))
			client.CloseWrite()
		}},
		{"upload under way", func(client *net.TCPConn, backend *net.UnixConn) {
			// It is all in the buffers of the client's socket. A client that is in write(2)
			// itself would take the error from the socket, and read(2) then give the end.
			client.SetWriteBuffer(2 << 20)
			client.Write(make([]byte, 1<<20))
			io.ReadFull(backend, make([]byte, 100_000))
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for range 50 {
				client, backend := d.pair(l, "reset.example")
				test.prep(client, backend)
				awaitInput(t, backend)
				backend.Close()
				if got, err := io.ReadAll(client); !isReset(err) {
					t.Fatalf("the client got %q, error %v, want a reset", got, err)
				}
			}
		})
	}
}

// awaitInput waits until there is something to read, and leaves it unread.
func awaitInput(t testing.TB, c *net.UnixConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if waited := raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return err != unix.EAGAIN
	}); waited != nil || err != nil || n == 0 {
		t.Fatalf("nothing to read: %v, %v", waited, err)
	}
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// Goal: when the process of a backend is killed, its clients learn of it.
func TestRelayBackendKilled(t *testing.T) {
	sleep := hostdirtest.Need(t, "sleep")
	d := start(t)
	l := d.host("killed.example")
	// hold gives a connection to another process, which is the only one to have it.
	hold := func(c *net.UnixConn) *os.Process {
		f, err := c.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd := exec.Command(sleep, "1000")
		cmd.ExtraFiles = []*os.File{f}
		hostdirtest.Must(t, cmd.Start())
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		c.Close()
		return cmd.Process
	}
	t.Run("idle", func(t *testing.T) {
		client, backend := d.pair(l, "killed.example")
		process := hold(backend)
		process.Signal(syscall.SIGKILL)
		if got, err := io.ReadAll(client); len(got) > 0 || err != nil && !isReset(err) {
			t.Errorf("the client got %q, error %v, want the end", got, err)
		}
	})
	t.Run("with unread input", func(t *testing.T) {
		client, backend := d.pair(l, "killed.example")
		client.Write(make([]byte, 1000))
		awaitInput(t, backend)
		process := hold(backend)
		process.Signal(syscall.SIGKILL)
		if got, err := io.ReadAll(client); len(got) > 0 || !isReset(err) {
			t.Errorf("the client got %q, error %v, want a reset", got, err)
		}
	})
	t.Run("client sends", func(t *testing.T) {
		client, backend := d.pair(l, "killed.example")
		process := hold(backend)
		stuck := make(chan error)
		go func() {
			_, err := io.Copy(client, zeros{})
			stuck <- err
		}()
		process.Signal(syscall.SIGKILL)
		if err := <-stuck; !isReset(err) {
			t.Errorf("the client's sending ended with %v, want a reset", err)
		}
	})
}

// abort closes a connection with a reset.
func abort(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// Goal: when a client resets its connection, the backend's connection ends, whatever went on.
func TestRelayClientReset(t *testing.T) {
	d := start(t)
	l := d.host("reset.example")
	base := d.fds()
	tests := []struct {
		name string
		prep func(client *net.TCPConn, backend *net.UnixConn)
	}{
		{"idle", func(*net.TCPConn, *net.UnixConn) {}},
		{"client has ended", func(client *net.TCPConn, backend *net.UnixConn) {
			client.CloseWrite()
			backend.Read(make([]byte, 1))
			go io.Copy(backend, zeros{})
			client.Read(make([]byte, 1))
		}},
		{"backend has ended", func(client *net.TCPConn, backend *net.UnixConn) {
			backend.CloseWrite()
			client.Read(make([]byte, 1))
		}},
		{"client sends", func(client *net.TCPConn, backend *net.UnixConn) {
			go io.Copy(client, zeros{})
			io.ReadFull(backend, make([]byte, 1<<20))
		}},
		{"backend sends", func(client *net.TCPConn, backend *net.UnixConn) {
			go io.Copy(backend, zeros{})
			io.ReadFull(client, make([]byte, 1<<20))
		}},
		{"client does not read", func(client *net.TCPConn, backend *net.UnixConn) {
			var taken atomic.Int64
			stuff(backend, &taken)
			awaitStill(t, &taken)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			client, backend := d.pair(l, "reset.example")
			test.prep(client, backend)
			abort(client)
			if _, err := io.Copy(io.Discard, backend); err != nil && !isReset(err) {
				t.Errorf("the backend got %v, want the end", err)
			}
			d.awaitFds(base)
		})
	}
}

// stuff writes to c, in the background, until it fails, and counts what is taken.
func stuff(c net.Conn, taken *atomic.Int64) {
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := c.Write(b)
			taken.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
}

// awaitStill waits until a counter has begun to grow, and has not grown for a while.
func awaitStill(t testing.TB, counter *atomic.Int64) {
	t.Helper()
	var last int64
	still := 0
	hostdirtest.Await(t, "the writers to be held up", func() bool {
		now := counter.Load()
		if now != last || now == 0 {
			last, still = now, 0
			return false
		}
		still++
		return still == 50
	})
}

// Goal: the daemon notices a client's reset even while the backend takes nothing more: no
// descriptor stays behind for a connection that is gone.
func TestRelayClientResetBackendStuck(t *testing.T) {
	d := start(t)
	l := d.host("stuck.example")
	base := d.fds()
	client, _ := d.pair(l, "stuck.example")
	var taken atomic.Int64
	stuff(client, &taken)
	awaitStill(t, &taken)
	abort(client)
	d.awaitFds(base)
}

// Goal: the daemon notices a backend's end even while the client takes nothing more: the client's
// next bytes fail.
func TestRelayBackendResetClientStuck(t *testing.T) {
	d := start(t)
	l := d.host("stuck.example")
	client, backend := d.pair(l, "stuck.example")
	io.WriteString(client, "unread")
	awaitInput(t, backend)
	var taken atomic.Int64
	stuff(backend, &taken)
	awaitStill(t, &taken)
	backend.Close()
	if _, err := io.Copy(io.Discard, client); !isReset(err) {
		t.Errorf("the client got %v, want a reset", err)
	}
}

// Goal: what a backend says after it has closed its reading side alone, so that it can never get
// what the client sends, is forwarded all the same until it ends.
func TestRelayBackendStopsReading(t *testing.T) {
	d := start(t)
	l := d.host("deaf.example")
	base := d.fds()
	client, backend := d.pair(l, "deaf.example")
	hostdirtest.Must(t, backend.CloseRead())
	go io.Copy(client, zeros{})
	ping(t, backend, client)
	backend.Close()
	if got, err := io.ReadAll(client); len(got) > 0 || err != nil && !isReset(err) {
		t.Errorf("the client got %q, error %v, want the end", got, err)
	}
	d.awaitFds(base)
}

// Goal: a backend may answer and close at once, as servers do that refuse a request. The whole
// answer arrives although the client is still sending.
func TestRelayAnswerAndClose(t *testing.T) {
	d := start(t)
	l := d.host("answer.example")
	t.Run("request read", func(t *testing.T) {
		want := randomBytes(300_000)
		for range 20 {
			client, backend := d.pair(l, "answer.example")
			ping(t, client, backend)
			backend.Write(want)
			backend.Close()
			// What the client sends now the backend cannot get any more.
			if _, err := client.Write(make([]byte, 200_000)); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes, error %v, want the %d of the answer", len(got), err, len(want))
			}
		}
	})
	t.Run("request unread", func(t *testing.T) {
		// The backend resets the connection. What it said before arrives still.
		want := randomBytes(10_000)
		for range 100 {
			client, backend := d.pair(l, "answer.example")
			go io.Copy(client, zeros{})
			io.ReadFull(backend, make([]byte, 100_000))
			backend.Write(want)
			backend.Close()
			if got, err := io.ReadAll(client); !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes, error %v, want the %d of the answer", len(got), err, len(want))
			}
		}
	})
}

// Goal: while a client does not read, the proxy holds up its backend instead of storing what it
// sends. Then all goes on.
func TestRelayClientDoesNotRead(t *testing.T) {
	both(t, func(t *testing.T, to, from halfConn) {
		const size = 64 << 20
		want := sha256.New()
		var sent atomic.Int64
		go func() {
			random := rand.NewChaCha8([32]byte{})
			b := make([]byte, 64<<10)
			for range size / len(b) {
				random.Read(b)
				want.Write(b)
				n, err := from.Write(b)
				sent.Add(int64(n))
				if err != nil {
					t.Error(err)
					break
				}
			}
			from.CloseWrite()
		}()
		awaitStill(t, &sent)
		// The buffers of the sockets hold a few megabytes.
		if n := sent.Load(); n > size/2 {
			t.Errorf("%d bytes were taken that nobody read", n)
		}
		got := sha256.New()
		if n, err := io.Copy(got, to); n != size || err != nil || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			t.Errorf("got %d bytes, error %v, want the %d that were sent", n, err, size)
		}
	})
}

// Goal: a client that does not read costs the proxy at most a buffer.
func TestRelayMemoryOfStuckClients(t *testing.T) {
	const conns = 50
	d := start(t)
	l := d.host("much.example")
	base := d.rss()
	var taken atomic.Int64
	for range conns {
		_, backend := d.pair(l, "much.example")
		stuff(backend, &taken)
	}
	awaitStill(t, &taken)
	d.expectGrowth(base, conns*192<<10)
}

// Goal: keepalive is on at the client's side, so that the daemon notices clients that vanished. It
// begins within three minutes of silence.
func TestRelayKeepalive(t *testing.T) {
	d := start(t)
	l := d.host("alive.example")
	client, _ := d.pair(l, "alive.example")
	var sockets []procSocket
	// The table changes while it is read, so one may be missing, or be there twice.
	hostdirtest.Await(t, "the daemon's socket", func() bool {
		sockets = d.sockets(client.LocalAddr())
		return len(sockets) > 0
	})
	// proc_net_tcp.rst of the kernel: 02 is "another timer (e.g. delayed ack or
	// keepalive) is pending".
	if timer := sockets[0].timer; !strings.HasPrefix(timer, "02:") {
		t.Errorf("the timer is %s, want a keepalive", timer)
	} else if left, err := strconv.ParseUint(timer[3:], 16, 64); err != nil || left > 180*100 {
		t.Errorf("the timer has %d hundredths of a second left, error %v; want three minutes at most", left, err)
	}
}

// A procSocket is a connection as the system sees it.
type procSocket struct {
	peer   string // as procAddr has it
	timer  string // kind and time left
	unread int64
}

// sockets returns the daemon's sockets of established connections on IPv4, of one client
// only if that is not nil.
func (d *daemon) sockets(client net.Addr) []procSocket {
	d.t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		d.t.Skipf("no /proc: %v", err)
	}
	local, peer := procAddr(d.addr), ""
	if client != nil {
		peer = procAddr(client.String())
	}
	var found []procSocket
	for line := range strings.Lines(string(table)) {
		if !strings.Contains(line, local) {
			continue // as most of thousands of lines
		}
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != local || peer != "" && f[2] != peer || f[3] != "01" {
			continue
		}
		var sent, unread int64
		if _, err := fmt.Sscanf(f[4], "%x:%x", &sent, &unread); err != nil {
			d.t.Fatal(err)
		}
		found = append(found, procSocket{f[2], f[5], unread})
	}
	return found
}

// procAddr returns an address of IPv4 as /proc/net/tcp has it: the address in the byte
// order of the machine, the port in that of numbers.
func procAddr(addr string) string {
	a, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a.IP.To4()), a.Port)
}
