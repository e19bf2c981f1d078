package ech

import (
	"bytes"
	"crypto/hpke"
	"encoding/binary"
	"slices"

	"sniproxy/sni"
)

// RFC 8446, Sections 4, 5.1 and 6; RFC 9849, Section 11.
const (
	recordHeader = 5
	maxRecord    = 1 << 14
	handshake    = 22 // ContentType

	messageHeader = 4
	clientHello   = 1 // HandshakeType
	serverHello   = 2

	supportedVersions = 43 // ExtensionType
	outerExtensions   = 0xfd00
	encryptedHello    = 0xfe0d

	tls12 = 0x0303
	tls13 = 0x0304
)

// Alerts for hellos. In front of the reason for one about a second hello stands that it is one.
var (
	interleaved    = sni.Alert{Description: sni.UnexpectedMessage, Reason: "another record type within the client hello"}
	emptyRecord    = sni.Alert{Description: sni.DecodeError, Reason: "empty handshake record"}
	longRecord     = sni.Alert{Description: sni.RecordOverflow, Reason: "record is longer than 2^14 bytes"}
	notClientHello = sni.Alert{Description: sni.UnexpectedMessage, Reason: "message is not a client hello"}
	trailing       = sni.Alert{Description: sni.UnexpectedMessage, Reason: "client hello does not end with its record"}
	tooLong        = sni.Alert{Description: sni.InternalError, Reason: "no end of the client hello within the first 64 KiB"}

	malformedECH = sni.Alert{Description: sni.DecodeError, Reason: "malformed encrypted_client_hello extension"}
	secondECH    = sni.Alert{Description: sni.DecodeError, Reason: "client hello has a second encrypted_client_hello extension"}
	typeInner    = sni.Alert{Description: sni.IllegalParameter, Reason: "encrypted_client_hello extension of type inner from the network"}
)

// A Scanner finds the end of the ClientHello that bytes begin with. Its zero value is ready.
type Scanner struct {
	next   int                 // offset of the next record
	size   int                 // bytes of the message in the records before that
	header [messageHeader]byte // of the message
}

// End returns the offset in b behind the last record of the ClientHello, 0 if that has not come
// yet. B is all that has come, and what was in it at the last call. The error is an [sni.Alert].
// However the bytes are cut, all calls together cost linear work.
func (s *Scanner) End(b []byte) (end int, err error) {
	for {
		record := b[min(s.next, len(b)):]
		switch {
		case len(record) > 0 && record[0] != handshake:
			// RFC 8446, Section 5.1: "Handshake messages MUST NOT be interleaved with other record
			// types."
			return 0, interleaved
		case len(record) >= recordHeader && record[3]|record[4] == 0:
			return 0, emptyRecord
		case len(record) >= recordHeader && length(record) > maxRecord:
			return 0, longRecord
		case len(record) < recordHeader || len(record)-recordHeader < length(record):
			if len(b) >= sni.MaxHello {
				return 0, tooLong
			}
			return 0, nil
		}
		content := record[recordHeader:][:length(record)]
		if s.size < messageHeader {
			copy(s.header[s.size:], content)
		}
		s.size += len(content)
		s.next += recordHeader + len(content)
		if s.header[0] != clientHello {
			return 0, notClientHello
		}
		if s.next > sni.MaxHello {
			return 0, tooLong
		}
		if s.size >= messageHeader && s.size >= s.messageSize() {
			return s.next, nil
		}
	}
}

// messageSize is that of the message with its header.
func (s *Scanner) messageSize() int {
	return messageHeader + int(s.header[1])<<16 + int(binary.BigEndian.Uint16(s.header[2:]))
}

// length is that of the content of a record.
func length(record []byte) int { return int(binary.BigEndian.Uint16(record[3:])) }

// contents returns what whole records hold: a part of b if it is one.
func contents(b []byte) []byte {
	first := b[recordHeader:][:length(b)]
	b = b[recordHeader+len(first):]
	if len(b) == 0 {
		return first
	}
	all := append(make([]byte, 0, len(first)+len(b)), first...)
	for len(b) > 0 {
		n := length(b)
		all = append(all, b[recordHeader:][:n]...)
		b = b[recordHeader+n:]
	}
	return all
}

// appendRecords appends a handshake message as records of a version. "The record layer fragments
// information blocks into TLSPlaintext records carrying data in chunks of 2^14 bytes or less."
func appendRecords(dst []byte, version uint16, msg []byte) []byte {
	for part := range slices.Chunk(msg, maxRecord) {
		dst = append(dst, handshake)
		dst = binary.BigEndian.AppendUint16(dst, version)
		dst = appendVector16(dst, part)
	}
	return dst
}

// Open opens the ClientHello in records, as a [Scanner] has found it. It appends the inner hello to
// dst, as records of the version that the first of them has, and returns the session that goes on
// from there. The session is nil if the hello is not encrypted to any of the keys, which must be a
// host's own business then: dst is unchanged. The error is an [sni.Alert].
//
// It decrypts at most once for each key that has the config id and the cipher suite of the hello.
func Open(dst []byte, keys []*Key, records []byte) ([]byte, *Session, error) {
	msg := contents(records)
	h, ok := parseOuter(msg)
	if !ok || h.ech == nil {
		return dst, nil, nil
	}
	e, err := h.extension()
	if err != nil {
		return dst, nil, err
	}
	var aad []byte
	for _, k := range keys {
		if k.id != e.id || !slices.Contains(k.suites, e.suite) || len(e.enc) != len(k.seed) {
			continue
		}
		if aad == nil {
			aad = h.aad(e)
		}
		recipient, err := k.recipient(e)
		if err != nil {
			continue
		}
		encoded, err := recipient.Open(aad, e.payload)
		if err != nil {
			continue
		}
		inner, err := h.inner(encoded)
		if err != nil {
			return dst, nil, err
		}
		dst = appendRecords(dst, binary.BigEndian.Uint16(records[1:]), inner)
		return dst, &Session{recipient: recipient, id: e.id, suite: e.suite}, nil
	}
	return dst, nil, nil
}

// recipient sets up what opens the hellos of a connection. RFC 9849, Section 7.1.
func (k *Key) recipient(e extension) (*hpke.Recipient, error) {
	kdf, err := hpke.NewKDF(e.suite.kdf)
	if err != nil {
		return nil, err
	}
	aead, err := hpke.NewAEAD(e.suite.aead)
	if err != nil {
		return nil, err
	}
	info := append([]byte("tls ech\x00"), k.config...)
	return hpke.NewRecipient(e.enc, k.private, kdf, aead, info)
}

// An outer is a ClientHello as it came from the network.
type outer struct {
	msg        []byte // the message, and what stands behind it in its records
	size       int    // of the message
	sessionID  []byte
	extensions []byte
	ech        []byte // what is in its first encrypted_client_hello extension, nil if it has none
	echEnd     int    // offset in msg behind that
	second     bool   // it has another one
}

// parseOuter takes a hello apart as far as the encrypted one needs it. It fails if a length does
// not fit: that is for the backend to refuse.
func parseOuter(msg []byte) (h outer, ok bool) {
	all := reader{b: msg}
	all.uint8() // type
	size := all.uint8()<<16 | all.uint16()
	r := reader{b: all.bytes(size)}
	r.bytes(2 + 32) // legacy_version and random
	h = outer{msg: msg, size: messageHeader + size, sessionID: r.vector8()}
	r.vector16() // cipher_suites
	r.vector8()  // legacy_compression_methods
	h.extensions = r.vector16()
	if all.bad || !r.done() {
		return h, false
	}
	for list := (reader{b: h.extensions}); len(list.b) > 0; {
		kind, body := list.uint16(), list.vector16()
		switch {
		case list.bad:
			return h, false
		case kind == encryptedHello && h.ech != nil:
			h.second = true
		case kind == encryptedHello:
			h.ech, h.echEnd = body, h.size-len(list.b)
		}
	}
	return h, true
}

// An extension is an ECHClientHello of type outer: RFC 9849, Section 5.
type extension struct {
	suite   suite
	id      uint8
	enc     []byte
	payload []byte // at the end of the extension
}

// extension parses the encrypted_client_hello extension.
func (h *outer) extension() (e extension, err error) {
	const typeOuter, typeOfInner = 0, 1
	r := reader{b: h.ech}
	kind := r.uint8()
	switch {
	case h.second:
		return e, secondECH
	case !r.bad && kind == typeOfInner:
		return e, typeInner
	case kind != typeOuter:
		return e, malformedECH
	}
	e.suite = suite{uint16(r.uint16()), uint16(r.uint16())}
	e.id = uint8(r.uint8())
	e.enc = r.vector16()
	e.payload = r.vector16()
	if !r.done() || len(e.payload) == 0 {
		return e, malformedECH
	}
	return e, nil
}

// aad is what the payload is authenticated with: the hello without the header of the message, and
// with zeros in place of the payload. RFC 9849, Section 5.2.
func (h *outer) aad(e extension) []byte {
	aad := bytes.Clone(h.msg[:h.size])
	clear(aad[h.echEnd-len(e.payload) : h.echEnd])
	return aad[messageHeader:]
}

// Alerts for inner hellos. RFC 9849, Section 5.1 has illegal_parameter for all that is wrong with
// how they are encoded, and Section 7.1 for those that a backend could not serve.
var (
	badInner      = illegal("a length in the inner client hello does not fit")
	innerSession  = illegal("encoded inner client hello has a session id")
	badPadding    = illegal("padding of the inner client hello is not zero")
	badOuterList  = illegal("malformed ech_outer_extensions extension")
	wrongOuter    = illegal("ech_outer_extensions names an extension that the outer client hello does not have, or not in that order")
	outerECH      = illegal("ech_outer_extensions names encrypted_client_hello")
	twoExtensions = illegal("inner client hello has two extensions of one type")
	notInner      = illegal("inner client hello has no encrypted_client_hello extension of type inner")
	oldVersion    = illegal("inner client hello offers a version below TLS 1.3")
)

func illegal(reason string) error {
	return sni.Alert{Description: sni.IllegalParameter, Reason: reason}
}

// inner is decode, for a hello that ends with its record: RFC 8446, Section 5.1 wants that of
// messages before a change of keys, and a second hello could not be found behind other bytes.
func (h *outer) inner(encoded []byte) ([]byte, error) {
	if len(h.msg) > h.size {
		return nil, trailing
	}
	return h.decode(encoded)
}

// decode makes the inner hello, a message, of an EncodedClientHelloInner: RFC 9849, Section 5.1.
// The error is an [sni.Alert].
func (h *outer) decode(encoded []byte) ([]byte, error) {
	r := reader{b: encoded}
	versionRandom := r.bytes(2 + 32)
	session := r.vector8()
	suites := r.vector16()
	compression := r.vector8()
	extensions := reader{b: r.vector16()}
	switch {
	case r.bad:
		return nil, badInner
	case len(session) > 0:
		return nil, innerSession
	case len(bytes.TrimLeft(r.b, "\x00")) > 0:
		return nil, badPadding
	}
	msg := make([]byte, messageHeader, messageHeader+len(encoded)+len(h.extensions))
	msg = append(msg, versionRandom...)
	msg = appendVector8(msg, h.sessionID)
	msg = appendVector16(msg, suites)
	msg = appendVector8(msg, compression)
	start := len(msg)
	msg = append(msg, 0, 0)
	var seen typeSet
	var versions, ech []byte
	add := func(kind int, body []byte) error {
		if kind == supportedVersions {
			versions = body
		} else if kind == encryptedHello {
			ech = body
		}
		if !seen.add(kind) {
			return twoExtensions
		}
		msg = binary.BigEndian.AppendUint16(msg, uint16(kind))
		msg = appendVector16(msg, body)
		return nil
	}
	for len(extensions.b) > 0 {
		kind, body := extensions.uint16(), extensions.vector16()
		var err error
		switch {
		case extensions.bad:
			err = badInner
		case kind != outerExtensions:
			err = add(kind, body)
		case !seen.add(kind):
			err = twoExtensions
		default:
			err = h.expand(body, add)
		}
		if err != nil {
			return nil, err
		}
	}
	switch {
	case !bytes.Equal(ech, []byte{1}): // type inner, and nothing more
		return nil, notInner
	case !newVersions(versions):
		return nil, oldVersion
	}
	// What the encoding holds, and what it refers to, are parts of the outer hello, each only once:
	// so the inner one is shorter, and every length fits.
	binary.BigEndian.PutUint16(msg[start:], uint16(len(msg)-start-2))
	binary.BigEndian.PutUint32(msg, uint32(len(msg)-messageHeader))
	msg[0] = clientHello
	return msg, nil
}

// expand adds the extensions of the outer hello that an ech_outer_extensions extension names. They
// must be in the same order there, and one look through the outer hello finds them all.
func (h *outer) expand(body []byte, add func(kind int, body []byte) error) error {
	r := reader{b: body}
	types := reader{b: r.vector8()}
	if !r.done() || len(types.b) == 0 || len(types.b)%2 != 0 {
		return badOuterList
	}
	for list := (reader{b: h.extensions}); len(types.b) > 0; {
		want := types.uint16()
		if want == encryptedHello {
			return outerECH
		}
		for found := false; !found; {
			if len(list.b) == 0 {
				return wrongOuter
			}
			kind, body := list.uint16(), list.vector16()
			if found = kind == want; found {
				if err := add(kind, body); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// newVersions reports whether a supported_versions extension offers TLS 1.3 and nothing below it.
// The values of RFC 8701 (GREASE) are above it.
func newVersions(body []byte) (ok bool) {
	r := reader{b: body}
	for list := (reader{b: r.vector8()}); len(list.b) > 0; {
		v := list.uint16()
		if list.bad || v < tls13 {
			return false
		}
		ok = ok || v == tls13
	}
	return ok && r.done()
}

// A typeSet has types of extensions.
type typeSet [1 << 16 / 64]uint64

// add reports whether the type is a new one.
func (s *typeSet) add(kind int) bool {
	bit := uint64(1) << (kind % 64)
	is := s[kind/64]&bit == 0
	s[kind/64] |= bit
	return is
}
