// Package proxyproto writes and reads headers of the PROXY protocol, which tell a backend who the
// client is.
//
// The specification is https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt.
package proxyproto

import (
	"encoding/binary"
	"net/netip"
	"strconv"
)

// MaxV1 is the length in bytes of the longest header of version 1, with its CRLF (Section 2.1 of
// the specification).
const MaxV1 = 107

// AppendV1 appends the header of version 1 for a TCP connection from client to listener, the
// address that it was accepted on, and returns the longer slice. It appends at most [MaxV1] bytes.
//
// A dual-stack socket reports clients that use IPv4 as ::ffff:a.b.c.d. AppendV1 writes such
// addresses as TCP4, in dotted form. sniproxy-rs writes "TCP6 ::ffff:a.b.c.d", which some receivers
// refuse. Zones are left out. If the two addresses are of different families, which cannot happen
// for one connection, or if either is not valid, the header is "PROXY UNKNOWN".
func AppendV1(dst []byte, client, listener netip.AddrPort) []byte {
	src, to, ok := addresses(client, listener)
	switch {
	case !ok:
		return append(dst, "PROXY UNKNOWN\r\n"...)
	case src.Is4():
		dst = append(dst, "PROXY TCP4 "...)
	default:
		dst = append(dst, "PROXY TCP6 "...)
	}
	dst = src.AppendTo(dst)
	dst = append(dst, ' ')
	dst = to.AppendTo(dst)
	dst = append(dst, ' ')
	dst = strconv.AppendUint(dst, uint64(client.Port()), 10)
	dst = append(dst, ' ')
	dst = strconv.AppendUint(dst, uint64(listener.Port()), 10)
	return append(dst, "\r\n"...)
}

// MaxV2 is the length in bytes of the longest header of version 2: the fixed part, two IPv6
// addresses with their ports, and the type, the length and the 254 bytes of the longest host name
// (Section 2.2).
const MaxV2 = 16 + 36 + 3 + 254

// The fixed part of a header of version 2, without its length (Section 2.2).
const (
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"
	proxyV2     = 0x21 // version 2, command PROXY

	unspec      = 0x00
	tcpOverIPv4 = 0x11
	tcpOverIPv6 = 0x21
)

// Types of TLVs, and of those within PP2_TYPE_SSL (Section 2.2).
const (
	typeALPN      = 0x01 // PP2_TYPE_ALPN
	typeAuthority = 0x02 // PP2_TYPE_AUTHORITY, "the host name value passed by the client"
	typeSSL       = 0x20 // PP2_TYPE_SSL
	typeVersion   = 0x21 // PP2_SUBTYPE_SSL_VERSION
	typeCN        = 0x22 // PP2_SUBTYPE_SSL_CN
	typeCipher    = 0x23 // PP2_SUBTYPE_SSL_CIPHER

	clientSSL         = 0x01 // PP2_CLIENT_SSL
	clientCertConn    = 0x02 // PP2_CLIENT_CERT_CONN
	clientCertSession = 0x04 // PP2_CLIENT_CERT_SESS
)

// AppendV2 appends the header of version 2 for a TCP connection from client to listener, the
// address that it was accepted on, and returns the longer slice. The authority is the host name
// that the client asked for, of at most 254 bytes; if it is empty, the header has no such field.
// AppendV2 appends at most [MaxV2] bytes.
//
// It writes the same addresses as [AppendV1]. Where AppendV1 writes "PROXY UNKNOWN", this header
// says UNSPEC and has neither addresses nor authority.
func AppendV2(dst []byte, client, listener netip.AddrPort, authority []byte) []byte {
	start := len(dst)
	dst = append(dst, signatureV2...)
	src, to, ok := addresses(client, listener)
	if !ok {
		return append(dst, proxyV2, unspec, 0, 0)
	}
	protocol := byte(tcpOverIPv4)
	if src.Is6() {
		protocol = tcpOverIPv6
	}
	dst = append(dst, proxyV2, protocol, 0, 0)
	dst, _ = src.AppendBinary(dst) // never fails
	dst, _ = to.AppendBinary(dst)
	dst = binary.BigEndian.AppendUint16(dst, client.Port())
	dst = binary.BigEndian.AppendUint16(dst, listener.Port())
	dst = appendTLV(dst, typeAuthority, authority)
	setLengthV2(dst[start:])
	return dst
}

// TLS is what a header of version 2 says about a client's TLS connection, which its sender has
// ended. What is empty is left out.
type TLS struct {
	ALPN    string // the protocol that was agreed on
	Version string // such as "TLSv1.3"
	Cipher  string // as OpenSSL calls it, such as "ECDHE-RSA-AES128-GCM-SHA256"

	// Verified tells that the client has presented a certificate, which was verified; Resumed, that
	// it did so in an earlier connection of the same session. CommonName is that of its subject.
	Verified, Resumed bool
	CommonName        string
}

// MaxField is the length in bytes of the longest field of a [TLS].
const MaxField = 255

// MaxV2TLS is the length in bytes of the longest header that [AppendV2TLS] appends.
const MaxV2TLS = MaxV2 + 3 + MaxField + 3 + 5 + 3*(3+MaxField)

// AppendV2TLS is [AppendV2] for a client whose TLS connection the sender has ended: behind the
// authority it writes the TLVs PP2_TYPE_ALPN and PP2_TYPE_SSL. A field that is longer than
// [MaxField] is left out: part of a name could be another name.
func AppendV2TLS(dst []byte, client, listener netip.AddrPort, authority []byte, t TLS) []byte {
	start := len(dst)
	dst = AppendV2(dst, client, listener, authority)
	if dst[start+13] == unspec {
		return dst
	}
	dst = appendField(dst, typeALPN, t.ALPN)
	ssl := len(dst)
	dst = append(dst, typeSSL, 0, 0)
	flags, verify := byte(clientSSL), uint32(1) // 0 is for a certificate that was verified
	if t.Verified {
		flags, verify = flags|clientCertSession, 0
		if !t.Resumed {
			flags |= clientCertConn
		}
	}
	dst = append(dst, flags)
	dst = binary.BigEndian.AppendUint32(dst, verify)
	dst = appendField(dst, typeVersion, t.Version)
	if t.Verified {
		dst = appendField(dst, typeCN, t.CommonName)
	}
	dst = appendField(dst, typeCipher, t.Cipher)
	binary.BigEndian.PutUint16(dst[ssl+1:], uint16(len(dst)-ssl-3))
	setLengthV2(dst[start:])
	return dst
}

// appendField appends a field of a TLS, unless it is too long.
func appendField(dst []byte, kind byte, value string) []byte {
	if len(value) > MaxField {
		return dst
	}
	return appendTLV(dst, kind, []byte(value))
}

// appendTLV appends a TLV, unless it is empty.
func appendTLV(dst []byte, kind byte, value []byte) []byte {
	if len(value) == 0 {
		return dst
	}
	dst = append(dst, kind)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(value)))
	return append(dst, value...)
}

// setLengthV2 writes how many bytes follow the fixed part of a header.
func setLengthV2(header []byte) {
	binary.BigEndian.PutUint16(header[14:], uint16(len(header)-fixedV2))
}

// addresses returns the addresses of both ends as headers have them, and whether their families are
// the same.
func addresses(client, listener netip.AddrPort) (src, to netip.Addr, ok bool) {
	src = client.Addr().Unmap().WithZone("")
	to = listener.Addr().Unmap().WithZone("")
	return src, to, src.IsValid() && src.BitLen() == to.BitLen()
}
