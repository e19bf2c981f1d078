// Command sniproxy-ech makes a key for Encrypted Client Hello, with which clients hide from the
// network which host of a sniproxy they ask for.
//
//	sniproxy-ech PUBLIC-NAME >FILE
//
// It prints the key file on standard output: RFC 9934, in PEM. On standard error it prints the
// record that tells clients the public half, for the DNS:
//
//	; For each host whose name is to be hidden, in place of NAME:
//	NAME. 300 IN HTTPS 1 . alpn="h2,http/1.1" ech=AEX+DQBB…
//
// PUBLIC-NAME is the name that the network sees in place of the hidden ones. It may be Unicode,
// which is encoded as sniproxy-hostname does it. What clients would not take for a public name is
// refused.
//
// It does not print the private key on a terminal: there people see it, and it stays in what the
// terminal has recorded.
//
// sniproxy-ech(7) says where the file goes, and in which order to change keys.
//
// With -h as the first argument it prints its usage on standard output.
//
// The exit status is 0; 1 when there is no key, or it could not be written; 2 for wrong usage.
package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/cmd/internal/usage"
	"sniproxy/sni/ech"
)

const usageText = `usage: sniproxy-ech PUBLIC-NAME >FILE

Makes a key for Encrypted Client Hello. Prints the key file, which belongs in
the directory .ech of the hosts directory, and on standard error the record for
the DNS. PUBLIC-NAME is what the network sees in place of the hidden names.
`

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout *os.File, stderr io.Writer) int {
	// If the reader has gone, the write fails with an error instead of a silent death.
	signal.Ignore(syscall.SIGPIPE)

	complain := func(err error) int {
		fmt.Fprintf(stderr, "sniproxy-ech: %v\n", err)
		return 1
	}
	if usage.Asked(args) {
		if _, err := io.WriteString(stdout, usage.Text(usageText)); err != nil {
			return complain(err)
		}
		return 0
	}
	if len(args) != 1 {
		fmt.Fprint(stderr, usage.Text(usageText))
		return 2
	}
	key, err := generate(args[0])
	if err != nil {
		return complain(err)
	}
	if isTerminal(stdout) {
		return complain(errors.New("standard output is a terminal, where a private key stays to be seen: redirect it to a file, as in sniproxy-ech PUBLIC-NAME >FILE"))
	}
	if _, err := stdout.Write(key.MarshalPEM()); err != nil {
		return complain(err)
	}
	// The record is of use only if there is a key file.
	if _, err := io.WriteString(stderr, record(key)); err != nil {
		return 1
	}
	return 0
}

// generate makes a key with the public name that a person calls name.
func generate(name string) (*ech.Key, error) {
	canonical, err := hostname.Parse(name)
	if err == nil && strings.HasPrefix(string(canonical), "*") {
		err = errors.New("a wildcard is no public name: clients ask for one host")
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	return ech.GenerateKey(string(canonical))
}

// record returns the record for the DNS, as it stands in a zone file: RFC 9460 and RFC 9848.
func record(key *ech.Key) string {
	return "; For each host whose name is to be hidden, in place of NAME:\n" +
		"NAME. 300 IN HTTPS 1 . alpn=\"h2,http/1.1\" ech=" + base64.StdEncoding.EncodeToString(key.ConfigList()) + "\n"
}

// isTerminal reports whether a file is a terminal: only these have a size in characters.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil
}
