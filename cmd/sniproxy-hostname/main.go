// Command sniproxy-hostname prints the name of the directory in which sniproxy looks for the backend of a host.
//
//	sniproxy-hostname NAME…
//
// It prints one directory name a line, in the order of the arguments. A NAME may be Unicode: it is mapped and
// encoded by UTS #46 (non-transitional), so that 🕸💍.ws gives xn--sr8hvo.ws; letters become lower case, and one dot
// at the end is taken off. In a build with the tag hashed, the line is the hash of that name.
//
// A NAME may also be a wildcard: *.NAME, which stands for all names with one label before NAME, or * for everything
// else. An asterisk anywhere else is refused.
//
// What sniproxy refuses as a server name is refused here too, and so is what no DNS name can be. For such a NAME
// there is a message on standard error and nothing on standard output; the others are printed all the same.
//
// The exit status is 0; 1 when a NAME was refused or the output could not be written; 2 when there is no NAME.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"sniproxy/hostdir"
	"sniproxy/sni"
)

// Limits of the DNS, RFC 1035, Section 2.3.4, on a name without its root label. The profile enforces them, but its
// error does not say so.
const (
	maxLabel = 63
	maxName  = 253
)

const usage = `usage: sniproxy-hostname NAME...

Prints the name of the directory in which sniproxy looks for the backend of
each host NAME, one a line. A NAME may be Unicode; it is then encoded to
A-labels (xn--...). It may be a wildcard: '*.NAME' for all names with one label
before NAME, '*' for everything else.
`

const hashedUsage = `
This is a hashed build: it prints the hash of the name, as the hashed build of
sniproxy expects.
`

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

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	// A reader that has gone is a write error like any other, not a silent death.
	signal.Ignore(syscall.SIGPIPE)

	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		if hostdir.Hashed {
			fmt.Fprint(stderr, hashedUsage)
		}
		return 2
	}
	status := 0
	for _, arg := range args {
		name, err := entry(arg)
		if err != nil {
			fmt.Fprintf(stderr, "sniproxy-hostname: %q: %v\n", arg, err)
			status = 1
			continue
		}
		if _, err := stdout.Write(append(hostdir.AppendName(nil, name), '\n')); err != nil {
			fmt.Fprintf(stderr, "sniproxy-hostname: %v\n", err)
			return 1
		}
	}
	return status
}

// entry returns the name for which the proxy looks a directory up: that of a host, or a wildcard. The asterisk is no
// part of a name, so it is not mapped; only the one in ASCII is a wildcard.
func entry(s string) ([]byte, error) {
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
