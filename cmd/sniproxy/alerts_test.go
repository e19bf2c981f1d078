package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/sni"
)

// A shape is a way to build a ClientHello.
type shape struct {
	name   string
	kind   byte   // of the name; 0 is host_name
	before []byte // extensions before the server name
	after  []byte // extensions after it

	wrong []string // the lengths that are wrong
	by    int      // and by how much; the result is kept within what a length can be
}

// message returns the handshake message, from RFC 8446, Section 4.1.2 and RFC 6066,
// Section 3.
func (s shape) message() []byte {
	name := append([]byte{s.kind}, s.vector("name", 2, []byte(s.name))...)
	return s.client(s.vector("extensions", 2,
		s.before,
		[]byte{0, 0}, s.vector("server name", 2, s.vector("list", 2, name)),
		s.after))
}

// client returns a handshake message with the extensions, which may be none, as TLS 1.2
// allows.
func (s shape) client(extensions []byte) []byte {
	filler := bytes.Repeat([]byte{0xff}, 32)
	return append([]byte{1}, s.vector("message", 3,
		[]byte{3, 3}, filler,
		s.vector("session", 1, filler),
		s.vector("suites", 2, []byte{0x13, 0x01}),
		s.vector("compression", 1, []byte{0}),
		extensions)...)
}

// vector returns the parts behind their length, which takes size bytes.
func (s shape) vector(what string, size int, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	n := len(body)
	if slices.Contains(s.wrong, what) {
		n = max(0, min(n+s.by, 1<<(8*size)-1))
	}
	var v []byte
	for i := size - 1; i >= 0; i-- {
		v = append(v, byte(n>>(8*i)))
	}
	return append(v, body...)
}

// extension returns an extension with n bytes of data.
func (s shape) extension(kind, n int) []byte {
	return append([]byte{byte(kind >> 8), byte(kind)}, s.vector("other", 2, make([]byte, n))...)
}

// record returns a TLS record. Handshake messages are of type 22.
func record(kind byte, content ...byte) []byte {
	return append([]byte{kind, 3, 1, byte(len(content) >> 8), byte(len(content))}, content...)
}

// records returns a handshake message in records of at most size bytes.
func records(message []byte, size int) []byte {
	var b []byte
	for part := range slices.Chunk(message, size) {
		b = append(b, record(22, part...)...)
	}
	return b
}

const padding = 21 // an extension, RFC 7685

// tell sends b, cut into pieces, and ends its side if end is set, before it reads. It
// returns all that comes back.
func (d *daemon) tell(b []byte, piece int, end bool) ([]byte, error) {
	c, err := net.DialTimeout("tcp", d.addr, patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	for part := range slices.Chunk(b, piece) {
		if _, err := c.Write(part); err != nil {
			return nil, err
		}
	}
	if end {
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(c)
}

// expectRecord fails the test unless got is exactly the alert, and no error came with it.
func expectRecord(t *testing.T, got []byte, err error, want sni.Description) {
	t.Helper()
	if record := []byte{0x15, 3, 3, 0, 2, 2, byte(want)}; err != nil || !bytes.Equal(got, record) {
		t.Errorf("got %x, error %v, want %x", got, err, record)
	}
}

// served is a backend that reads to the end before it answers.
func served(c *net.UnixConn) {
	io.Copy(io.Discard, c)
	io.WriteString(c, "served")
}

func TestAlerts(t *testing.T) {
	// Goal: each kind of bad hello gets its alert, and nothing but the alert and a clean
	// end, however it is cut.
	type test struct {
		name string
		sent []byte
		end  bool // the client's side ends
		want sni.Description
	}
	var tests []test
	add := func(want sni.Description, name string, sent []byte) {
		tests = append(tests, test{name, sent, false, want})
	}
	good := shape{name: "a.example"}.message()

	for _, kind := range []byte{0, 20, 21, 23, 24, 0x80, 255} {
		add(sni.UnexpectedMessage, fmt.Sprintf("first record of type %d", kind), record(kind, good...))
		add(sni.UnexpectedMessage, fmt.Sprintf("record of type %d within the hello", kind),
			slices.Concat(record(22, good[:60]...), record(kind, good[60:]...)))
	}
	add(sni.UnexpectedMessage, "HTTP", []byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	add(sni.UnexpectedMessage, "SSH", []byte("SSH-2.0-OpenSSH_9.9\r\n"))
	add(sni.UnexpectedMessage, "empty alert record within the hello",
		slices.Concat(record(22, good[:60]...), record(21)))
	for _, kind := range []byte{0, 2, 11, 255} {
		add(sni.UnexpectedMessage, fmt.Sprintf("message of type %d", kind), record(22, append([]byte{kind}, good[1:]...)...))
	}

	for _, n := range []int{1<<14 + 1, 1<<14 + 256, 1<<16 - 1} {
		header := []byte{22, 3, 1, byte(n >> 8), byte(n)}
		add(sni.RecordOverflow, fmt.Sprintf("first record of %d bytes", n), header)
		add(sni.RecordOverflow, fmt.Sprintf("second record of %d bytes", n), slices.Concat(record(22, good[:60]...), header))
	}

	const most = 1 << 24
	for _, c := range []struct {
		wrong []string
		by    []int
	}{
		{[]string{"message"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"session"}, []int{most}},
		{[]string{"suites"}, []int{most}},
		{[]string{"compression"}, []int{most}},
		{[]string{"extensions"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"other"}, []int{most}},
		{[]string{"server name"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"list"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"name"}, []int{1, 4, most}},
		{[]string{"list", "name"}, []int{1, 4}},
		{[]string{"server name", "list"}, []int{1, 4}},
		{[]string{"server name", "list", "name"}, []int{1, 4}},
		{[]string{"extensions", "server name", "list", "name"}, []int{1, 4}},
	} {
		for _, by := range c.by {
			s := shape{name: "a.example", wrong: c.wrong, by: by}
			s.before = s.extension(padding, 8)
			add(sni.DecodeError, fmt.Sprintf("wrong by %d: %q", by, c.wrong), record(22, s.message()...))
		}
	}
	noExtensions := shape{}.client(nil)
	for n := range len(noExtensions) - 4 {
		if n > 0 && n < 34 {
			continue // the same as no bytes at all
		}
		add(sni.DecodeError, fmt.Sprintf("message of %d bytes", n),
			record(22, append([]byte{1, 0, 0, byte(n)}, noExtensions[4:4+n]...)...))
	}
	add(sni.DecodeError, "server name extension without content",
		record(22, shape{}.client([]byte{0, 4, 0, 0, 0, 0})...))
	add(sni.DecodeError, "empty record first", record(22))
	add(sni.DecodeError, "empty record within the hello", slices.Concat(record(22, good[:60]...), record(22)))
	for n := range len(record(22, good...)) {
		tests = append(tests, test{fmt.Sprintf("end after %d bytes", n), record(22, good...)[:n], true, sni.DecodeError})
	}
	tests = append(tests, test{"end between records", record(22, good[:60]...), true, sni.DecodeError})

	// A hello has no name only when all of it has come and is valid.
	nameless := record(22, shape{name: "other", kind: 1, after: shape{}.extension(padding, 8)}.message()...)
	for n := len(nameless) - 20; n < len(nameless); n++ {
		tests = append(tests, test{fmt.Sprintf("no host name and end after %d bytes", n), nameless[:n], true, sni.DecodeError})
	}
	add(sni.DecodeError, "no host name and a wrong length behind it", record(22, shape{name: "other", kind: 1,
		after: shape{wrong: []string{"other"}, by: 1}.extension(padding, 8)}.message()...))
	add(sni.DecodeError, "a second server name", record(22, shape{name: "other", kind: 1,
		after: []byte{0, 0, 0, 6, 0, 4, 0, 0, 1, 'a'}}.message()...))
	add(sni.DecodeError, "empty list of names", record(22, shape{}.client([]byte{0, 6, 0, 0, 0, 2, 0, 0})...))
	add(sni.UnexpectedMessage, "another record type before the end of a hello without a name",
		slices.Concat(record(22, nameless[5:len(nameless)-1]...), record(21, 2, 0)))

	late := slices.Concat(hello64K(1), make([]byte, 100))
	add(sni.InternalError, "name ends behind 64 KiB", late[:64<<10])
	add(sni.InternalError, "name ends behind 64 KiB, and more", late)
	add(sni.InternalError, "records of one byte, 66 KB in all",
		records(shape{name: "a.example", before: shape{}.extension(padding, 11_000)}.message(), 1))

	add(sni.UnrecognizedName, "no extensions", record(22, noExtensions...))
	add(sni.UnrecognizedName, "no extension", record(22, shape{}.client([]byte{0, 0})...))
	add(sni.UnrecognizedName, "no server name",
		record(22, shape{}.client(shape{}.vector("", 2, shape{}.extension(padding, 8)))...))
	add(sni.UnrecognizedName, "no host name", record(22, shape{name: "a.example", kind: 1}.message()...))
	add(sni.UnrecognizedName, "no host name, and extensions behind it", nameless)
	add(sni.UnrecognizedName, "no host name, and more behind the hello", append(nameless[:len(nameless):len(nameless)], record(21)...))
	add(sni.UnrecognizedName, "empty name", record(22, shape{}.message()...))
	add(sni.UnrecognizedName, "bad name", record(22, shape{name: "a example"}.message()...))
	add(sni.UnrecognizedName, "unknown name", record(22, shape{name: "unknown.example"}.message()...))

	d := start(t)
	d.serve("a.example", served)
	for _, good := range [][]byte{record(22, good...), hello64K(0)} {
		if got, err := d.tell(good, len(good), true); err != nil || string(got) != "served" {
			t.Fatalf("a good hello got %q, error %v", got, err)
		}
	}
	base := d.fds()
	for _, c := range tests {
		for _, piece := range []int{1 << 20, 1} {
			t.Run(fmt.Sprintf("%s in pieces of %d", c.name, piece), func(t *testing.T) {
				got, err := d.tell(c.sent, piece, c.end)
				expectRecord(t, got, err, c.want)
			})
		}
	}
	d.awaitFds(base)
}

// hello64K returns a hello for a.example in full records with the end of the name so many
// bytes behind the first 64 KiB.
func hello64K(beyond int) []byte {
	for n := 65_000; ; n++ {
		b := records(shape{name: "a.example", before: shape{}.extension(padding, n)}.message(), 1<<14)
		if len(b) == 64<<10+beyond {
			return b
		}
	}
}

func TestLimitsNotReached(t *testing.T) {
	// Goal: what is just within the limits is served, however it is cut: a record of 2^14
	// bytes, a name that ends with the 65,536th byte, records of one byte, an end of the
	// client's side right behind the name.
	d := start(t)
	d.serve("a.example", served)
	full := shape{name: "a.example"}
	full.after = shape{}.extension(padding, 1<<14-4-len(full.message()))
	for name, sent := range map[string][]byte{
		"full record":   record(22, full.message()...),
		"64 KiB":        hello64K(0),
		"small records": records(shape{name: "a.example"}.message(), 1),
		"small hello":   record(22, shape{name: "a.example"}.message()...),
	} {
		for _, piece := range []int{1 << 20, 1} {
			t.Run(fmt.Sprintf("%s in pieces of %d", name, piece), func(t *testing.T) {
				if got, err := d.tell(sent, piece, true); err != nil || string(got) != "served" {
					t.Errorf("got %q, error %v", got, err)
				}
			})
		}
	}
}

func TestAlertsArrive(t *testing.T) {
	// Goal: 100 of 100 clients that have sent all they have before they read get the alert
	// and a clean end, also when much of it comes after the name, or all of it is HTTP.
	unknown := shape{name: "unknown.example"}
	padded := unknown
	padded.after = shape{}.extension(padding, 8<<10)
	d := start(t)
	base := d.fds()
	for _, c := range []struct {
		name string
		sent []byte
		want sni.Description
	}{
		{"padding", record(22, padded.message()...), sni.UnrecognizedName},
		{"pipelined data", append(record(22, unknown.message()...), make([]byte, 12_000)...), sni.UnrecognizedName},
		{"HTTP", []byte("GET /" + strings.Repeat("a", 8<<10) + " HTTP/1.1\r\n\r\n"), sni.UnexpectedMessage},
	} {
		for _, piece := range []int{1 << 20, 1400, 100} {
			t.Run(fmt.Sprintf("%s in pieces of %d", c.name, piece), func(t *testing.T) {
				for range 100 {
					got, err := d.tell(c.sent, piece, false)
					expectRecord(t, got, err, c.want)
				}
			})
		}
	}
	d.awaitFds(base)
}

func TestRefusedUpload(t *testing.T) {
	// Goal: a refused client that never reads, and sends without end, is cut off: one that
	// sends as fast as it can within a bounded size, one that sends a little at a time, or
	// nothing more, within a bounded time; until then it can send.
	t.Parallel() // it waits for that time
	d := start(t)
	base := d.fds()
	unknown := record(22, shape{name: "unknown.example"}.message()...)
	t.Run("fast", func(t *testing.T) {
		c := d.dial()
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		c.Write(unknown)
		const bound = 64 << 20 // socket buffers take a few megabytes
		for b, size := make([]byte, 64<<10), 0; ; size += len(b) {
			if _, err := c.Write(b); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("the connection stays open")
				}
				break
			}
			if size > bound {
				t.Fatal("all input is read")
			}
		}
	})
	t.Run("slow", func(t *testing.T) {
		c := d.dial()
		defer c.Close()
		c.Write(unknown)
		await(t, "the daemon to close a slow connection", func() bool {
			_, err := c.Write([]byte{0})
			return err != nil
		})
	})
	t.Run("end first", func(t *testing.T) {
		// The client sees the end while the daemon still reads what it sends.
		c := d.dial()
		defer c.Close()
		c.Write(unknown)
		got, err := io.ReadAll(c)
		expectRecord(t, got, err, sni.UnrecognizedName)
		for range 10 {
			if _, err := c.Write([]byte{0}); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("silent", func(t *testing.T) {
		c := d.dial()
		defer c.Close()
		c.Write(unknown)
		await(t, "the daemon to have the connection", func() bool { return d.fds() > base })
		d.awaitFds(base)
	})
}

func TestTenSeconds(t *testing.T) {
	// Goal: ten seconds after it was accepted, not before, a connection without a complete
	// name gets its alert, whether or not bytes still come; a relay is not bound by them,
	// whether its hello came at once or in pieces.
	t.Parallel()
	d := start(t)
	d.serve("a.example", echo)
	quick := openEcho(t, d, "a.example")
	slow := openRelay{d.dial(), t}
	for _, b := range hello("a.example") {
		if _, err := slow.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	slow.works()

	b := record(22, shape{name: "a.example"}.message()...)
	var clients sync.WaitGroup
	for _, n := range []int{0, 1, len(b) - 1} {
		clients.Go(func() { expectTimeout(t, d, b[:n], nil) })
	}
	clients.Go(func() { expectTimeout(t, d, nil, b) })
	clients.Wait()

	quick.works()
	slow.works()
}

// expectTimeout connects, sends some bytes at once, then one per second of the others. It
// fails the test unless the alert comes after ten seconds.
func expectTimeout(t *testing.T, d *daemon, first, others []byte) {
	begin := time.Now()
	c, err := d.tryDial()
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	if _, err := c.Write(first); err != nil {
		t.Error(err)
		return
	}
	c.SetReadDeadline(time.Now().Add(patience))
	go func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for i := range others {
			<-tick.C
			if _, err := c.Write(others[i : i+1]); err != nil {
				return
			}
		}
	}()
	got, err := io.ReadAll(c)
	expectRecord(t, got, err, sni.UserCanceled)
	if waited := time.Since(begin); waited < 10*time.Second {
		t.Errorf("the alert came after %v", waited)
	}
}

func TestBacklogStaysFull(t *testing.T) {
	// Goal: a client of a backend whose backlog is full for ten seconds gets
	// internal_error, not before; nobody else is hurt.
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	t.Parallel()
	d := start(t)
	d.serve("b.example", greet)
	fillBacklog(t, d.hostPath("a.example", "tls-socket"))
	begin := time.Now()
	c := d.dial()
	if _, err := c.Write(hello("a.example")); err != nil {
		t.Fatal(err)
	}
	if err := d.greeted("b.example"); err != nil {
		t.Error(err)
	}
	got, err := io.ReadAll(c)
	expectRecord(t, got, err, sni.InternalError)
	// The last attempt may be a little before the end.
	if waited := time.Since(begin); waited < 9*time.Second {
		t.Errorf("given up after %v", waited)
	}
}

// fillBacklog makes a socket that listens, but has no room for more connections.
func fillBacklog(t *testing.T, path string) {
	t.Helper()
	addr := &unix.SockaddrUnix{Name: path}
	socket := func() int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.SetNonblock(fd, true); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	backend := socket()
	if err := unix.Bind(backend, addr); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(backend, 0); err != nil {
		t.Fatal(err)
	}
	for {
		switch err := unix.Connect(socket(), addr); err {
		case nil:
		case unix.EAGAIN:
			return
		default:
			t.Fatal(err)
		}
	}
}
