package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/sni"
	"sniproxy/sni/ech"
)

// noECH is the remark about a host whose connections are handed over.
const noECH = "ECH cannot be used for it, as connections are handed over: for that it needs a stream socket"

// keysOf says what is wrong with the keys for Encrypted Client Hello in the hosts directory, in the
// words of the log, and reports whether there are any that are in use.
func (c *checker) keysOf(hosts *hostdir.Hosts, complain func(string, ...any)) (any bool) {
	const dir = ".ech"
	files, more, ignored, err := hosts.KeyFiles()
	mayNot := func(path string, bits uint32) bool { return !c.eyes.own && unix.Access(path, bits) == unix.EACCES }
	switch {
	case err != nil:
		complain("cannot look at .ech in the hosts directory: %v", err)
		return false
	case ignored != "" && mayNot(dir, unix.R_OK|unix.X_OK):
		complain("the keys in .ech in the hosts directory cannot be checked: you may not read them; ask root to run this")
		return true
	case ignored != "":
		complain(".ech in the hosts directory does not count: %s", ignored)
		return false
	case more > 0:
		complain(".ech in the hosts directory has %d files, but only the first %d by name count: remove old keys", len(files)+more, hostdir.MaxKeys)
	}
	open := isOpen(dir)
	for _, f := range files {
		path := dir + "/" + f.Name
		err := f.Err
		if err == nil {
			_, err = ech.ParseKey(f.Content)
		} else if mayNot(path, unix.R_OK) {
			complain("key file %s in the hosts directory cannot be checked: you may not read it; ask root to run this", show(path))
			any = true
			continue
		}
		if err != nil {
			complain("key file %s in the hosts directory is no good: %v", show(path), err)
			continue
		}
		any = true
		if open && isOpen(path) {
			complain("key file %s in the hosts directory can be read by everybody: chmod o-rwx %s", show(path), dir)
		}
	}
	return any
}

// isOpen reports whether a mode lets everybody search a directory, or read a file.
func isOpen(path string) bool {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return false
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return st.Mode&0o001 != 0
	}
	return st.Mode&0o004 != 0
}

// tryECH says whether the backend of a host takes part in Encrypted Client Hello, after a handshake
// with it. It makes another one, as it is with sniproxy in between. Late reports that this took all
// the time.
func (c *checker) tryECH(d *hostdir.Dialer, h host, s *session, first attempt, deadline time.Time) (remark string, late bool) {
	consequence := ""
	if c.keys {
		consequence = ": clients that hide this name fail, so have no ech= in its record of the DNS"
	}
	if first.version != tls.VersionTLS13 {
		return "does not confirm ECH, which needs TLS 1.3" + consequence, false
	}
	const unknown = "whether it confirms ECH cannot be told: "
	b, _, err := dial(d, h, time.Until(deadline))
	if err != nil {
		return unknown + clean(err.Error()), err == hostdir.BacklogFull
	}
	conn, err := newConn(b, b.Proxy, s.name, deadline)
	if err != nil {
		return unknown + clean(err.Error()), false
	}
	defer conn.Close()
	key, err := ech.GenerateKey("sniproxy-check.invalid")
	if err != nil {
		return unknown + err.Error(), false
	}
	a := attempt{proxy: b.Proxy}
	client := tls.Client(&splitter{conn: conn, keys: []*ech.Key{key}}, &tls.Config{
		ServerName:                     s.name,
		InsecureSkipVerify:             true, // whether it accepts is the question
		MinVersion:                     tls.VersionTLS13,
		EncryptedClientHelloConfigList: key.ConfigList(),
	})
	a.err = client.Handshake()
	a.first = conn.first
	local, _ := errors.AsType[*net.OpError](a.err)
	_, undecryptable := errors.AsType[sni.Alert](a.err)
	switch {
	case a.err == nil && client.ConnectionState().ECHAccepted:
		client.Close()
		return "confirms ECH", false
	case isAlert(a.err):
		return fmt.Sprintf("does not confirm ECH, but refuses the handshake: %s%s", clean(a.err.Error()), consequence), false
	case a.err == nil, local != nil && local.Op == "local error", undecryptable:
		// A client that sees no confirmation goes on with another hello than the backend has got.
		// So their keys differ, and nor can the proxy decrypt a second hello.
		return "does not confirm ECH" + consequence, false
	}
	return unknown + s.failure(a), a.late()
}

// A splitter is a connection to a backend with a sniproxy in between, which has keys.
type splitter struct {
	*conn
	keys    []*ech.Key
	scanner ech.Scanner
	hello   []byte       // what was written of the first hello
	session *ech.Session // once that has been opened
}

func (s *splitter) Write(b []byte) (int, error) {
	out, err := s.toBackend(b)
	if err == nil && len(out) > 0 {
		_, err = s.conn.Write(out)
	}
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// toBackend returns what the backend gets for what the client writes.
func (s *splitter) toBackend(b []byte) ([]byte, error) {
	if s.session != nil {
		return s.session.FromClient(nil, b)
	}
	s.hello = append(s.hello, b...)
	end, err := s.scanner.End(s.hello)
	if err != nil || end == 0 {
		return nil, err
	}
	inner, session, err := ech.Open(nil, s.keys, s.hello[:end])
	if err != nil {
		return nil, err
	}
	if session == nil {
		return nil, errors.New("crypto/tls has not encrypted its hello")
	}
	s.session = session
	return session.FromClient(inner, s.hello[end:])
}

// Read tells the session what the backend answers. The client has written nothing that could be
// held back for that.
func (s *splitter) Read(b []byte) (int, error) {
	n, err := s.conn.Read(b)
	if s.session != nil {
		s.session.FromBackend(b[:n])
	}
	return n, err
}
