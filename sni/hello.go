// Package sni finds the host name in the first bytes that a TLS client sends.
//
// A [Parser] takes those bytes as they arrive, in pieces of any size. It answers with the name,
// with an [Alert], or that it needs more. The answer does not depend on where TLS records or the
// network cut the bytes. The package does no I/O, allocates nothing, and keeps no reference to its
// input.
//
// It answers with the name as soon as the last byte of the name has come, and looks at nothing
// behind that. It answers that there is no name only after it has seen all of the hello and found
// it valid.
package sni

// MaxHello is the number of raw bytes, with record headers, within which the name must come, or the
// end of a hello without a name. Real hellos have one or two thousand. sniproxy-rs has no such
// limit.
const MaxHello = 64 << 10

// A Parser finds the server name in a ClientHello. Its zero value is ready for the first byte of a
// connection. It is a plain value without pointers.
type Parser struct {
	taken  uint32 // raw bytes so far
	answer answer

	header uint8  // bytes so far of the record's header, or foreign
	record uint16 // bytes left of the record

	field field
	got   uint8  // bytes so far of the field's value
	flaw  answer // what is wrong; it does not matter if a name comes
	names bool   // a server_name extension has come
	value uint32 // of the field, from the bytes so far
	skip  uint32 // bytes left to skip before the field
	left  uint32 // bytes left, after the field, in the structure around it
	after uint32 // bytes left in the extensions behind server_name

	size uint8             // bytes so far of the name, or of what is not TLS
	name [MaxName + 1]byte // with a dot at its end
}

// Parse continues with b, the raw bytes that follow those of earlier calls. Done tells whether it
// has an answer: the canonical name (see [AppendCanonical]), in memory of p itself, empty if the
// client names no host; or an [Alert]. From then on it returns the same, and ignores b.
//
// A client names no host if its complete, valid ClientHello has no extensions, no server_name
// extension, or no host_name in that; or if its server name is an IPv6 address, see
// [Parser.Address]. Other readers of the same bytes find no name either, so such a client can be
// served without one. A valid hello has good records and good lengths up to its end; a session id,
// cipher suites, compression methods and a server name list within the bounds of RFC 8446 and RFC
// 6066; and at most one server_name extension. What is inside other extensions, and inside names of
// other types, does not matter.
//
// Parse does not look behind the name, since the rest of the hello is for the server to judge, nor
// behind a hello without a name.
func (p *Parser) Parse(b []byte) (name []byte, done bool, err error) {
	if p.answer == pending {
		b = b[:min(len(b), MaxHello-int(p.taken))]
		p.taken += uint32(len(b))
		p.readRecords(b)
		if p.answer == pending && p.taken >= MaxHello {
			p.answer = tooLate
		}
	}
	switch p.answer {
	case pending:
		return nil, false, nil
	case found, nameless, address6:
		return p.name[:p.size], true, nil
	default:
		return nil, true, alerts[p.answer]
	}
}

// Address reports whether the client has sent an IPv6 address in place of a server name, in
// brackets or not. RFC 6066, Section 3: "Literal IPv4 and IPv6 addresses are not permitted". (An
// IPv4 address is a canonical name.)
func (p *Parser) Address() bool { return p.answer == address6 }

// readRecords takes b apart into records and passes on their contents. RFC 8446, Section 5.1.
func (p *Parser) readRecords(b []byte) {
	for len(b) > 0 && p.answer == pending {
		if p.header == foreign {
			p.readForeign(b)
			return
		}
		if p.header == 0 && b[0] != handshake && p.field == messageType {
			p.header = foreign
			continue
		}
		if p.header < recordHeader {
			p.readHeader(b[0])
			b = b[1:]
			continue
		}
		n := min(len(b), int(p.record))
		p.readHandshake(b[:n])
		b = b[n:]
		p.record -= uint16(n)
		if p.record == 0 {
			p.header = 0
		}
	}
}

const (
	recordHeader = 5       // type, version, length
	maxRecord    = 1 << 14 // "The length MUST NOT exceed 2^14 bytes."
	handshake    = 22      // ContentType
	foreign      = 1 << 7  // in place of header: the first byte was not that of a record of handshake
)

// readHeader reads one byte of a record's header. The version "MUST be ignored for all purposes".
func (p *Parser) readHeader(c byte) {
	switch p.header {
	case 0:
		if c != handshake {
			// "Handshake messages MUST NOT be interleaved with other record types."
			p.answer = interleaved
		}
	case 3:
		p.record = uint16(c) << 8
	case 4:
		p.record |= uint16(c)
		switch {
		case p.record == 0:
			// "Implementations MUST NOT send zero-length fragments of Handshake types".
			p.answer = emptyRecord
		case p.record > maxRecord:
			p.answer = longRecord
		}
	}
	p.header++
}

// A field is a number in the ClientHello that the parser needs. It skips all bytes between two
// fields.
type field uint8

const (
	// RFC 8446, Section 4.
	messageType field = iota
	messageLength
	// RFC 8446, Section 4.1.2.
	sessionID          // length
	cipherSuites       // length
	compressionMethods // length
	extensions         // length
	// RFC 8446, Section 4.2.
	extension // type and length
	// RFC 6066, Section 3.
	serverNameList // length
	serverName     // type and length
	serverNameEnd  // of the list and its extension, without a host name: no bytes
	helloEnd       // without a host name: no bytes
	hostName       // not a number: the name itself
)

// fields holds, for each field that is a number, its size in bytes, and the field that follows in
// its place if the structure around it ends there. Where the structure may not end, that is the
// same field, for which there is no room.
var fields = [...]struct {
	size uint8
	end  field
}{
	messageType:        {size: 1},
	messageLength:      {size: 3},
	sessionID:          {1, sessionID},
	cipherSuites:       {2, cipherSuites},
	compressionMethods: {1, compressionMethods},
	extensions:         {2, helloEnd}, // optional before TLS 1.3
	extension:          {4, helloEnd},
	serverNameList:     {2, serverNameList},
	serverName:         {3, serverNameEnd},
	serverNameEnd:      {size: 0},
	helloEnd:           {size: 0},
}

// readHandshake reads the next bytes of the handshake messages, up to the name or the end of a
// hello without one.
func (p *Parser) readHandshake(b []byte) {
	for p.answer == pending && p.field != hostName {
		if n := uint32(len(b)); n < p.skip {
			p.skip -= n
			return
		}
		b = b[p.skip:]
		p.skip = 0
		for ; p.got < fields[p.field].size; p.got++ {
			if len(b) == 0 {
				return
			}
			p.value = p.value<<8 | uint32(b[0])
			b = b[1:]
		}
		value := p.value
		p.value, p.got = 0, 0
		p.next(value)
	}
	if p.answer == pending {
		p.readName(b)
	}
}

const (
	clientHello   = 1      // HandshakeType
	versionRandom = 2 + 32 // legacy_version and random
	maxSessionID  = 32     // bytes
	serverNameExt = 0      // ExtensionType
	hostNameType  = 0      // NameType
)

// next goes on from the current field, now that its value is known.
func (p *Parser) next(value uint32) {
	kind, length := value>>16, value&0xffff // for the fields that are both
	switch p.field {
	case messageType:
		if value != clientHello {
			p.answer = notClientHello
		}
		p.field = messageLength
	case messageLength:
		p.left = value
		p.expect(sessionID, versionRandom)
	case sessionID:
		if value > maxSessionID {
			p.flaw = longSessionID
		}
		p.expect(cipherSuites, value)
	case cipherSuites:
		if value == 0 || value%2 != 0 {
			p.flaw = badCipherSuites
		}
		p.expect(compressionMethods, value)
	case compressionMethods:
		if value == 0 {
			p.flaw = noCompression
		}
		p.expect(extensions, value)
	case extensions:
		p.expectList(extension, value)
	case extension:
		switch {
		case kind != serverNameExt:
			p.expect(extension, length)
		case p.names:
			// "There MUST NOT be more than one extension of the same type".
			p.answer = secondServerName
		case length > p.left:
			p.answer = overrun
		default:
			p.names = true
			p.after = p.left - length
			p.left = length
			p.expect(serverNameList, 0)
		}
	case serverNameList:
		if value == 0 {
			p.answer = emptyList
			return
		}
		p.expectList(serverName, value)
	case serverName:
		switch {
		case kind != hostNameType:
			p.expect(serverName, length)
		case length > p.left:
			p.answer = overrun
		case length > MaxName+1:
			p.answer = longName
		default:
			p.field = hostName
			p.left = length
		}
	case serverNameEnd:
		p.left = p.after
		p.expect(extension, 0)
	case helloEnd:
		p.answer = nameless
		if p.flaw != pending {
			p.answer = p.flaw
		}
	}
}

// expect makes f the next field, after skip bytes, if there is room for both. If the structure ends
// with those bytes, it takes the field that follows at the end.
func (p *Parser) expect(f field, skip uint32) {
	if skip == p.left {
		f = fields[f].end
	}
	need := skip + uint32(fields[f].size)
	if need > p.left {
		p.answer = overrun
		return
	}
	p.field = f
	p.skip = skip
	p.left -= need
}

// expectList makes f the next field, the first of a list that must end where the structure around
// it ends: the extensions end with the message, and the server name list ends with its extension.
func (p *Parser) expectList(f field, length uint32) {
	if length != p.left {
		p.answer = trailing
		return
	}
	p.expect(f, 0)
}

// readName reads the next bytes of the name.
func (p *Parser) readName(b []byte) {
	n := copy(p.name[p.size:][:p.left], b)
	p.size += uint8(n)
	p.left -= uint32(n)
	if p.left == 0 {
		canonical, answer := appendCanonical(p.name[:0], p.name[:p.size])
		p.answer, p.size = answer, uint8(len(canonical))
	}
}
