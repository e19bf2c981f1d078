// Command sniproxy-hostname prints the name of the directory in which sniproxy looks for the
// backend of a host.
//
//	sniproxy-hostname NAME…
//
// It prints one directory name a line, in the order of the arguments. A NAME may be Unicode: UTS
// #46 (non-transitional) maps and encodes it, so that 🕸💍.ws becomes xn--sr8hvo.ws. Letters become
// lower case, and a dot at the end is removed. In a build with the tag hashed, the line is the hash
// of that name.
//
// A NAME may also be a wildcard: *.NAME stands for all names with one label before NAME, and * for
// everything else. An asterisk anywhere else is refused.
//
// It refuses whatever sniproxy refuses as a server name, and what cannot be a DNS name. For such a
// NAME it prints a message on standard error and nothing on standard output; it still prints the
// others.
//
// With -h as the first argument it prints its usage on standard output.
//
// The exit status is 0; 1 when a NAME was refused or the output could not be written; 2 when there
// is no NAME.
package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/cmd/internal/usage"
	"sniproxy/hostdir"
)

const usageText = `usage: sniproxy-hostname NAME...

Prints the name of the directory in which sniproxy looks for the backend of
each host NAME, one a line. A NAME may be Unicode; it is then encoded to
A-labels (xn--...). It may be a wildcard: '*.NAME' for all names with one label
before NAME, '*' for everything else.
`

const hashedUsage = `
This is a hashed build: it prints the hash of the name, as the hashed build of
sniproxy expects.
`

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	// If the reader has gone, the write fails with an error instead of a silent death.
	signal.Ignore(syscall.SIGPIPE)

	text := usageText
	if hostdir.Hashed {
		text += hashedUsage
	}
	if usage.Asked(args) {
		if _, err := io.WriteString(stdout, usage.Text(text)); err != nil {
			fmt.Fprintf(stderr, "sniproxy-hostname: %v\n", err)
			return 1
		}
		return 0
	}
	if len(args) == 0 {
		fmt.Fprint(stderr, usage.Text(text))
		return 2
	}
	status := 0
	for _, arg := range args {
		name, err := hostname.Parse(arg)
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
