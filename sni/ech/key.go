package ech

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"

	"sniproxy/sni"
)

// A Key is a private key, with the ECHConfig that clients use it by. It does not change.
type Key struct {
	seed       []byte // the private key, 32 bytes
	private    hpke.PrivateKey
	config     []byte // the ECHConfig
	id         uint8
	suites     []suite
	publicName string
}

// A suite is a HpkeSymmetricCipherSuite: how a key and nonces are derived, and what encrypts with
// them.
type suite struct{ kdf, aead uint16 }

// RFC 9849, Section 4, and RFC 9180, Section 7.
const (
	configVersion = 0xfe0d
	x25519        = 0x0020 // DHKEM(X25519, HKDF-SHA256)
	hkdfSHA256    = 0x0001
	exportOnly    = 0xffff // an AEAD that encrypts nothing
	mandatory     = 0x8000 // bit in the type of an extension of an ECHConfig
)

// paddedName is the maximum_name_length of new keys: names up to it cannot be told apart by the
// length of the hello.
const paddedName = 64

// Types of PEM blocks: RFC 9934, Section 3.
const (
	privateKeyBlock = "PRIVATE KEY"
	configBlock     = "ECHCONFIG"
)

// ParseKey parses a key file: RFC 9934, as `sniproxy-ech`, `openssl ech` and others write it. It
// has one PRIVATE KEY (PKCS #8) of X25519, and one ECHCONFIG, an ECHConfigList of which one
// ECHConfig is that of the private key. Others in the list are ignored, as are text and blocks of
// other types.
func ParseKey(file []byte) (*Key, error) {
	var private, list []byte
	for {
		var block *pem.Block
		if block, file = pem.Decode(file); block == nil {
			break
		}
		in := &list
		switch block.Type {
		case privateKeyBlock:
			in = &private
		case configBlock:
		default:
			continue
		}
		if *in != nil {
			return nil, fmt.Errorf("it has a second %s: a key file has one", block.Type)
		}
		*in = block.Bytes
	}
	switch {
	case private == nil:
		return nil, errors.New("it has no complete PRIVATE KEY block")
	case list == nil:
		return nil, errors.New("it has no complete ECHCONFIG block")
	}
	seed, err := parsePKCS8(private)
	if err != nil {
		return nil, fmt.Errorf("its PRIVATE KEY %w", err)
	}
	k, err := newKey(seed)
	if err != nil {
		return nil, err
	}
	if err := k.findConfig(list); err != nil {
		return nil, fmt.Errorf("its ECHCONFIG %w", err)
	}
	return k, nil
}

// GenerateKey makes a key with a random config id. The public name is the one that everybody sees
// in hellos for the hidden names; a host of that name serves clients whose key is not known any
// more.
func GenerateKey(publicName string) (*Key, error) {
	if err := checkPublicName(publicName); err != nil {
		return nil, err
	}
	if bytes.IndexByte([]byte(publicName), '.') < 0 {
		return nil, fmt.Errorf("the public name %s has no dot: clients refuse it", publicName)
	}
	var seed [32]byte
	var id [1]byte
	rand.Read(seed[:])
	rand.Read(id[:])
	k, err := newKey(seed[:])
	if err != nil {
		return nil, err
	}
	var content []byte // ECHConfigContents
	content = append(content, id[0])
	content = binary.BigEndian.AppendUint16(content, x25519)
	content = appendVector16(content, k.private.PublicKey().Bytes())
	var suites []byte
	for aead := uint16(1); aead <= 3; aead++ { // AES-128-GCM, AES-256-GCM, ChaCha20-Poly1305
		suites = binary.BigEndian.AppendUint16(suites, hkdfSHA256)
		suites = binary.BigEndian.AppendUint16(suites, aead)
	}
	content = appendVector16(content, suites)
	content = append(content, paddedName)
	content = appendVector8(content, []byte(publicName))
	content = appendVector16(content, nil) // extensions
	config := binary.BigEndian.AppendUint16(nil, configVersion)
	return k, k.findConfig(appendVector16(nil, appendVector16(config, content)))
}

// MarshalPEM returns the key file. Keep it secret.
func (k *Key) MarshalPEM() []byte {
	private := append(bytes.Clone(pkcs8Head), k.seed...)
	file := pem.EncodeToMemory(&pem.Block{Type: privateKeyBlock, Bytes: private})
	return append(file, pem.EncodeToMemory(&pem.Block{Type: configBlock, Bytes: k.ConfigList()})...)
}

// ConfigList returns the ECHConfigList, which clients need: in base64 it is the value of ech= in
// the HTTPS record of the DNS.
func (k *Key) ConfigList() []byte { return appendVector16(nil, k.config) }

// PublicName returns the name that everybody sees in hellos for this key.
func (k *Key) PublicName() string { return k.publicName }

// ID returns the config id, by which a hello names the key. Keys may share one.
func (k *Key) ID() uint8 { return k.id }

// Equal reports whether two keys are the same.
func (k *Key) Equal(other *Key) bool {
	return bytes.Equal(k.seed, other.seed) && bytes.Equal(k.config, other.config)
}

func newKey(seed []byte) (*Key, error) {
	private, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(seed)
	if err != nil {
		return nil, fmt.Errorf("its PRIVATE KEY is of no use: %w", err)
	}
	return &Key{seed: seed, private: private}, nil
}

// findConfig finds the key's ECHConfig in an ECHConfigList.
func (k *Key) findConfig(list []byte) error {
	outer := reader{b: list}
	configs := reader{b: outer.vector16()}
	if !outer.done() || len(configs.b) == 0 {
		return errors.New("is no ECHConfigList")
	}
	public := k.private.PublicKey().Bytes()
	for len(configs.b) > 0 {
		begin := configs.b
		version := configs.uint16()
		content := reader{b: configs.vector16()}
		if configs.bad {
			return errors.New("is no ECHConfigList: an ECHConfig in it is cut off")
		}
		if version != configVersion {
			continue
		}
		raw := begin[:len(begin)-len(configs.b)]
		id := content.uint8()
		kem := content.uint16()
		theirs := content.vector16()
		suites := reader{b: content.vector16()}
		content.uint8() // maximum_name_length
		name := content.vector8()
		extensions := reader{b: content.vector16()}
		if !content.done() || len(suites.b) == 0 || len(suites.b)%4 != 0 {
			return errors.New("has a malformed ECHConfig")
		}
		if kem != x25519 || !bytes.Equal(theirs, public) {
			continue
		}
		if k.config != nil {
			return errors.New("has two ECHConfigs for the private key: give each a key and a file of its own")
		}
		if err := checkPublicName(string(name)); err != nil {
			return fmt.Errorf("is of no use: %w", err)
		}
		for len(extensions.b) > 0 {
			kind := extensions.uint16()
			extensions.vector16()
			if extensions.bad {
				return errors.New("has a malformed ECHConfig")
			}
			if kind&mandatory != 0 {
				return fmt.Errorf("has a mandatory extension that is not known: %d", kind)
			}
		}
		for len(suites.b) > 0 {
			if s := (suite{uint16(suites.uint16()), uint16(suites.uint16())}); s.known() {
				k.suites = append(k.suites, s)
			}
		}
		if k.suites == nil {
			return errors.New("has no cipher suite that is known")
		}
		k.config, k.id, k.publicName = bytes.Clone(raw), uint8(id), string(name)
	}
	if k.config == nil {
		return errors.New("is not that of the private key: none in it is of X25519 with its public key")
	}
	return nil
}

// known reports whether crypto/hpke has the suite.
func (s suite) known() bool {
	_, err := hpke.NewKDF(s.kdf)
	if err != nil || s.aead == exportOnly {
		return false
	}
	_, err = hpke.NewAEAD(s.aead)
	return err == nil
}

// checkPublicName says what is wrong with a public name. RFC 9849, Section 6.1.4: clients refuse
// what is not LDH labels with dots between them, and what looks like an IPv4 address.
func checkPublicName(name string) error {
	if canonical, err := sni.AppendCanonical(nil, []byte(name)); err != nil || string(canonical) != name {
		return fmt.Errorf("the public name %q is no name of a host in lower case", name)
	}
	labels := bytes.Split([]byte(name), []byte("."))
	for _, label := range labels {
		if len(label) > 63 || label[len(label)-1] == '-' || bytes.IndexByte(label, '_') >= 0 {
			return fmt.Errorf("the public name %s has a label that clients refuse: %s", name, label)
		}
	}
	last := labels[len(labels)-1]
	if allDigits(last) || bytes.HasPrefix(last, []byte("0x")) {
		return fmt.Errorf("the public name %s ends in a number: clients take it for an address", name)
	}
	return nil
}

func allDigits(b []byte) bool { return len(bytes.Trim(b, "0123456789")) == 0 }

// pkcs8Head is what a private key of X25519 begins with in PKCS #8, in front of its 32 bytes: RFC
// 8410, Section 7.
var pkcs8Head = []byte{
	0x30, 0x2e, // SEQUENCE
	0x02, 0x01, 0x00, // version 0
	0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, // 1.3.101.110
	0x04, 0x22, 0x04, 0x20, // OCTET STRING in an OCTET STRING
}

// parsePKCS8 returns the 32 bytes of a private key of X25519. It may be of version 1, with the
// public key behind it. (crypto/x509 would make the daemon half as large again.)
func parsePKCS8(der []byte) ([]byte, error) {
	bad := errors.New("is no PKCS #8 key of X25519")
	const sequence, integer, octets = 0x30, 0x02, 0x04
	all := reader{b: der}
	key := reader{b: all.element(sequence)}
	version := key.element(integer)
	algorithm := key.element(sequence)
	private := reader{b: key.element(octets)}
	seed := private.element(octets)
	switch {
	case !all.done() || key.bad || !private.done():
		return nil, bad
	case len(version) != 1 || version[0] > 1, !bytes.Equal(algorithm, pkcs8Head[7:12]), len(seed) != 32:
		return nil, bad
	}
	return bytes.Clone(seed), nil
}

// element takes the value of an element of DER with the given tag and a length below 128.
func (r *reader) element(tag int) []byte {
	if r.uint8() != tag || len(r.b) == 0 || r.b[0] >= 0x80 {
		r.b, r.bad = nil, true
	}
	return r.vector8()
}
