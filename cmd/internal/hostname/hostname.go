// Package hostname turns names of hosts, as people write them, into canonical names. The programs
// that people give names to use it.
package hostname

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"sniproxy/sni"
)

// Limits of the DNS on a name without its root label: RFC 1035, Section 2.3.4. The profile enforces
// them too, but its error does not name them.
const (
	maxLabel = 63
	maxName  = 253
)

// The profile is UTS #46, non-transitional. The options after MapForLookup leave it to the proxy's
// own rule where ASCII characters and hyphens may stand.
var profile = idna.New(
	idna.MapForLookup(),
	idna.Transitional(false),
	idna.StrictDomainName(false),
	idna.VerifyDNSLength(true),
	idna.CheckHyphens(false),
	idna.CheckJoiners(false),
	idna.BidiRule(),
)

// Parse returns the canonical name of the host, or the wildcard, that a person calls s. The
// asterisk is not part of a name and so is not mapped: only the one in ASCII makes a wildcard. The
// error is for people.
func Parse(s string) ([]byte, error) {
	if s == "*" {
		return []byte(s), nil
	}
	host, wildcard := strings.CutPrefix(s, "*.")
	name, err := canonical(host)
	if err != nil || !wildcard {
		return name, err
	}
	if len("*.")+len(name) > maxName {
		return nil, fmt.Errorf("wildcard is longer than %d bytes", maxName)
	}
	return append([]byte("*."), name...), nil
}

// canonical returns the canonical name of the host that a person calls s.
func canonical(s string) ([]byte, error) {
	if !utf8.ValidString(s) {
		return nil, errors.New("not valid UTF-8") // the profile accepts it
	}
	// Where the profile refuses s, it still returns a name. The proxy's rule comes first, since its
	// error says more exactly what is wrong.
	ascii, profileErr := profile.ToASCII(withoutRoot(s))
	if profileErr == nil {
		// Once more: the profile looks for right-to-left characters before it maps. It lets ℵa
		// pass, maps ℵ (U+2135) to the letter א, and only then would the Bidi rule refuse the name.
		ascii, profileErr = profile.ToASCII(ascii)
	}
	name, err := sni.AppendCanonical(nil, []byte(ascii))
	if alert, ok := errors.AsType[sni.Alert](err); ok {
		return nil, errors.New(alert.Reason) // the alert's number is for TLS clients
	}
	if err != nil {
		return nil, err
	}
	if len(name) < len(ascii) {
		return nil, errors.New("name ends with two dots")
	}
	for label := range strings.SplitSeq(ascii, ".") {
		if len(label) > maxLabel {
			return nil, fmt.Errorf("a label is longer than %d bytes", maxLabel)
		}
	}
	if len(ascii) > maxName {
		return nil, fmt.Errorf("name is longer than %d bytes", maxName)
	}
	if profileErr != nil {
		return nil, fmt.Errorf("not a valid internationalized name: %w", profileErr)
	}
	return name, nil
}

// withoutRoot returns s without the dot at its end, which stands for the root. The dot may also be
// one of the characters that UTS #46, Section 2.3 maps to it: U+3002, U+FF0E and U+FF61.
func withoutRoot(s string) string {
	last, size := utf8.DecodeLastRuneInString(s)
	if strings.ContainsRune(".。．｡", last) {
		return s[:len(s)-size]
	}
	return s
}
