package snitest

import (
	"bytes"
	"crypto/hpke"
	"encoding/binary"
	"fmt"
	"slices"
)

// Types of extensions that Encrypted Client Hello has to do with.
const (
	SupportedVersions = 43
	OuterExtensions   = 0xfd00
	ECH               = 0xfe0d
)

// Inner returns the smallest inner hello for a server name, encoded: RFC 9849, Section 5.1. More
// appends other extensions, and may be nil.
func Inner(name string, more func(m *Message)) []byte {
	return Encode(func(m *Message) {
		m.ServerName(func() { m.Entry(HostName, name) })
		m.Extension(SupportedVersions, []byte{2, 3, 4})
		m.Extension(ECH, []byte{1})
		if more != nil {
			more(m)
		}
	})
}

// Encode returns an encoded inner hello with extensions, without padding.
func Encode(extensions func(m *Message)) []byte {
	return ClientHello{Extensions: extensions}.Build().Bytes[4:]
}

// A Sealer encrypts hellos as a client does.
type Sealer struct {
	sender *hpke.Sender
	KDF    uint16
	AEAD   uint16
	ID     uint8
	Enc    []byte // the encapsulated key
}

// NewSealer returns a Sealer for the first config in an ECHConfigList, and its first cipher suite.
func NewSealer(list []byte) *Sealer {
	config := list[2:][:4+int(binary.BigEndian.Uint16(list[4:]))]
	public := config[9:][:binary.BigEndian.Uint16(config[7:])]
	suite := config[9+len(public)+2:]
	s := &Sealer{KDF: binary.BigEndian.Uint16(suite), AEAD: binary.BigEndian.Uint16(suite[2:]), ID: config[4]}
	kem, err := hpke.NewKEM(binary.BigEndian.Uint16(config[5:]))
	must(err)
	key, err := kem.NewPublicKey(public)
	must(err)
	kdf, err := hpke.NewKDF(s.KDF)
	must(err)
	aead, err := hpke.NewAEAD(s.AEAD)
	must(err)
	s.Enc, s.sender, err = hpke.NewSender(key, kdf, aead, slices.Concat([]byte("tls ech\x00"), config))
	must(err)
	return s
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// Seal returns an outer hello for a server name, with a session id of 32 bytes. In it are the
// encoded inner hello, encrypted, and what the functions append, which may be nil: other extensions
// in front of it and behind it. After a HelloRetryRequest Enc must be empty.
func (s *Sealer) Seal(name string, encoded []byte, before, after func(m *Message)) *Message {
	const tag = 16
	payload := make([]byte, len(encoded)+tag)
	at := 0
	m := ClientHello{SessionID: 32, Extensions: func(m *Message) {
		m.ServerName(func() { m.Entry(HostName, name) })
		if before != nil {
			before(m)
		}
		m.Extension(ECH, s.Extension(payload))
		at = len(m.Bytes) - len(payload)
		if after != nil {
			after(m)
		}
	}}.Build()
	sealed, err := s.sender.Seal(m.Bytes[4:], encoded)
	must(err)
	if len(sealed) != len(payload) {
		panic(fmt.Sprintf("%d bytes are encrypted in %d", len(encoded), len(sealed)))
	}
	copy(m.Bytes[at:], sealed)
	return m
}

// Extension returns what is in the extension of an outer hello.
func (s *Sealer) Extension(payload []byte) []byte {
	var m Message
	m.Raw(0) // outer
	m.Uint16(int(s.KDF))
	m.Uint16(int(s.AEAD))
	m.Raw(s.ID)
	m.Vector("enc", 2, func() { m.Raw(s.Enc...) })
	m.Vector("payload", 2, func() { m.Raw(payload...) })
	return m.Bytes
}

// ServerHello returns the record with a ServerHello, or a HelloRetryRequest, without extensions.
func ServerHello(retry bool) []byte {
	random := bytes.Repeat([]byte{7}, 32)
	if retry {
		// RFC 8446, Section 4.1.3.
		random = []byte("\xCF\x21\xAD\x74\xE5\x9A\x61\x11\xBE\x1D\x8C\x02\x1E\x65\xB8\x91\xC2\xA2\x11\x16\x7A\xBB\x8C\x5E\x07\x9E\x09\xE2\xC8\xA8\x33\x9C")
	}
	var m Message
	m.Raw(2)
	m.Vector("message", 3, func() {
		m.Raw(3, 3)
		m.Raw(random...)
		m.Raw(0, 0x13, 1, 0, 0, 0)
	})
	return m.Stream()
}
