package main

import (
	"bytes"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/ech"
	"sniproxy/sni/snitest"
)

// A hiddenTalk is a connection to hidden.example, whose bytes a test chooses on both ends.
type hiddenTalk struct {
	t       testing.TB
	client  *net.TCPConn
	backend *net.UnixConn
	sealer  *snitest.Sealer
}

// innerStream returns the inner hello for a name that a backend gets, and what comes before it,
// with a record version.
func innerStream(name string, version byte) []byte {
	b := snitest.ClientHello{SessionID: 32, Extensions: func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.HostName, name) })
		m.Extension(snitest.SupportedVersions, []byte{2, 3, 4})
		m.Extension(snitest.ECH, []byte{1})
	}}.Build().Stream()
	b[2] = version
	return b
}

// seal returns a hello for a hidden name.
func seal(s *snitest.Sealer, name string) []byte {
	return s.Seal("public.example", snitest.Inner(name, nil), nil, nil).Stream()
}

// talk has a client send a hello, and more behind it, and a backend take the hello.
func (d *hidden) talk(l *net.UnixListener, more []byte) *hiddenTalk {
	d.t.Helper()
	k := &hiddenTalk{t: d.t, client: d.dial(), sealer: snitest.NewSealer(d.key.ConfigList())}
	say(d.t, k.client, append(seal(k.sealer, "hidden.example"), more...))
	k.sealer.Enc = nil
	l.SetDeadline(time.Now().Add(hostdirtest.Patience))
	backend, err := l.AcceptUnix()
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { backend.Close() })
	backend.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	k.backend = backend
	k.gets(backend, "hello", innerStream("hidden.example", 1))
	return k
}

// gets fails the test unless bytes arrive.
func (k *hiddenTalk) gets(c net.Conn, what string, want []byte) {
	k.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		k.t.Fatalf("%s: %x came, error %v, want %x", what, got[:n], err, want)
	}
}

// passes fails the test unless bytes pass.
func (k *hiddenTalk) passes(what string, from, to net.Conn, b []byte) {
	k.t.Helper()
	say(k.t, from, b)
	k.gets(to, what, b)
}

// hiddenBackend makes hidden.example a host whose backend the test is.
func (d *hidden) hiddenBackend() *net.UnixListener {
	d.t.Helper()
	hostdirtest.Must(d.t, os.Remove(d.hostPath("hidden.example", "tls-socket")))
	return d.host("hidden.example")
}

// What a client sends besides hellos: change_cipher_spec, early data, and other data.
var (
	changeCipherSpec = snitest.Record(20, 1)
	earlyData        = slices.Concat(changeCipherSpec, snitest.Record(23, randomBytes(9000)...), snitest.Record(23, 1))
	retryRequest     = append(snitest.ServerHello(true), changeCipherSpec...)
)

// Goal: early data reaches the backend with the hello, before that has said anything. If the
// backend takes it all else passes unchanged; if it asks for a second hello, that is opened, and
// its record version is that of TLS 1.2.
func TestECHEarlyData(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()

	k := d.talk(l, earlyData)
	k.gets(k.backend, "early data", earlyData)
	k.passes("more early data", k.client, k.backend, earlyData)
	k.passes("the answer", k.backend, k.client, snitest.ServerHello(false))
	k.passes("what follows", k.client, k.backend, slices.Concat(snitest.Record(23, randomBytes(5000)...), snitest.Record(22, 9, 9), seal(k.sealer, "x.example"), []byte("anything")))
	k.passes("what follows", k.backend, k.client, randomBytes(100_000))

	for _, cut := range []int{1, 7, 1 << 20} {
		k = d.talk(l, earlyData)
		k.gets(k.backend, "early data", earlyData)
		k.passes("the request for another hello", k.backend, k.client, retryRequest)
		k.passes("more early data", k.client, k.backend, earlyData)
		second := slices.Concat(changeCipherSpec, seal(k.sealer, "hidden.example"), snitest.Record(23, 5, 5))
		for part := range slices.Chunk(second, cut) {
			say(t, k.client, part)
		}
		k.gets(k.backend, "the second hello", slices.Concat(changeCipherSpec, innerStream("hidden.example", 3), snitest.Record(23, 5, 5)))
		k.passes("the answer", k.backend, k.client, snitest.ServerHello(false))
		k.passes("what follows", k.client, k.backend, slices.Concat(snitest.Record(22, 9, 9), randomBytes(200_000)))
	}
}

// Goal: what may be a second hello waits for the backend's answer, and nothing of it is lost: not
// if that is no TLS, not if the backend ends what it sends, or all, and not if the client ends.
func TestECHHeldBack(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()
	begin := func() (*hiddenTalk, []byte) {
		k := d.talk(l, changeCipherSpec)
		k.gets(k.backend, "what is no hello", changeCipherSpec)
		held := slices.Concat(seal(k.sealer, "hidden.example"), earlyData)
		say(t, k.client, held)
		return k, held
	}
	expectEmpty := func(k *hiddenTalk) {
		t.Helper()
		hostdirtest.Await(t, "the proxy to have read all", func() bool {
			sockets := d.sockets(k.client.LocalAddr())
			return len(sockets) == 1 && sockets[0].unread == 0
		})
		if unread(k.backend) {
			t.Error("something has passed")
		}
	}
	answers := map[string]func(k *hiddenTalk){
		"no TLS":           func(k *hiddenTalk) { k.passes("H", k.backend, k.client, []byte("H")) },
		"an alert":         func(k *hiddenTalk) { k.passes("alert", k.backend, k.client, snitest.Record(21, 2, 40)) },
		"a ServerHello":    func(k *hiddenTalk) { k.passes("hello", k.backend, k.client, snitest.ServerHello(false)) },
		"an end":           func(k *hiddenTalk) { hostdirtest.Must(t, k.backend.CloseWrite()) },
		"half and an end":  func(k *hiddenTalk) { say(t, k.backend, snitest.ServerHello(true)[:40]); k.backend.CloseWrite() },
		"the client's end": func(k *hiddenTalk) { hostdirtest.Must(t, k.client.CloseWrite()) },
	}
	for what, answer := range answers {
		t.Run(what, func(t *testing.T) {
			k, held := begin()
			k.t = t
			expectEmpty(k)
			answer(k)
			k.gets(k.backend, what, held)
			if what == "the client's end" {
				if err := expectEnd(k.backend); err != nil {
					t.Error(err)
				}
				k.passes("the answer", k.backend, k.client, []byte("later"))
				return
			}
			k.passes("what follows", k.client, k.backend, snitest.Record(22, randomBytes(100_000)[:16384]...))
			if strings.HasSuffix(what, "an end") {
				k.client.CloseWrite()
				if err := expectEnd(k.backend); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// A second hello that came before the request for it is opened all the same.
	k, _ := begin()
	expectEmpty(k)
	k.passes("the request", k.backend, k.client, retryRequest)
	k.gets(k.backend, "the second hello", append(innerStream("hidden.example", 3), earlyData...))
	k.passes("what follows", k.client, k.backend, randomBytes(1000))
	// What a client sends that waits for nothing is bounded.
	k = d.talk(l, nil)
	record := snitest.Record(22, make([]byte, 16384)...)
	for range 5 {
		k.client.Write(record)
	}
	got, err := io.ReadAll(k.client)
	expectRecord(t, got, err, sni.InternalError)
	d.err.Await(t, "more than 64 KiB of handshake records before the backend has answered (alert 80, internal_error)")
}

// wrongSeconds are second hellos, and what a client that sends them is told.
var wrongSeconds = []struct {
	what  string
	hello func(s *snitest.Sealer) []byte
	want  sni.Description
	line  string
}{
	{"no extension", func(*snitest.Sealer) []byte { return snitest.Named("public.example").Stream() }, sni.MissingExtension, "client hello has no encrypted_client_hello extension"},
	{"type inner", func(*snitest.Sealer) []byte { return withECH([]byte{1}) }, sni.IllegalParameter, "encrypted_client_hello extension of type inner from the network"},
	{"malformed", func(s *snitest.Sealer) []byte { return withECH(s.Extension([]byte{1})[:9]) }, sni.DecodeError, "malformed encrypted_client_hello extension"},
	{"another id", func(s *snitest.Sealer) []byte { s.ID++; return seal(s, "hidden.example") }, sni.IllegalParameter, "config id or cipher suite is not that of the first client hello"},
	{"another suite", func(s *snitest.Sealer) []byte { s.AEAD++; return seal(s, "hidden.example") }, sni.IllegalParameter, "config id or cipher suite is not that of the first client hello"},
	{"a key", func(s *snitest.Sealer) []byte { s.Enc = make([]byte, 32); return seal(s, "hidden.example") }, sni.IllegalParameter, "client hello has an encapsulated key of its own"},
	{"changed", func(s *snitest.Sealer) []byte { b := seal(s, "hidden.example"); b[len(b)-1] ^= 1; return b }, sni.DecryptError, "client hello cannot be decrypted"},
	{"bad padding", func(s *snitest.Sealer) []byte {
		return s.Seal("public.example", append(snitest.Inner("hidden.example", nil), 1), nil, nil).Stream()
	}, sni.IllegalParameter, "padding of the inner client hello is not zero"},
	{"no hello", func(*snitest.Sealer) []byte { return snitest.Record(22, 11, 0, 0, 0) }, sni.UnexpectedMessage, "message is not a client hello"},
	{"another record", func(s *snitest.Sealer) []byte { return append(seal(s, "hidden.example")[:0:0], 22, 3, 3, 0, 1, 1, 20) }, sni.UnexpectedMessage, "another record type within the client hello"},
	{"too long", func(*snitest.Sealer) []byte { return hello64K(1) }, sni.InternalError, "no end of the client hello within the first 64 KiB"},
}

// withECH returns a hello with an encrypted_client_hello extension.
func withECH(body []byte) []byte {
	return helloWith(func(m *snitest.Message) {
		m.ServerName(func() { m.Entry(snitest.HostName, "public.example") })
		m.Extension(snitest.ECH, body)
	}).Stream()
}

// Goal: a second hello that is no good gets the alert of the RFC, behind what the backend has sent,
// and a line in the log. Nothing of it reaches the backend.
func TestECHSecond(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	hostdirtest.Touch(t, d.hostPath("hidden.example", "log-connections"))
	l := d.hiddenBackend()
	alerts := map[int]int{}
	for _, test := range wrongSeconds {
		t.Run(test.what, func(t *testing.T) {
			k := d.talk(l, nil)
			k.t = t
			k.passes("the request", k.backend, k.client, retryRequest)
			k.passes("what is no hello", k.client, k.backend, changeCipherSpec)
			k.client.Write(test.hello(k.sealer))
			got, err := io.ReadAll(k.client)
			expectRecord(t, got, err, test.want)
			if err := expectEnd(k.backend); err != nil {
				t.Error(err)
			}
			d.err.Await(t, "refused "+k.client.LocalAddr().String()+" for hidden.example: after a HelloRetryRequest: "+test.line+" (alert ")
			k.client.Close()
			if line := d.served(k.client.LocalAddr()); !strings.HasSuffix(line, "refused within the handshake") {
				t.Errorf("the line says %q", line)
			}
		})
		alerts[int(test.want)]++
	}
	c := d.counters()
	for alert, n := range c.alerts() {
		if alerts[alert] != n {
			t.Errorf("alert %d was counted %d times, want %d", alert, n, alerts[alert])
		}
		delete(alerts, alert)
	}
	if len(alerts) > 0 {
		t.Errorf("these alerts were not counted: %v", alerts)
	}
	// An end within it.
	k := d.talk(l, nil)
	k.passes("the request", k.backend, k.client, retryRequest)
	say(t, k.client, seal(k.sealer, "hidden.example")[:50])
	k.client.CloseWrite()
	got, err := io.ReadAll(k.client)
	expectRecord(t, got, err, sni.DecodeError)
	// An end in place of it is an end.
	k = d.talk(l, nil)
	k.passes("the request", k.backend, k.client, retryRequest)
	k.client.CloseWrite()
	if err := expectEnd(k.backend); err != nil {
		t.Error(err)
	}
	k.passes("more", k.backend, k.client, []byte("more"))
	// Where the alert does not fit, in the middle of what the client does not take, it is reset.
	k = d.talk(l, nil)
	k.passes("the request", k.backend, k.client, retryRequest)
	hostdirtest.Must(t, k.backend.SetWriteDeadline(time.Now().Add(time.Second)))
	k.backend.Write(make([]byte, 64<<20))
	k.client.Write(withECH([]byte{1}))
	d.err.Await(t, "refused "+k.client.LocalAddr().String())
	if _, err := io.Copy(io.Discard, k.client); !isReset(err) {
		t.Errorf("the end is %v, want a reset", err)
	}
}

// Goal: the second hello has ten seconds from the request for it, whenever that came, and a client
// without one is told so. The whole first hello has ten seconds from accept.
func TestECHLate(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()
	k := d.talk(l, nil)
	slow := d.talk(l, nil)
	first := d.dial()
	hello := snitest.Hello("public.example")
	say(t, first, hello[:len(hello)-1])
	late := time.After(limits.Hello - 2*time.Second)
	begin := time.Now()
	k.passes("the request", k.backend, k.client, retryRequest)
	say(t, k.client, seal(k.sealer, "hidden.example")[:50])

	<-late
	slow.passes("the request", slow.backend, slow.client, retryRequest)
	got, err := io.ReadAll(first)
	expectRecord(t, got, err, sni.UserCanceled)
	d.err.Await(t, "for public.example: no complete client hello within the time limit (alert 90, user_canceled)")
	k.client.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
	got, err = io.ReadAll(k.client)
	expectRecord(t, got, err, sni.UserCanceled)
	if took := time.Since(begin); took < limits.Hello {
		t.Errorf("the alert came after %v", took)
	}
	d.err.Await(t, "for hidden.example: no complete second client hello within the time limit (alert 90, user_canceled)")
	say(t, slow.client, seal(slow.sealer, "hidden.example"))
	slow.gets(slow.backend, "the second hello", innerStream("hidden.example", 3))
}

// Goal: a stop in the middle of a request for another hello waits for it, and the client is served.
func TestECHStop(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()
	k := d.talk(l, nil)
	k.passes("the request", k.backend, k.client, retryRequest)
	d.signal(syscall.SIGTERM)
	d.out.Await(t, "got SIGTERM, shutting down")
	d.awaitRefused()
	say(t, k.client, seal(k.sealer, "hidden.example"))
	k.gets(k.backend, "the second hello", innerStream("hidden.example", 3))
	k.passes("the answer", k.backend, k.client, snitest.ServerHello(false))
	k.passes("what follows", k.client, k.backend, randomBytes(1000))
	k.client.Close()
	k.backend.Close()
	d.expectExit(0)
}

// Goal: hellos that are not encrypted to a key pass byte for byte, however they are cut.
func TestECHUntouched(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	d.serve("raw.example", func(c *net.UnixConn) {
		b, _ := io.ReadAll(c)
		c.Write(b)
	})
	other, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	raw := func(s *snitest.Sealer) []byte {
		return s.Seal("raw.example", snitest.Inner("hidden.example", nil), nil, nil).Bytes
	}
	grease := snitest.NewSealer(other.ConfigList())
	grease.ID = d.key.ID()
	changed := raw(snitest.NewSealer(d.key.ConfigList()))
	changed[len(changed)-1] ^= 1
	trailing := append(snitest.Named("raw.example").Bytes, 0)
	for what, msg := range map[string][]byte{
		"no extension":  snitest.Payload(snitest.Hello("raw.example")),
		"another's key": raw(snitest.NewSealer(other.ConfigList())),
		"GREASE":        raw(grease),
		"changed":       changed,
		"bytes behind":  trailing,
		"bad extensions": snitest.ClientHello{Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "raw.example") })
			m.Raw(0, 10, 0, 9, 1)
		}}.Build().Bytes,
	} {
		for _, records := range []int{1, 50, 16384} {
			for _, size := range []int{1, 100, 1 << 20} {
				stream := slices.Concat(snitest.Records(msg, records), changeCipherSpec, []byte("anything"))
				c := d.dial()
				for part := range slices.Chunk(stream, size) {
					say(t, c, part)
				}
				c.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, stream) {
					t.Errorf("%s, records of %d, pieces of %d: %x passed, error %v, want %x", what, records, size, got, err, stream)
				}
			}
		}
	}
}
