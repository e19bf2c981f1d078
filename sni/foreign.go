package sni

// This file tells what a client speaks that does not speak TLS, as far as its first bytes show it.
// What it sent is never passed on: the answer is one of a few.

// signatures are how other protocols begin. A byte of 0x80 and above stands for several.
var signatures = [...]struct {
	begin string
	answer
}{
	{"\x14", notHandshake}, // change_cipher_spec
	{"\x15", notHandshake}, // alert
	{"\x17", notHandshake}, // application_data
	{"\x18", notHandshake}, // heartbeat

	{"PROXY ", proxyHeader},
	{"\r\n\r\n\x00\r\nQUIT\n", proxyHeader}, // version 2

	{"GET ", plainHTTP},
	{"HEAD ", plainHTTP},
	{"POST ", plainHTTP},
	{"PUT ", plainHTTP},
	{"DELETE ", plainHTTP},
	{"CONNECT ", plainHTTP},
	{"OPTIONS ", plainHTTP},
	{"TRACE ", plainHTTP},
	{"PATCH ", plainHTTP},
	{"PROPFIND ", plainHTTP},
	{"PRI * HTTP/2", plainHTTP},

	{"SSH-", ssh},

	// A request for encryption, SSLRequest or GSSENCRequest; and a StartupMessage of version 3.
	{"\x00\x00\x00\x08\x04" + anyByte + "\x16", postgreSQL},
	{"\x00\x00" + anyByte + anyByte + "\x00\x03\x00", postgreSQL},

	{highBit + anyByte + "\x01", ssl2},
	{"\x03\x00", rdp}, // TPKT: RFC 1006
}

const (
	anyByte = "\xff"
	highBit = "\x80" // a byte of 0x80 and above
)

// readForeign reads what cannot be TLS until it is clear what else it is.
func (p *Parser) readForeign(b []byte) {
	for _, c := range b {
		p.name[p.size] = c
		p.size++
		if p.answer = recognize(p.name[:p.size]); p.answer != pending {
			return
		}
	}
}

// recognize returns what begins with b, or pending if that needs more bytes.
func recognize(b []byte) answer {
	a := notTLS
	for i := range signatures {
		s := &signatures[i]
		switch n := common(s.begin, b); n {
		case len(s.begin):
			return s.answer
		case len(b):
			a = pending
		}
	}
	return a
}

// common returns how many bytes of b, from its first on, a signature has.
func common(signature string, b []byte) (n int) {
	for n < min(len(signature), len(b)) {
		if s := signature[n]; s != b[n] && s != anyByte[0] && (s != highBit[0] || b[n] < s) {
			break
		}
		n++
	}
	return n
}

// Foreign returns the [Alert] for a client that will send no more, if what it has sent cannot be
// TLS but is too short to tell what it is. Otherwise it returns nil.
func (p *Parser) Foreign() error {
	if p.answer == pending && p.header == foreign {
		return alerts[notTLS]
	}
	return nil
}
