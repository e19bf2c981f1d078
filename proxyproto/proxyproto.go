// Package proxyproto writes headers of the PROXY protocol, which tell a backend
// who the client is.
//
// The protocol is specified in
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt.
package proxyproto

import (
	"net/netip"
	"strconv"
)

// MaxV1 is the length in bytes of the longest header of version 1, its CRLF
// included (Section 2.1 of the specification).
const MaxV1 = 107

// AppendV1 appends the header of version 1 for a connection over TCP from client
// to listener, the address that it was accepted on, and returns the longer slice.
// It appends at most [MaxV1] bytes.
//
// Addresses of the form ::ffff:a.b.c.d, as a dual-stack socket reports clients
// that use IPv4, are written as TCP4 with dotted addresses. sniproxy-rs writes
// "TCP6 ::ffff:a.b.c.d", which some receivers refuse. Zones are left out. One
// header has one family: if the two addresses do not share theirs, which cannot
// be for one connection, or if either is not valid, the header is "PROXY UNKNOWN".
func AppendV1(dst []byte, client, listener netip.AddrPort) []byte {
	src := client.Addr().Unmap().WithZone("")
	to := listener.Addr().Unmap().WithZone("")
	switch {
	case src.Is4() && to.Is4():
		dst = append(dst, "PROXY TCP4 "...)
	case src.Is6() && to.Is6():
		dst = append(dst, "PROXY TCP6 "...)
	default:
		return append(dst, "PROXY UNKNOWN\r\n"...)
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
