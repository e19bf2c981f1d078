package proxyproto

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strconv"
	"strings"
)

// A Header is what a header says.
type Header struct {
	// Client and Listener are the ends of the client's connection, as the sender knows them. IPv4
	// addresses are in their own form, not in that of IPv6, and there are no zones.
	//
	// Both are not valid if the header names no addresses: then those of the connection itself
	// count. Such are LOCAL, UNKNOWN, UNSPEC and AF_UNIX.
	Client, Listener netip.AddrPort
}

// MaxParse is the length in bytes of the longest header that [Parse] reads: that of version 2 whose
// addresses and TLVs take 4,096 bytes.
const MaxParse = fixedV2 + maxRestV2

const (
	fixedV2   = 16      // bytes of version 2 before the addresses
	maxRestV2 = 4 << 10 // bytes of the addresses and TLVs

	// Section 2.2 has the other families and commands.
	localV2      = 0x20 // version 2, command LOCAL
	unixStream   = 0x31
	unixDatagram = 0x32
	udpOverIPv4  = 0x12
	udpOverIPv6  = 0x22

	prefixV1 = "PROXY "
)

// ErrMissing means that the bytes do not begin with a header.
var ErrMissing = errors.New("no PROXY protocol header")

var (
	errMalformed = errors.New("malformed PROXY protocol header")
	errTooLong   = errors.New("PROXY protocol header that is too long")
	errProtocol  = errors.New("PROXY protocol header for another protocol than TCP")
)

// Parse parses the header, of either version, at the beginning of b, and returns its length n in
// bytes. If b is too short to tell, n is 0 and the error nil: Parse wants to see the same bytes
// again, with more behind them. That ends at [MaxParse] bytes at the latest.
//
// Parse is strict: whatever the specification does not allow is an error, and so is a header for
// another protocol than TCP. TLVs are skipped unread. An error is final; it is [ErrMissing] if b
// begins otherwise than any header.
func Parse(b []byte) (h Header, n int, err error) {
	switch {
	case begins(b, signatureV2):
		return parseV2(b)
	case begins(b, prefixV1):
		return parseV1(b)
	}
	return Header{}, 0, ErrMissing
}

// begins reports whether b begins with a prefix, as far as b goes.
func begins(b []byte, prefix string) bool {
	n := min(len(b), len(prefix))
	return string(b[:n]) == prefix[:n]
}

// parseV1 parses a line: "PROXY TCP4 CLIENT LISTENER PORT PORT\r\n", the same with TCP6, or
// "PROXY UNKNOWN" with anything behind it (Section 2.1).
func parseV1(b []byte) (h Header, n int, err error) {
	line, _, ended := strings.Cut(string(b[:min(len(b), MaxV1)]), "\n")
	switch {
	case !ended && len(b) >= MaxV1:
		return Header{}, 0, errTooLong
	case !ended:
		return Header{}, 0, nil
	}
	n = len(line) + 1
	line, ok := strings.CutSuffix(line, "\r")
	if !ok || strings.Contains(line, "\r") {
		return Header{}, 0, errMalformed
	}
	fields := strings.Split(line, " ")
	if fields[1] == "UNKNOWN" {
		return Header{}, n, nil
	}
	v4 := fields[1] == "TCP4"
	if len(fields) != 6 || !v4 && fields[1] != "TCP6" {
		return Header{}, 0, errMalformed
	}
	client, ok1 := addressV1(v4, fields[2], fields[4])
	listener, ok2 := addressV1(v4, fields[3], fields[5])
	if !ok1 || !ok2 {
		return Header{}, 0, errMalformed
	}
	return Header{client, listener}, n, nil
}

// addressV1 parses an address of a family, and its port.
func addressV1(v4 bool, addr, port string) (netip.AddrPort, bool) {
	a, err := netip.ParseAddr(addr)
	if err != nil || a.Zone() != "" || a.Is4() != v4 {
		return netip.AddrPort{}, false
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil || strconv.FormatUint(p, 10) != port { // it has a sign, or zeros in front
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), true
}

// parseV2 parses a binary header: the signature, the version and command, the family and protocol,
// the length of the rest, the addresses, and TLVs (Section 2.2).
func parseV2(b []byte) (h Header, n int, err error) {
	if len(b) > 12 && b[12] != proxyV2 && b[12] != localV2 {
		return Header{}, 0, errMalformed
	}
	least, addr := 0, 0 // bytes of the addresses, and of one IP address
	if len(b) > 13 && b[12] == proxyV2 {
		switch b[13] {
		case unspec:
		case tcpOverIPv4:
			least, addr = 4+4+2+2, 4
		case tcpOverIPv6:
			least, addr = 16+16+2+2, 16
		case unixStream, unixDatagram:
			least = 108 + 108
		case udpOverIPv4, udpOverIPv6:
			return Header{}, 0, errProtocol
		default:
			return Header{}, 0, errMalformed
		}
	}
	if len(b) < fixedV2 {
		return Header{}, 0, nil
	}
	length := int(binary.BigEndian.Uint16(b[14:]))
	switch n = fixedV2 + length; {
	case length > maxRestV2:
		return Header{}, 0, errTooLong
	case length < least:
		return Header{}, 0, errMalformed
	case len(b) < n:
		return Header{}, 0, nil
	case addr == 0:
		return Header{}, n, nil
	}
	client, _ := netip.AddrFromSlice(b[fixedV2:][:addr])
	listener, _ := netip.AddrFromSlice(b[fixedV2+addr:][:addr])
	ports := b[fixedV2+2*addr:]
	h.Client = netip.AddrPortFrom(client.Unmap(), binary.BigEndian.Uint16(ports))
	h.Listener = netip.AddrPortFrom(listener.Unmap(), binary.BigEndian.Uint16(ports[2:]))
	return h, n, nil
}
