package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/ech"
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

// retry has a backend ask for a second hello: it takes no curve that the client has sent a share of.
func retry(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }

// first has a client offer shares of other curves than that.
func first(c *tls.Config) {
	c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384}
}

// cut is a connection that writes at most size bytes at a time, and puts what is in handshake records
// into records of at most that size.
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
	// With a key of another's, it goes to the host of the outer name, which does not know it either.
	other, err := ech.GenerateKey("public.example")
	hostdirtest.Must(t, err)
	_, err = d.try(d.client(func(c *tls.Config) { c.EncryptedClientHelloConfigList = other.ConfigList() }), nil)
	var rejected *tls.ECHRejectionError
	if !errors.As(err, &rejected) {
		t.Errorf("with another key: %v, want that it is rejected", err)
	}
}
