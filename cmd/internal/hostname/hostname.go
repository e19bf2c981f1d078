// Package hostname has the names of hosts as people write them, for the programs that people give names to.
package hostname

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"sniproxy/sni"
)

// Limits of the DNS, RFC 1035, Section 2.3.4, on a name without its root label. The profile enforces them, but its
// error does not say so.
const (
	maxLabel = 63
	maxName  = 253
)

// The profile is UTS #46, non-transitional. The later options undo a part of MapForLookup: which ASCII characters and
// hyphens may stand where is left to the rule that the proxy itself has.
var profile = idna.New(
	idna.MapForLookup(),
	idna.Transitional(false),
	idna.StrictDomainName(false),
	idna.VerifyDNSLength(true),
	idna.CheckHyphens(false),
	idna.CheckJoiners(false),
	idna.BidiRule(),
)

// Parse returns the name for which the proxy looks a directory up, when a person calls it s: the canonical name of a
// host, or a wildcard. The asterisk is no part of a name, so it is not mapped; only the one in ASCII is a wildcard. The
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
		return nil, errors.New("not valid UTF-8") // the profile has an answer even then
	}
	// Where the profile refuses s, it returns what it came to all the same. The proxy's rule looks at that first,
	// since it can say more exactly what is wrong.
	ascii, profileErr := profile.ToASCII(withoutRoot(s))
	if profileErr == nil {
		// Once more, for the profile looks for right-to-left characters before it maps: it would let ℵa pass, whose ℵ
		// (U+2135) becomes the letter א, and which the Bidi rule then refuses.
		ascii, profileErr = profile.ToASCII(ascii)
	}
	name, err := sni.AppendCanonical(nil, []byte(ascii))
	if alert, ok := errors.AsType[sni.Alert](err); ok {
		return nil, errors.New(alert.Reason) // the alert's number is for TLS clients
	}
	if err != nil {
		return nil, err
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

// withoutRoot returns s without the one dot that stands for the root at its end, or one of the characters that
// UTS #46, Section 2.3 has for it: U+3002, U+FF0E and U+FF61.
func withoutRoot(s string) string {
	last, size := utf8.DecodeLastRuneInString(s)
	if strings.ContainsRune(".。．｡", last) {
		return s[:len(s)-size]
	}
	return s
}
