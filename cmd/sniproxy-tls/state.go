package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// A state is where the account with an ACME server and the certificates from it are kept. Several
// processes of a user share it.
//
//	DIRECTORY/SERVER/account.key    the key of the account
//	DIRECTORY/SERVER/NAME.pem       a key, and the certificate with its chain
type state struct{ dir string }

// accountFile is no name of a certificate: these end in .pem.
const accountFile = "account.key"

// stateDirectory returns where state is kept: what systemd says (of several directories the first),
// or else what the XDG Base Directory Specification says.
func stateDirectory() (string, error) {
	if dir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":"); dir != "" {
		return dir, nil
	}
	// "If an implementation encounters a relative path in any of these variables it should consider
	// the path invalid and ignore it."
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "sniproxy-tls"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil || !filepath.IsAbs(home) {
		return "", errors.New("no directory for the account and the certificates: set HOME or STATE_DIRECTORY")
	}
	return filepath.Join(home, ".local/state/sniproxy-tls"), nil
}

// openState makes the directories for an ACME server. Nobody else may enter them. A directory that
// has other things in it stays as it is.
func openState(dir, server string) (*state, error) {
	s := &state{filepath.Join(dir, serverName(server))}
	entries, err := os.ReadDir(dir)
	if len(entries) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist)) {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			err = os.Chmod(dir, 0o700) // systemd may have made it
		}
	}
	if err == nil {
		err = os.MkdirAll(s.dir, 0o700)
	}
	if err == nil {
		err = os.Chmod(s.dir, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make the directory for the account and the certificates: %w: give %s to this user, or set STATE_DIRECTORY", err, dir)
	}
	// So it is known now, and not when there is a certificate.
	probe, err := os.CreateTemp(s.dir, ".probe-")
	if err != nil {
		return nil, fmt.Errorf("cannot write to the directory for the account and the certificates: %w", err)
	}
	probe.Close()
	return s, os.Remove(probe.Name())
}

// serverName returns the name of the directory for an ACME server: its URL, with _ in place of what
// is not a letter, digit, dot or hyphen.
func serverName(server string) string {
	if u, err := url.Parse(server); err == nil {
		server = u.Host + u.Path
	}
	return strings.TrimLeft(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '_'
	}, server), ".")
}

// account returns the key of the account. It makes one if there is none: of several processes that
// do so at the same time, one wins.
func (s *state) account() (crypto.Signer, error) {
	path := filepath.Join(s.dir, accountFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.makeAccount(); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s is no key in PEM: remove it, and a new account is made", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return nil, fmt.Errorf("%s is no key in PKCS #8: remove it, and a new account is made", path)
	}
	return signer, nil
}

func (s *state) makeAccount() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	text, err := encodeKey(key)
	if err != nil {
		return err
	}
	return s.write(accountFile, text, os.Link)
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// load returns the certificate of a NAME. It is nil if there is none, or none that can be used.
func (s *state) load(name string) *tls.Certificate {
	text, err := os.ReadFile(filepath.Join(s.dir, name+".pem"))
	if err != nil {
		return nil
	}
	pair, err := tls.X509KeyPair(text, text)
	if err != nil || pair.Leaf.VerifyHostname(name) != nil {
		return nil
	}
	return &pair
}

// store keeps the key and the certificate of a NAME, in PEM.
func (s *state) store(name string, text []byte) error {
	return s.write(name+".pem", text, os.Rename)
}

// write writes a file under another name, and then moves it to its place: so what is there is
// whole, also after a loss of power.
func (s *state) write(name string, text []byte, move func(from, to string) error) error {
	file, err := os.CreateTemp(s.dir, ".new-") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	_, err = file.Write(text)
	err = errors.Join(err, file.Sync(), file.Close())
	if err != nil {
		return err
	}
	return move(file.Name(), filepath.Join(s.dir, name))
}
