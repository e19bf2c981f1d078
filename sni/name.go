package sni

// MaxName is the length of the longest name in bytes. In the DNS a name has at most 253, without
// the dot at its end: RFC 1035, Section 2.3.4.
const MaxName = 254

// AppendCanonical appends the canonical form of name to dst, which may be name[:0]. ASCII letters
// become lower case; every other byte stays.
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
	if len(name) == 0 {
		return nil, emptyName
	}
	if len(name) > MaxName {
		return nil, longName
	}
	labelStart := true
	for _, c := range name {
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
			return nil, badCharacter
		}
		labelStart = c == '.'
		dst = append(dst, c)
	}
	if labelStart {
		return nil, trailingDot
	}
	return dst, found
}
