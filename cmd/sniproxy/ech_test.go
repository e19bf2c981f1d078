package main

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/ech"
	"sniproxy/sni/snitest"
)

// A hidden is a daemon with a key for Encrypted Client Hello, and hosts: public.example, whose name
// everybody sees, and hidden.example. Their backends send back what they get.
type hidden struct {
	*daemon
	ca  *authority
	key *ech.Key
}

// startHidden starts such a daemon.
func startHidden(t testing.TB, setups ...setup) *hidden {
	t.Helper()
	key, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	dir := hostdirtest.Dir(t)
	hostdirtest.Must(t, os.Mkdir(filepath.Join(dir, ".ech"), 0o700))
	putKey(t, dir, "a.pem", key)
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	d := &hidden{daemon: startOn(t, l, dir, setups...), ca: newAuthority(t), key: key}
	l.Close()
	d.echo("public.example")
	d.echo("hidden.example")
	return d
}

// putKey renames a key file into place.
func putKey(t testing.TB, hosts, name string, key *ech.Key) {
	t.Helper()
	path := filepath.Join(hosts, ".ech", name)
	hostdirtest.Must(t, os.WriteFile(filepath.Join(hosts, ".ech", ".new"), key.MarshalPEM(), 0o600))
	hostdirtest.Must(t, os.Rename(filepath.Join(hosts, ".ech", ".new"), path))
}

// echo makes a host with a TLS server that sends back what it gets.
func (d *hidden) echo(name string, change ...func(*tls.Config)) {
	d.t.Helper()
	config := &tls.Config{Certificates: []tls.Certificate{d.ca.issue(d.t, name)}}
	for _, c := range change {
		c(config)
	}
	d.serve(name, func(c *net.UnixConn) {
		s := tls.Server(c, config)
		io.Copy(s, s)
		s.Close()
	})
}

// client is the configuration of a client of hidden.example.
func (d *hidden) client(change ...func(*tls.Config)) *tls.Config {
	config := &tls.Config{
		ServerName:                     "hidden.example",
		RootCAs:                        d.ca.pool,
		EncryptedClientHelloConfigList: d.key.ConfigList(),
	}
	for _, c := range change {
		c(config)
	}
	return config
}

// try has a client send bytes and get them back. It returns the state of its connection.
func (d *hidden) try(config *tls.Config, via func(net.Conn) net.Conn) (tls.ConnectionState, error) {
	nc, err := d.tryDial()
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer nc.Close()
	c := net.Conn(nc)
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if via != nil {
		c = via(c)
	}
	client := tls.Client(c, config)
	if err := client.Handshake(); err != nil {
		return client.ConnectionState(), err
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	go func() {
		client.Write(sent)
		client.CloseWrite()
	}()
	got, err := io.ReadAll(client)
	if err == nil && !bytes.Equal(got, sent) {
		err = fmt.Errorf("%d bytes came back of %d", len(got), len(sent))
	}
	return client.ConnectionState(), err
}

// accepted fails the test unless a client is served, with Encrypted Client Hello.
func (d *hidden) accepted(config *tls.Config, via func(net.Conn) net.Conn) tls.ConnectionState {
	d.t.Helper()
	state, err := d.try(config, via)
	if err != nil || !state.ECHAccepted || state.PeerCertificates[0].Subject.CommonName != config.ServerName {
		d.t.Errorf("accepted %v, error %v", state.ECHAccepted, err)
	}
	return state
}

// retry has a backend ask for a second hello: it takes no curve that the client has sent a share
// of.
func retry(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }

// first has a client offer shares of other curves than that.
func first(c *tls.Config) {
	c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384}
}

// cut is a connection that writes at most size bytes at a time, and puts what is in handshake
// records into records of at most that size.
type cut struct {
	net.Conn
	size, records int
}

func (c cut) Write(b []byte) (int, error) {
	var out []byte
	for all := b; len(all) > 0; {
		n := 5 + int(all[3])<<8 + int(all[4])
		if all[0] == 22 {
			for part := range slices.Chunk(all[5:n], c.records) {
				out = append(out, 22, all[1], all[2], byte(len(part)>>8), byte(len(part)))
				out = append(out, part...)
			}
		} else {
			out = append(out, all[:n]...)
		}
		all = all[n:]
	}
	for part := range slices.Chunk(out, c.size) {
		if _, err := c.Conn.Write(part); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

// Goal: a hello that is encrypted to a key of the proxy goes to the host of the inner name, however
// it is cut into records and segments, and whether or not the backend asks for a second one.
func TestECH(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	d.echo("retry.example", retry)
	for _, size := range []int{1, 2, 3, 100, 16384} {
		for _, records := range []int{1, 5, 100, 1000, 16384} {
			via := func(c net.Conn) net.Conn { return cut{c, size, records} }
			d.accepted(d.client(), via)
			state := d.accepted(d.client(first, func(c *tls.Config) { c.ServerName = "retry.example" }), via)
			if !state.HelloRetryRequest {
				t.Error("there was no HelloRetryRequest")
			}
		}
	}
	// With a key of another's, it goes to the host of the outer name, which does not know it
	// either.
	other, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	_, err = d.try(d.client(func(c *tls.Config) { c.EncryptedClientHelloConfigList = other.ConfigList() }), nil)
	var rejected *tls.ECHRejectionError
	if !errors.As(err, &rejected) {
		t.Errorf("with another key: %v, want that it is rejected", err)
	}
}

// Goal: GREASE and hellos without the extension go to the host of the outer name, with all of TLS.
func TestECHOthers(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	none := func(c *tls.Config) { c.EncryptedClientHelloConfigList, c.ServerName = nil, "public.example" }
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		state, err := d.try(d.client(none, func(c *tls.Config) { c.MaxVersion = version }), nil)
		if err != nil || state.ECHAccepted || state.Version != version {
			t.Errorf("%s: %s, error %v", tls.VersionName(version), tls.VersionName(state.Version), err)
		}
	}
	// A name that is hidden needs no Encrypted Client Hello.
	if _, err := d.try(d.client(none, func(c *tls.Config) { c.ServerName = "hidden.example" }), nil); err != nil {
		t.Error(err)
	}
}

// Goal: a key is rotated without a client that fails: both count while both are there, and a client
// with an old one learns the new one from the backend of the public name, which has the same keys.
// A file that is no good changes nothing.
func TestECHRotation(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	next, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	hostdirtest.Must(t, os.Remove(d.hostPath("public.example", "tls-socket")))
	private, _ := pem.Decode(next.MarshalPEM())
	d.echo("public.example", func(c *tls.Config) {
		c.EncryptedClientHelloKeys = []tls.EncryptedClientHelloKey{{
			Config: next.ConfigList()[2:], PrivateKey: private.Bytes[len(private.Bytes)-32:], SendAsRetry: true,
		}}
	})
	with := func(list []byte) *tls.Config {
		return d.client(func(c *tls.Config) { c.EncryptedClientHelloConfigList = list })
	}
	putKey(t, d.dir, "b.pem", next)
	d.err.Await(t, fmt.Sprintf("keys for Encrypted Client Hello in use: a.pem (public name public.example, config id %d), b.pem (public name public.example, config id %d)", d.key.ID(), next.ID()))
	d.accepted(with(d.key.ConfigList()), nil)
	d.accepted(with(next.ConfigList()), nil)

	hostdirtest.Must(t, os.Remove(filepath.Join(d.dir, ".ech", "a.pem")))
	d.err.Await(t, "Hello in use: b.pem")
	_, err = d.try(with(d.key.ConfigList()), nil)
	var rejected *tls.ECHRejectionError
	if !errors.As(err, &rejected) || !bytes.Equal(rejected.RetryConfigList, next.ConfigList()) {
		t.Fatalf("%v, want that the old key is rejected, and the new one to retry with", err)
	}
	d.accepted(with(rejected.RetryConfigList), nil)

	path := filepath.Join(d.dir, ".ech", "b.pem")
	hostdirtest.Must(t, os.WriteFile(path, []byte("no key"), 0o600))
	d.err.Await(t, "key file .ech/b.pem in the hosts directory is no good: it has no complete PRIVATE KEY block; the key that it held before stays in use")
	d.accepted(with(next.ConfigList()), nil)
	putKey(t, d.dir, "b.pem", d.key)
	d.err.Await(t, fmt.Sprintf("Hello in use: b.pem (public name public.example, config id %d)", d.key.ID()))
	d.accepted(with(d.key.ConfigList()), nil)
	hostdirtest.Must(t, os.RemoveAll(filepath.Join(d.dir, ".ech")))
	d.err.Await(t, "no keys for Encrypted Client Hello are in use any more")
	if _, err := d.try(with(d.key.ConfigList()), nil); !errors.As(err, &rejected) {
		t.Errorf("%v, want that the key is rejected", err)
	}
}

// Goal: the second connection resumes the session of the first, also when it is asked for a second
// hello.
func TestECHResumption(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	d.echo("retry.example", retry)
	for _, name := range []string{"hidden.example", "retry.example"} {
		cache := tls.NewLRUClientSessionCache(1)
		for i := range 3 {
			state := d.accepted(d.client(first, func(c *tls.Config) { c.ServerName, c.ClientSessionCache = name, cache }), nil)
			if state.DidResume != (i > 0) || state.HelloRetryRequest != (name == "retry.example") {
				t.Errorf("%s: connection %d: resumed %v, asked for a second hello %v", name, i, state.DidResume, state.HelloRetryRequest)
			}
		}
	}
}

// Goal: everything goes by the inner name: the header for the backend, wildcards, the log,
// refusals.
func TestECHName(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	first := snitest.NewSealer(d.key.ConfigList())
	hidden := func(name string) []byte {
		return snitest.NewSealer(d.key.ConfigList()).Seal("public.example", snitest.Inner(name, nil), nil, nil).Stream()
	}
	for version, name := range []string{"plain.example", "old.example", "new.example"} {
		d.serve(name, firstRead)
		if version > 0 {
			hostdirtest.Touch(t, d.hostPath(name, fmt.Sprintf("send-proxy-v%d", version)))
		}
		hostdirtest.Touch(t, d.hostPath(name, "log-connections"))
		c := d.dial()
		say(t, c, hidden(name))
		got, err := io.ReadAll(c)
		want := slices.Concat(headerFor(version, localAddr(c), c.RemoteAddr().(*net.TCPAddr).AddrPort(), name), innerStream(name, 1))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: got %x, error %v, want %x", name, got, err, want)
		}
		c.Close()
		d.expectServed(c.LocalAddr(), " for "+name, len(innerStream(name, 1)), len(want), "closed")
	}
	d.serve("*.wild.example", answering("wild"))
	d.serve("*", answering("star"))
	for name, want := range map[string]string{"a.wild.example": "wild", "b.example": "star", "HIDDEN.wild.example.": "wild"} {
		got, err := d.exchange(hidden(name))
		if err != nil || string(got) != want {
			t.Errorf("%s: got %q, error %v, want %q", name, got, err, want)
		}
	}
	nameless := snitest.Encode(func(m *snitest.Message) {
		m.Extension(snitest.SupportedVersions, []byte{2, 3, 4})
		m.Extension(snitest.ECH, []byte{1})
	})
	got, err := d.exchange(first.Seal("public.example", nameless, nil, nil).Stream())
	if err != nil || string(got) != "star" {
		t.Errorf("without a name: got %q, error %v", got, err)
	}
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
	d.expectAlert(hidden("nobody.example"), sni.UnrecognizedName)
	d.err.Await(t, " for nobody.example: no directory (alert 112, unrecognized_name)")
	d.expectAlert(hidden("no body"), sni.UnrecognizedName)
	d.err.Await(t, ": server name has a space or a control character (alert 112, unrecognized_name)")
}

// Goal: what is wrong with the extension of the first hello, or with the inner hello, has the alert
// of the RFC and a line in the log, and is routed nowhere.
func TestECHFirst(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	hostdirtest.Must(t, os.Remove(d.hostPath("public.example", "tls-socket")))
	d.serve("public.example", served)
	sealer := snitest.NewSealer(d.key.ConfigList())
	inner := func(encoded []byte) []byte {
		return snitest.NewSealer(d.key.ConfigList()).Seal("public.example", encoded, nil, nil).Stream()
	}
	versions := func(body ...byte) []byte {
		return snitest.Encode(func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "public.example") })
			m.Extension(snitest.SupportedVersions, body)
			m.Extension(snitest.ECH, []byte{1})
		})
	}
	good := snitest.Inner("public.example", nil)
	for _, test := range []struct {
		hello []byte
		want  sni.Description
		line  string
	}{
		{withECH([]byte{1}), sni.IllegalParameter, "encrypted_client_hello extension of type inner from the network"},
		{withECH(sealer.Extension(nil)), sni.DecodeError, "malformed encrypted_client_hello extension"},
		{withECH([]byte{2}), sni.DecodeError, "malformed encrypted_client_hello extension"},
		{inner(versions(4, 3, 4, 3, 3)), sni.IllegalParameter, "inner client hello offers a version below TLS 1.3"},
		{inner(append(good, 0, 1)), sni.IllegalParameter, "padding of the inner client hello is not zero"},
		{inner(good[:20]), sni.IllegalParameter, "a length in the inner client hello does not fit"},
		{inner(snitest.Inner("public.example", func(m *snitest.Message) { m.Extension(snitest.OuterExtensions, []byte{2, 0, 50}) })), sni.IllegalParameter,
			"ech_outer_extensions names an extension that the outer client hello does not have, or not in that order"},
		{inner(snitest.Inner("public.example", func(m *snitest.Message) { m.Extension(snitest.OuterExtensions, []byte{2, 0xfe, 0x0d}) })), sni.IllegalParameter,
			"ech_outer_extensions names encrypted_client_hello"},
		{snitest.Records(snitest.ClientHello{CipherSuites: 30_000, Extensions: func(m *snitest.Message) {
			m.ServerName(func() { m.Entry(snitest.HostName, "public.example") })
			m.Extension(snitest.Padding, make([]byte, 40_000))
		}}.Build().Bytes, 16384)[:sni.MaxHello], sni.InternalError, "no end of the client hello within the first 64 KiB"},
		{append(snitest.Records(snitest.Payload(snitest.Hello("public.example")), 1000)[:1005], 23), sni.UnexpectedMessage, ""},
	} {
		d.expectAlert(test.hello, test.want)
		if test.line != "" {
			d.err.Await(t, " for public.example: "+test.line+" (alert ")
		}
	}
	c := d.dial()
	hello := snitest.Hello("public.example")
	say(t, c, hello[:len(hello)-1])
	c.CloseWrite()
	got, err := io.ReadAll(c)
	expectRecord(t, got, err, sni.DecodeError)
	d.err.Await(t, " for public.example: the client ended the connection before the end of its client hello (alert 50, decode_error)")
}

// Goal: a host with a datagram socket serves only clients whose hellos need not be opened.
func TestECHHanded(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	d.serveHanded("handed.example", greetHanded)
	d.expectAlert(snitest.NewSealer(d.key.ConfigList()).Seal("public.example", snitest.Inner("handed.example", nil), nil, nil).Stream(), sni.InternalError)
	d.err.Await(t, "for handed.example: a client with Encrypted Client Hello cannot be handed over, since its second hello may have to be opened: this host needs a stream socket (alert 80, internal_error)")
	if err := d.greeted("handed.example"); err != nil {
		t.Error(err)
	}
	fds := d.fds()
	for range 300 { // more than a tenant may have under way
		d.expectAlert(snitest.NewSealer(d.key.ConfigList()).Seal("public.example", snitest.Inner("handed.example", nil), nil, nil).Stream(), sni.InternalError)
	}
	d.awaitFds(fds)
	if err := d.greeted("handed.example"); err != nil {
		t.Error(err)
	}
}

// Goal: behind a balancer the hello comes behind a header, and is opened all the same.
func TestECHFront(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	hostdirtest.Must(t, os.Mkdir(filepath.Join(d.dir, acceptProxy), 0o755))
	d.serve("v2.example", firstRead)
	hostdirtest.Touch(t, d.hostPath("v2.example", "send-proxy-v2"))
	d.serve("a.example", hostdirtest.Greet)
	d.awaitFront(t, "the marker", true)
	for _, size := range []int{1, 50, 1 << 20} {
		c := d.dial()
		hello := snitest.NewSealer(d.key.ConfigList()).Seal("public.example", snitest.Inner("v2.example", nil), nil, nil).Stream()
		for part := range slices.Chunk(append([]byte(headerV1), hello...), size) {
			say(t, c, part)
		}
		got, err := io.ReadAll(c)
		want := append(headerFor(2, netip.MustParseAddrPort("192.0.2.1:258"), netip.MustParseAddrPort("198.51.100.2:443"), "v2.example"), innerStream("v2.example", 1)...)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("pieces of %d: got %x, error %v, want %x", size, got, err, want)
		}
	}
}

// Goal: a single connection on standard input is served with the keys, too.
func TestECHSingle(t *testing.T) {
	t.Parallel()
	key, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	dir := hostdirtest.Dir(t)
	hostdirtest.Must(t, os.Mkdir(filepath.Join(dir, ".ech"), 0o700))
	putKey(t, dir, "a.pem", key)
	hostdirtest.Serve(t, hostDir(dir, "hidden.example"), firstRead)
	d, c := startSingle(t, dir)
	say(t, c, snitest.NewSealer(key.ConfigList()).Seal("public.example", snitest.Inner("hidden.example", nil), nil, nil).Stream())
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, innerStream("hidden.example", 1)) {
		t.Errorf("got %x, error %v", got, err)
	}
	c.Close()
	d.expectExit(0)
}

// Goal: what lies in .ech is used if it is the administrator's, and what is not is named once.
func TestECHKeys(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	dir := filepath.Join(d.dir, ".ech")
	in := func(name string) string { return filepath.Join(dir, name) }
	file := d.key.MarshalPEM()
	hostdirtest.Must(t, os.WriteFile(in(".hidden"), []byte("no key"), 0o600))
	hostdirtest.Must(t, os.WriteFile(in("b.pem"), file, 0o600))
	hostdirtest.Must(t, os.Chmod(in("b.pem"), 0o620))
	hostdirtest.Must(t, os.Symlink("a.pem", in("c.pem")))
	hostdirtest.Must(t, os.Mkdir(in("d.pem"), 0o755))
	hostdirtest.Must(t, unix.Mkfifo(in("e.pem"), 0o600))
	hostdirtest.Must(t, os.WriteFile(in("f.pem"), make([]byte, 20<<10), 0o600))
	hostdirtest.Must(t, os.WriteFile(in("g.pem"), file[:len(file)-40], 0o600))
	hostdirtest.Must(t, os.WriteFile(in("h.pem"), file, 0o600)) // the same as a.pem
	for name, want := range map[string]string{
		"b.pem": "its mode 0620 lets others than its owner change it: chmod go-w it",
		"c.pem": "it is a symlink: put the file itself there",
		"d.pem": "it is no regular file: remove it",
		"e.pem": "it is no regular file: remove it",
		"f.pem": "it has more than 16 KiB: a key file has some hundred bytes",
		"g.pem": "it has no complete ECHCONFIG block",
	} {
		d.err.Await(t, "key file .ech/"+name+" in the hosts directory is no good: "+want+"; there is no key from before")
	}
	d.accepted(d.client(), nil)
	for i := range 20 {
		hostdirtest.Must(t, os.WriteFile(in(fmt.Sprintf("a%02d.pem", i)), file, 0o600))
	}
	// It may come before the last of them is there.
	d.err.Await(t, " files, but only the first 16 by name count: remove old keys")
	hostdirtest.Must(t, os.Chmod(dir, 0o770))
	d.err.Await(t, ".ech in the hosts directory does not count: its mode 0770 lets others than its owner change it: chmod go-w it")
	d.err.Await(t, "no keys for Encrypted Client Hello are in use any more")
	hostdirtest.Must(t, os.Chmod(dir, 0o700))
	hostdirtest.Await(t, "the keys to be in use again", func() bool { return strings.Count(d.err.String(), "Hello in use: a") == 2 })
	d.accepted(d.client(), nil)
	text := d.err.String()
	for _, line := range []string{"b.pem", "g.pem", "does not count"} {
		if n := strings.Count(text, line); n != 1 && n != 2 { // once more when .ech counts again
			t.Errorf("%d lines about %s", n, line)
		}
	}
	if strings.Contains(text, ".hidden") || strings.Contains(text, "h.pem (") {
		t.Error("there is a line about a file that does not matter")
	}
}

// Goal: an .ech of a tenant, or whatever he has mounted or moved there, is not the administrator's,
// and keeps nobody waiting.
func TestECHForeignKeys(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	key, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	d := start(t)
	path := filepath.Join(d.dir, ".ech")
	for _, test := range []struct {
		make func() error
		want string
	}{
		{func() error { return os.Mkdir(path, 0o755) }, "it belongs to uid 1000, neither to root nor to the owner of the hosts directory: chown it to root, or remove it"},
		{func() error { return os.Symlink("/etc", path) }, "it is no directory, so a tenant may have moved it there: remove it, and make a directory of that name"},
	} {
		hostdirtest.Must(t, test.make())
		hostdirtest.Must(t, os.Lchown(path, 1000, 1000))
		d.err.Await(t, ".ech in the hosts directory does not count: "+test.want)
		hostdirtest.Must(t, os.Remove(path))
	}
	hostdirtest.Must(t, os.Mkdir(path, 0o755))
	putKey(t, d.dir, "a.pem", key)
	hostdirtest.Must(t, os.Chown(filepath.Join(path, "a.pem"), 1000, 1000))
	d.err.Await(t, "key file .ech/a.pem in the hosts directory is no good: it belongs to uid 1000, neither to root nor to the owner of the hosts directory")
	hostdirtest.Must(t, os.Chown(filepath.Join(path, "a.pem"), 0, 0))
	d.err.Await(t, "keys for Encrypted Client Hello in use: a.pem")
}

// Goal: beside a flood of hellos that are forged, each of which costs a decryption, good clients
// are served as beside any other flood.
func TestECHFlood(t *testing.T) {
	floods(t, func(t *testing.T, d *daemon, expectRelay func()) {
		key, err := ech.GenerateKey("public.example")
		hostdirtest.Must(t, err)
		hostdirtest.Must(t, os.Mkdir(filepath.Join(d.dir, ".ech"), 0o700))
		putKey(t, d.dir, "a.pem", key)
		d.err.Await(t, "Hello in use: a.pem")
		sealer := snitest.NewSealer(key.ConfigList())
		sealer.Seal("public.example", nil, nil, nil)
		forged := sealer.Seal("forged.example", snitest.Inner("a.example", nil), nil, nil).Stream()
		h := snitest.Hello("a.example")
		count, stop := d.flood(forged, h[:1], forged, forged[:len(forged)-1])
		d.awaitFlood()
		during := d.visitDuring(400, count, expectRelay)
		stop()
		failed, all := len(during.failed), len(during.failed)+during.served
		if failed*100 > all {
			t.Errorf("%d of %d good clients were not served, such as: %v", failed, all, errors.Join(during.failed[:min(5, failed)]...))
		}
		if refused := d.counters().refused; !strings.Contains(refused, "112: ") {
			t.Errorf("no forged hello was refused, but %s", refused)
		}
	})
}
