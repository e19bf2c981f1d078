// Package snitest makes ClientHellos for tests: those that crypto/tls sends, and others that are
// built length by length, so that each length can be wrong.
//
// Only tests import it.
package snitest

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// Hello returns the ClientHello that crypto/tls sends for a server name, or without a server name
// if name is empty.
func Hello(name string) []byte { return HelloConfig(&tls.Config{ServerName: name}) }

// HelloConfig returns the ClientHello that crypto/tls sends with this configuration.
func HelloConfig(c *tls.Config) []byte {
	if c.ServerName == "" {
		c.InsecureSkipVerify = true
	}
	var r recorder
	tls.Client(&r, c).Handshake()
	return r.sent
}

// A recorder is a connection that keeps what is sent, and has ended on the other side.
type recorder struct {
	net.Conn
	sent []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.sent = append(r.sent, b...)
	return len(b), nil
}

func (*recorder) Read([]byte) (int, error)         { return 0, io.EOF }
func (*recorder) Close() error                     { return nil }
func (*recorder) SetDeadline(time.Time) error      { return nil }
func (*recorder) SetWriteDeadline(time.Time) error { return nil }

const (
	handshake    = 22 // ContentType
	recordHeader = 5
	maxRecord    = 1 << 14
	clientHello  = 1 // HandshakeType
)

// Record returns a TLS record.
func Record(contentType byte, content ...byte) []byte {
	b := []byte{contentType, 3, 1}
	b = binary.BigEndian.AppendUint16(b, uint16(len(content)))
	return append(b, content...)
}

// Records puts a handshake message into records of at most size bytes.
func Records(msg []byte, size int) (stream []byte) {
	for part := range slices.Chunk(msg, size) {
		stream = append(stream, Record(handshake, part...)...)
	}
	return stream
}

// Payload returns what whole records hold.
func Payload(stream []byte) (msg []byte) {
	for len(stream) > 0 {
		end := recordHeader + int(binary.BigEndian.Uint16(stream[3:]))
		msg = append(msg, stream[recordHeader:end]...)
		stream = stream[end:]
	}
	return msg
}

// A ClientHello says how a handshake message is to be built. The zero value is the smallest valid
// one.
type ClientHello struct {
	SessionID          int              // bytes
	CipherSuites       int              // bytes more than the two that are required
	CompressionMethods int              // bytes more than the one that is required
	Extensions         func(m *Message) // appends them; nil for a hello without even a list
	Trailing           int              // bytes at the end that do not belong there
}

// Named returns a small ClientHello with no extension but a server name.
func Named(name string) *Message {
	return NameList(func(m *Message) { m.Entry(HostName, name) })
}

// NameList returns a small ClientHello with no extension but a server name list.
func NameList(entries func(m *Message)) *Message {
	return ClientHello{Extensions: func(m *Message) {
		m.ServerName(func() { entries(m) })
	}}.Build()
}

// Filler is a byte that is too much where it is read as the first of a length.
const Filler = 0xff

// Fill returns n such bytes.
func Fill(n int) []byte { return bytes.Repeat([]byte{Filler}, n) }

// Build builds the message: RFC 8446, Section 4.1.2.
func (h ClientHello) Build() *Message {
	m := new(Message)
	m.Raw(clientHello)
	m.Vector("message", 3, func() {
		m.Raw(3, 3)
		m.Raw(Fill(32)...)
		m.Vector("session id", 1, func() { m.Raw(Fill(h.SessionID)...) })
		m.Vector("cipher suites", 2, func() { m.Raw(Fill(2 + h.CipherSuites)...) })
		m.Vector("compression methods", 1, func() { m.Raw(Fill(1 + h.CompressionMethods)...) })
		if h.Extensions != nil {
			m.Vector("extensions", 2, func() { h.Extensions(m) })
		}
		m.Raw(make([]byte, h.Trailing)...)
	})
	return m
}

// A Message is a handshake message. The code writes every length in it and notes in Lengths where
// they are, in their order.
type Message struct {
	Bytes   []byte
	Lengths []Length
}

// A Length is a length in a Message.
type Length struct {
	Of       string
	At, Size int // where it begins, and how many bytes it has
}

// Stream returns the message as a client sends it, in records that are as long as can be.
func (m *Message) Stream() []byte { return Records(m.Bytes, maxRecord) }

// Get returns the value of a length.
func (m *Message) Get(l Length) (v int) {
	for _, c := range m.Bytes[l.At:][:l.Size] {
		v = v<<8 | int(c)
	}
	return v
}

// Set changes a length.
func (m *Message) Set(l Length, v int) {
	for i := range l.Size {
		m.Bytes[l.At+i] = byte(v >> (8 * (l.Size - 1 - i)))
	}
}

// Raw appends bytes.
func (m *Message) Raw(b ...byte) { m.Bytes = append(m.Bytes, b...) }

// Uint16 appends a number.
func (m *Message) Uint16(v int) { m.Bytes = binary.BigEndian.AppendUint16(m.Bytes, uint16(v)) }

// Vector appends what body appends, behind its length in size bytes.
func (m *Message) Vector(of string, size int, body func()) {
	l := Length{of, len(m.Bytes), size}
	m.Lengths = append(m.Lengths, l)
	m.Raw(make([]byte, size)...)
	start := len(m.Bytes)
	body()
	m.Set(l, len(m.Bytes)-start)
}

// Types of extensions and of names.
const (
	Padding = 21     // an extension: RFC 7685
	Grease  = 0x0a0a // an extension that nobody knows: RFC 8701

	HostName  = 0
	OtherName = 1 // a type that nobody uses
)

// Extension appends an extension.
func (m *Message) Extension(kind int, body []byte) {
	m.Uint16(kind)
	m.Vector(fmt.Sprintf("extension %d", kind), 2, func() { m.Raw(body...) })
}

// ServerName appends a server_name extension, whose entries the function list appends.
func (m *Message) ServerName(list func()) {
	m.Uint16(0)
	m.Vector("server name", 2, func() {
		m.Vector("server name list", 2, list)
	})
}

// Entry appends an entry of a server name list.
func (m *Message) Entry(kind byte, name string) {
	of := "host name"
	if kind != HostName {
		of = "other name"
	}
	m.Raw(kind)
	m.Vector(of, 2, func() { m.Raw([]byte(name)...) })
}
