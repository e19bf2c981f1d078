package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/logline"
)

const (
	certFile     = "cert.pem"
	keyFile      = "key.pem"
	clientCAFile = "client-ca.pem"

	// fileMost is the most bytes that are read of a file.
	fileMost = 4 << 20
)

// rereadEvery is how often the files are read again. Tests shorten it.
var rereadEvery = 10 * time.Second

// files are the certificates in the host's directory. Whatever is no good stays as it was.
type files struct {
	names names

	pair     atomic.Pointer[tls.Certificate] // nil: there are no such files
	clientCA atomic.Pointer[x509.CertPool]   // nil: clients are not asked

	// What was read last, and the line that tells what is wrong with it. Only read touches them.
	pairSeen, caSeen seen
	expired          *tls.Certificate // was complained about
}

// A seen is what was read last of some files.
type seen struct {
	text    string // of the files, one behind the other
	problem string // what was wrong with them
	said    bool   // and was said
}

// openFiles reads the files. It fails if they are there and no good.
func openFiles(n names) (*files, error) {
	f := &files{names: n}
	if err := f.readPair(); err != nil {
		return nil, err
	}
	if err := f.readClientCA(); err != nil {
		return nil, err
	}
	f.checkExpired()
	return f, nil
}

// follow reads the files again and again. Whoever writes two of them does that one after the other:
// so it says what is wrong only if that is still so the next time.
func (f *files) follow(changed func()) {
	for range time.Tick(rereadEvery) {
		before := f.clientCA.Load()
		complain(&f.pairSeen, f.readPair())
		complain(&f.caSeen, f.readClientCA())
		f.checkExpired()
		if f.clientCA.Load() != before {
			changed()
		}
	}
}

// complain prints what is wrong with files, once it is so for the second time.
func complain(s *seen, err error) {
	switch {
	case err == nil:
		s.problem, s.said = "", false
	case err.Error() != s.problem:
		s.problem, s.said = err.Error(), false
	case !s.said:
		s.said = true
		logline.Err("%v; what was in use stays in use", err)
	}
}

// readPair reads the certificate and its key.
func (f *files) readPair() error {
	cert, certErr := readFile(certFile)
	key, keyErr := readFile(keyFile)
	if errors.Is(certErr, fs.ErrNotExist) && errors.Is(keyErr, fs.ErrNotExist) {
		if f.pair.Load() == nil {
			return nil // then there is an ACME server
		}
		return fmt.Errorf("%s and %s are gone", certFile, keyFile)
	}
	for _, err := range []error{certErr, keyErr} {
		if err != nil {
			return explainFile(err)
		}
	}
	text := string(cert) + "\x00" + string(key)
	if f.pair.Load() != nil && text == f.pairSeen.text {
		return nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		reason, _ := strings.CutPrefix(err.Error(), "tls: ")
		return fmt.Errorf("%s and %s are no good: %s", certFile, keyFile, reason)
	}
	for _, name := range f.names {
		if pair.Leaf.VerifyHostname(exampleOf(name)) != nil {
			logline.Err("the certificate in %s does not cover %s, only %s", certFile, name, coverage(pair.Leaf))
		}
	}
	f.pairSeen.text = text
	f.pair.Store(&pair)
	return nil
}

// exampleOf returns a host that a NAME covers.
func exampleOf(name string) string {
	if rest, ok := strings.CutPrefix(name, "*"); ok {
		return "sniproxy-tls" + rest
	}
	return name
}

// coverage tells which hosts a certificate is for.
func coverage(leaf *x509.Certificate) string {
	if len(leaf.DNSNames) == 0 {
		return "hosts that it does not name (a common name does not count)"
	}
	return printable(strings.Join(leaf.DNSNames, ", "))
}

// readClientCA reads the certificates that those of clients must be from.
func (f *files) readClientCA() error {
	text, err := readFile(clientCAFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && f.clientCA.Load() == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is gone: to let clients in without a certificate, restart sniproxy-tls", clientCAFile)
	case err != nil:
		return explainFile(err)
	case f.clientCA.Load() != nil && string(text) == f.caSeen.text:
		return nil
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return fmt.Errorf("%s is no good: there is no certificate in PEM in it", clientCAFile)
	}
	f.caSeen.text = string(text)
	f.clientCA.Store(pool)
	return nil
}

// checkExpired prints once that a certificate has expired.
func (f *files) checkExpired() {
	pair := f.pair.Load()
	if pair != nil && pair != f.expired && time.Now().After(pair.Leaf.NotAfter) {
		f.expired = pair
		logline.Err("the certificate in %s has expired on %s: renew it", certFile, date(pair.Leaf.NotAfter))
	}
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }

// readFile reads a file of the host's directory. It does not wait for one that is none, such as a
// named pipe.
func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, missing(name, err)
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("not a regular file")}
	}
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, fileMost+1))
	if err == nil && len(text) > fileMost {
		err = &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("longer than %d bytes", fileMost)}
	}
	return text, err
}

// missing tells a symlink that leads nowhere from a file that is not there.
func missing(name string, err error) error {
	if _, lerr := os.Lstat(name); lerr == nil && errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "read", Path: name, Err: errors.New("the symlink leads nowhere")}
	}
	return err
}

// explainFile says what to do about an error of readFile.
func explainFile(err error) error {
	pathErr, ok := errors.AsType[*fs.PathError](err)
	if !ok {
		return err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no %s: %s and %s must both be there, or neither", pathErr.Path, certFile, keyFile)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("cannot read %s: permission denied: let this user (uid %d) read it, and search the directories that lead there", pathErr.Path, os.Getuid())
	}
	return fmt.Errorf("cannot read %s: %w", pathErr.Path, pathErr.Err)
}

// printable returns a text of somebody else without what would disturb a log.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' || r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			return ' '
		}
		return r
	}, s)
	const most = 500
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
