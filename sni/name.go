package sni

import "bytes"

// MaxName is the length of the longest name in bytes. In the DNS a name has at most 253, without
// the dot at its end: RFC 1035, Section 2.3.4.
const MaxName = 254

// AppendCanonical appends the canonical form of name to dst, which may be name[:0]. One dot at the
// end comes off: browsers send it for https://one.example./, and it means the same name.
// (sniproxy-rs refuses it.) ASCII letters become lower case; every other byte stays.
//
// A canonical name has 1 to MaxName bytes. Its labels, between dots, consist of a-z, 0-9, '-' and
// '_', are not empty, and do not begin with '-'. So it is safe as a file name: it is never "..",
// and has no slash and no NUL.
//
// For any other name AppendCanonical returns dst and an [Alert] with [UnrecognizedName], whose
// Reason says what is wrong. The bytes behind dst are undefined then.
func AppendCanonical(dst, name []byte) ([]byte, error) {
	out, a := appendCanonical(dst, name)
	if a != found {
		return dst, alerts[a]
	}
	return out, nil
}

func appendCanonical(dst, name []byte) ([]byte, answer) {
	if n := len(name) - 1; n > 0 && name[n] == '.' {
		name = name[:n]
	}
	if len(name) == 0 {
		return nil, emptyName
	}
	if len(name) > MaxName {
		return nil, longName
	}
	labelStart := true
	for i, c := range name {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case c == '_':
			// Such names are in use. sniproxy-rs refuses them.
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '-':
			if labelStart {
				return nil, leadingHyphen
			}
		case c == '.':
			if labelStart {
				return nil, emptyLabel
			}
		default:
			return nil, badCharacter(name, i)
		}
		labelStart = c == '.'
		dst = append(dst, c)
	}
	if labelStart {
		return nil, emptyLabel
	}
	return dst, found
}

// badCharacter says what a name is in which the character at i is the first that no name has. What
// stands before that may be in lower case already.
func badCharacter(name []byte, i int) answer {
	if isIPv6(name) {
		return address6
	}
	switch c := name[i]; {
	case c == '[' || c == ']':
		return brackets
	case c == ':' && isPort(name[i+1:]):
		return withPort
	case c == ':' && i+1 < len(name) && name[i+1] == '/', c == '/':
		return url
	case c == '*':
		return asterisk
	case c >= 0x80:
		return notASCII
	case c <= ' ' || c == 0x7f:
		return control
	}
	return otherCharacter
}

func isPort(b []byte) bool {
	for _, c := range b {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// isIPv6 reports whether a name is an IPv6 address, in brackets or not. Its zone, behind '%', may
// be anything.
func isIPv6(b []byte) bool {
	if n := len(b) - 1; n > 0 && b[0] == '[' && b[n] == ']' {
		b = b[1:n]
	}
	if i := bytes.IndexByte(b, '%'); i >= 0 && i < len(b)-1 {
		b = b[:i]
	}
	// RFC 4291, Section 2.2: eight groups of up to four digits; one "::" stands for one group or
	// more of zeros; an IPv4 address may stand for the last two groups.
	groups, short := 0, false
	for len(b) > 0 {
		if groups > 0 || b[0] == ':' {
			switch {
			case len(b) > 1 && b[0] == ':' && b[1] == ':' && !short:
				short = true
				b = b[2:]
			case b[0] == ':' && groups > 0 && len(b) > 1:
				b = b[1:]
			default:
				return false
			}
			if len(b) == 0 {
				break
			}
		}
		n := 0
		for n < len(b) && isHex(b[n]) {
			n++
		}
		if n < len(b) && b[n] == '.' && isIPv4(b) {
			groups += 2
			break
		}
		if n == 0 || n > 4 {
			return false
		}
		groups++
		b = b[n:]
	}
	return groups == 8 && !short || groups < 8 && short
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// isIPv4 reports whether b is four numbers below 256 with dots between them.
func isIPv4(b []byte) bool {
	numbers, value, digits := 1, 0, 0
	for _, c := range b {
		switch {
		case c == '.' && digits > 0:
			numbers++
			value, digits = 0, 0
		case '0' <= c && c <= '9' && (digits == 0 || value > 0):
			value = 10*value + int(c-'0')
			if digits++; value > 255 {
				return false
			}
		default:
			return false
		}
	}
	return numbers == 4 && digits > 0
}
