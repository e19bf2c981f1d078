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

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// helloWith returns a ClientHello with the extensions that a function appends.
func helloWith(extensions func(m *snitest.Message)) *snitest.Message {
	return snitest.ClientHello{SessionID: 32, Extensions: extensions}.Build()
}

// padded returns a ClientHello with a padding extension of so many bytes before the server name.
func padded(name string, n int) *snitest.Message {
	return helloWith(func(m *snitest.Message) {
		m.Extension(snitest.Padding, make([]byte, n))
		m.ServerName(func() { m.Entry(snitest.HostName, name) })
	})
}

// paddedBehind is padded with the padding behind the server name.
func paddedBehind(name string, n int) *snitest.Message {
	return helloWith(func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.HostName, name) })
		m.Extension(snitest.Padding, make([]byte, n))
	})
}

// otherName returns a ClientHello whose server name is of a type that nobody uses, with more
// extensions behind it.
func otherName(more func(m *snitest.Message)) *snitest.Message {
	return helloWith(func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.OtherName, "other") })
		more(m)
	})
}

// wrong makes some lengths of a message wrong, by as much as they can be.
func wrong(m *snitest.Message, by int, lengths ...string) *snitest.Message {
	for _, l := range m.Lengths {
		if slices.Contains(lengths, l.Of) {
			m.Set(l, max(0, min(m.Get(l)+by, 1<<(8*l.Size)-1)))
		}
	}
	return m
}

// tell sends b, cut into pieces, and ends its side if end is set, before it reads. It
// returns all that comes back.
func (d *daemon) tell(b []byte, piece int, end bool) ([]byte, error) {
	c, err := net.DialTimeout("tcp", d.addr, hostdirtest.Patience)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
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

// Goal: each kind of bad hello gets its alert, and nothing but the alert and a clean end, however
// it is cut.
func TestAlerts(t *testing.T) {
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
	good := snitest.Named("a.example").Bytes

	for _, kind := range []byte{0, 20, 21, 23, 24, 0x80, 255} {
		add(sni.UnexpectedMessage, fmt.Sprintf("first record of type %d", kind), snitest.Record(kind, good...))
		add(sni.UnexpectedMessage, fmt.Sprintf("record of type %d within the hello", kind),
			slices.Concat(snitest.Record(22, good[:60]...), snitest.Record(kind, good[60:]...)))
	}
	add(sni.UnexpectedMessage, "HTTP", []byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	add(sni.UnexpectedMessage, "SSH", []byte("SSH-2.0-OpenSSH_9.9\r\n"))
	add(sni.UnexpectedMessage, "empty alert record within the hello",
		slices.Concat(snitest.Record(22, good[:60]...), snitest.Record(21)))
	for _, kind := range []byte{0, 2, 11, 255} {
		add(sni.UnexpectedMessage, fmt.Sprintf("message of type %d", kind), snitest.Record(22, append([]byte{kind}, good[1:]...)...))
	}

	for _, n := range []int{1<<14 + 1, 1<<14 + 256, 1<<16 - 1} {
		header := []byte{22, 3, 1, byte(n >> 8), byte(n)}
		add(sni.RecordOverflow, fmt.Sprintf("first record of %d bytes", n), header)
		add(sni.RecordOverflow, fmt.Sprintf("second record of %d bytes", n), slices.Concat(snitest.Record(22, good[:60]...), header))
	}

	const most = 1 << 24
	for _, c := range []struct {
		wrong []string
		by    []int
	}{
		{[]string{"message"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"session id"}, []int{most}},
		{[]string{"cipher suites"}, []int{most}},
		{[]string{"compression methods"}, []int{most}},
		{[]string{"extensions"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"extension 21"}, []int{most}},
		{[]string{"server name"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"server name list"}, []int{-most, -4, -1, 1, 4, most}},
		{[]string{"host name"}, []int{1, 4, most}},
		{[]string{"server name list", "host name"}, []int{1, 4}},
		{[]string{"server name", "server name list"}, []int{1, 4}},
		{[]string{"server name", "server name list", "host name"}, []int{1, 4}},
		{[]string{"extensions", "server name", "server name list", "host name"}, []int{1, 4}},
	} {
		for _, by := range c.by {
			add(sni.DecodeError, fmt.Sprintf("wrong by %d: %q", by, c.wrong), wrong(padded("a.example", 8), by, c.wrong...).Stream())
		}
	}
	noExtensions := snitest.ClientHello{SessionID: 32}.Build().Bytes
	for n := range len(noExtensions) - 4 {
		if n > 0 && n < 34 {
			continue // the same as no bytes at all
		}
		add(sni.DecodeError, fmt.Sprintf("message of %d bytes", n),
			snitest.Record(22, append([]byte{1, 0, 0, byte(n)}, noExtensions[4:4+n]...)...))
	}
	add(sni.DecodeError, "server name extension without content",
		helloWith(func(m *snitest.Message) { m.Extension(0, nil) }).Stream())
	add(sni.DecodeError, "empty record first", snitest.Record(22))
	add(sni.DecodeError, "empty record within the hello", slices.Concat(snitest.Record(22, good[:60]...), snitest.Record(22)))
	for n := range len(snitest.Record(22, good...)) {
		tests = append(tests, test{fmt.Sprintf("end after %d bytes", n), snitest.Record(22, good...)[:n], true, sni.DecodeError})
	}
	tests = append(tests, test{"end between records", snitest.Record(22, good[:60]...), true, sni.DecodeError})

	// A hello has no name only when all of it has come and is valid.
	pad := func(m *snitest.Message) { m.Extension(snitest.Padding, make([]byte, 8)) }
	nameless := otherName(pad).Stream()
	for n := len(nameless) - 20; n < len(nameless); n++ {
		tests = append(tests, test{fmt.Sprintf("no host name and end after %d bytes", n), nameless[:n], true, sni.DecodeError})
	}
	add(sni.DecodeError, "no host name and a wrong length behind it", wrong(otherName(pad), 1, "extension 21").Stream())
	add(sni.DecodeError, "a second server name", otherName(func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.HostName, "a") })
	}).Stream())
	add(sni.DecodeError, "empty list of names", snitest.NameList(func(*snitest.Message) {}).Stream())
	add(sni.UnexpectedMessage, "another record type before the end of a hello without a name",
		slices.Concat(snitest.Record(22, nameless[5:len(nameless)-1]...), snitest.Record(21, 2, 0)))

	late := slices.Concat(hello64K(1), make([]byte, 100))
	add(sni.InternalError, "name ends behind 64 KiB", late[:64<<10])
	add(sni.InternalError, "name ends behind 64 KiB, and more", late)
	add(sni.InternalError, "records of one byte, 66 KB in all",
		snitest.Records(padded("a.example", 11_000).Bytes, 1))

	add(sni.UnrecognizedName, "no extensions", snitest.Record(22, noExtensions...))
	add(sni.UnrecognizedName, "no extension", helloWith(func(*snitest.Message) {}).Stream())
	add(sni.UnrecognizedName, "no server name", helloWith(pad).Stream())
	add(sni.UnrecognizedName, "no host name", otherName(func(*snitest.Message) {}).Stream())
	add(sni.UnrecognizedName, "no host name, and extensions behind it", nameless)
	add(sni.UnrecognizedName, "no host name, and more behind the hello", append(nameless[:len(nameless):len(nameless)], snitest.Record(21)...))
	add(sni.UnrecognizedName, "empty name", snitest.Named("").Stream())
	add(sni.UnrecognizedName, "bad name", snitest.Named("a example").Stream())
	add(sni.UnrecognizedName, "unknown name", snitest.Named("unknown.example").Stream())

	d := start(t)
	d.serve("a.example", served)
	for _, good := range [][]byte{snitest.Record(22, good...), hello64K(0)} {
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
		b := padded("a.example", n).Stream()
		if len(b) == 64<<10+beyond {
			return b
		}
	}
}

// Goal: what is just within the limits is served, however it is cut: a record of 2^14 bytes, a name
// that ends with the 65,536th byte, records of one byte, a client that ends its side right behind
// the name.
func TestLimitsNotReached(t *testing.T) {
	d := start(t)
	d.serve("a.example", served)
	full := paddedBehind("a.example", 1<<14-len(paddedBehind("a.example", 0).Bytes))
	for name, sent := range map[string][]byte{
		"full record":   full.Stream(),
		"64 KiB":        hello64K(0),
		"small records": snitest.Records(snitest.Named("a.example").Bytes, 1),
		"small hello":   snitest.Named("a.example").Stream(),
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

// Goal: 100 of 100 clients that send everything before they read get the alert and a clean end,
// even if much comes after the name, or all of it is HTTP.
func TestAlertsArrive(t *testing.T) {
	const unknown = "unknown.example"
	d := start(t)
	base := d.fds()
	for _, c := range []struct {
		name string
		sent []byte
		want sni.Description
	}{
		{"padding", paddedBehind(unknown, 8<<10).Stream(), sni.UnrecognizedName},
		{"pipelined data", append(snitest.Named(unknown).Stream(), make([]byte, 12_000)...), sni.UnrecognizedName},
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

// Goal: a refused client that never reads and never stops sending is cut off. One that sends fast
// is cut off after a bounded number of bytes, one that sends slowly or not at all after a bounded
// time. Until then it can send.
func TestRefusedUpload(t *testing.T) {
	t.Parallel() // it waits for that time
	d := start(t)
	base := d.fds()
	unknown := snitest.Named("unknown.example").Stream()
	t.Run("fast", func(t *testing.T) {
		c := d.dial()
		defer c.Close()
		c.SetDeadline(time.Now().Add(hostdirtest.Patience))
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
		hostdirtest.Await(t, "the daemon to close a slow connection", func() bool {
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
		hostdirtest.Await(t, "the daemon to have the connection", func() bool { return d.fds() > base })
		d.awaitFds(base)
	})
}

// Goal: a connection without a complete name gets its alert ten seconds after it was accepted, not
// before, whether or not bytes still come. The limit does not bind a relay, whether its hello came
// at once or in pieces.
func TestTenSeconds(t *testing.T) {
	t.Parallel()
	d := start(t)
	d.serve("a.example", hostdirtest.Echo)
	quick := openEcho(t, d, "a.example")
	slow := openRelay{d.dial(), t}
	for _, b := range snitest.Hello("a.example") {
		if _, err := slow.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	slow.works()

	b := snitest.Named("a.example").Stream()
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
	c.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
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

// Goal: if a backend's backlog stays full, its client gets internal_error after ten seconds, not
// before. Other hosts are served meanwhile.
func TestBacklogStaysFull(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	t.Parallel()
	d := start(t)
	d.serve("b.example", hostdirtest.Greet)
	hostdirtest.FillBacklog(t, d.hostDir("a.example"))
	begin := time.Now()
	c := d.dial()
	if _, err := c.Write(snitest.Hello("a.example")); err != nil {
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
