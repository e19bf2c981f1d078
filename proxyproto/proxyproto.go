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

// typeAuthority is PP2_TYPE_AUTHORITY, "the host name value passed by the client" (Section 2.2.2).
const typeAuthority = 0x02

// AppendV2 appends the header of version 2 for a TCP connection from client to listener, the
// address that it was accepted on, and returns the longer slice. The authority is the host name
// that the client asked for, of at most 254 bytes; if it is empty, the header has no such field.
// AppendV2 appends at most [MaxV2] bytes.
//
// It writes the same addresses as [AppendV1]. Where AppendV1 writes "PROXY UNKNOWN", this header
// says UNSPEC and has neither addresses nor authority.
func AppendV2(dst []byte, client, listener netip.AddrPort, authority []byte) []byte {
	dst = append(dst, signatureV2...)
	src, to, ok := addresses(client, listener)
	if !ok {
		return append(dst, proxyV2, unspec, 0, 0)
	}
	protocol, length := byte(tcpOverIPv4), 4+4+2+2
	if src.Is6() {
		protocol, length = tcpOverIPv6, 16+16+2+2
	}
	if len(authority) > 0 {
		length += 3 + len(authority)
	}
	dst = append(dst, proxyV2, protocol)
	dst = binary.BigEndian.AppendUint16(dst, uint16(length))
	dst, _ = src.AppendBinary(dst) // never fails
	dst, _ = to.AppendBinary(dst)
	dst = binary.BigEndian.AppendUint16(dst, client.Port())
	dst = binary.BigEndian.AppendUint16(dst, listener.Port())
	if len(authority) > 0 {
		dst = append(dst, typeAuthority)
		dst = binary.BigEndian.AppendUint16(dst, uint16(len(authority)))
		dst = append(dst, authority...)
	}
	return dst
}

// addresses returns the addresses of both ends as headers have them, and whether their families are
// the same.
func addresses(client, listener netip.AddrPort) (src, to netip.Addr, ok bool) {
	src = client.Addr().Unmap().WithZone("")
	to = listener.Addr().Unmap().WithZone("")
	return src, to, src.IsValid() && src.BitLen() == to.BitLen()
}
