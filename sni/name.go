package sni

// MaxName is the longest name, in bytes. A name in the DNS has at most 253,
// written without the dot at its end: RFC 1035, Section 2.3.4.
const MaxName = 254

// AppendCanonical appends the canonical form of name to dst, which may be
// name[:0]. ASCII letters become lower case; every other byte stays.
//
// A canonical name has 1 to MaxName bytes. Its labels, divided by dots, are of
// a-z, 0-9, '-' and '_', are not empty, and do not begin with '-'. So it is
// never "..", and holds no slash and no NUL: it is safe as a file name.
//
// For any other name it returns dst and an [Alert] with [UnrecognizedName],
// whose Reason says what is wrong; the bytes behind dst are then undefined.
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
			// Names with it are in use. sniproxy-rs refuses them.
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
