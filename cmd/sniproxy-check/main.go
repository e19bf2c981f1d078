// Command sniproxy-check tells what sniproxy, run by the same user, would do for the hosts in a
// hosts directory.
//
//	sniproxy-check [HOSTS-DIRECTORY [NAME…]]
//
// The default directory is the working directory. It prints a line for every entry of the
// directory, except those that begin with a dot, or for every NAME, whether it has an entry or not.
// The line has the name and "ok" with remarks, or the problem and what to do about it. NAME is a
// host name, as sniproxy-hostname takes it, or a wildcard: *.example.com, or *.
//
// In a build with the tag hashed, entries are hashes and are shown as such. It finds a NAME by its
// hash.
//
// It makes the same look-up as sniproxy. So it connects to each backend, sends nothing, takes
// nothing that the backend sends, and closes the connection. A backend may log that as a failed
// handshake. The look-up decides whether a host can be served; only then does it look for the
// reason.
//
// No directory can keep it for long or make it use much memory. It looks at 100,000 entries at
// most, and prints 2,000 lines at most for those that are no hosts. It waits for a look-up as long
// as sniproxy does, ten seconds. After eight hosts of one owner took that long, or 128 in all,
// others get one second. After 64, or 256 in all, it tries others once and makes no look-up that
// may wait. It says on standard error what it left out.
//
// The exit status is 0 if every host can be served; 1 if one cannot, if something was left out, if
// the hosts directory cannot be read, or if the output cannot be written; 2 for wrong usage.
package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

const usage = `usage: sniproxy-check [HOSTS-DIRECTORY [NAME...]]

Tells, for every host in a hosts directory, or for every NAME, whether sniproxy,
run by the same user, can serve it, and if not, why not and what to do. The
default is the working directory. A NAME may be a wildcard.

It connects to each backend, sends nothing, and closes the connection; the
backend may log that as a failed handshake.
`

const hashedUsage = `
This is a hashed build: it looks for the hash of each NAME, as the hashed build
of sniproxy does.
`

// atOnce is how many hosts are looked up at the same time. Almost all take no time, but a file
// system that does not answer takes ten seconds, and so does a backend whose backlog is full.
const atOnce = 32

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	// The first timer makes Go's runtime open descriptors for its poller, and the runtime ends the
	// program if none are left. So start one now, before look-ups use descriptors.
	time.AfterFunc(time.Hour, func() {}).Stop()
	dir, names := ".", args
	if len(args) > 0 {
		dir, names = args[0], args[1:]
		if strings.HasPrefix(dir, "-") {
			fmt.Fprint(stderr, usage)
			if hostdir.Hashed {
				fmt.Fprint(stderr, hashedUsage)
			}
			return 2
		}
	}
	if err := os.Chdir(dir); err != nil {
		fmt.Fprintf(stderr, "sniproxy-check: cannot enter the hosts directory %s\n", trouble(dir, err))
		return 1
	}
	complain := func(format string, args ...any) {
		fmt.Fprintf(stderr, "sniproxy-check: "+format+"\n", args...)
	}
	hosts, err := hostdir.Open()
	if err != nil {
		text := err.Error()
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			text += ": raise the limit (ulimit -n)"
		}
		complain("cannot open the hosts directory %s: %s", show(dir), text)
		return 1
	}
	for _, line := range hosts.Remarks() {
		complain("%s", line)
	}
	status := 0
	make := named
	if len(names) == 0 {
		all, err := list()
		if err != nil {
			complain("cannot list the hosts directory %s; sniproxy need not do that: with NAMEs it can be checked all the same", trouble(dir, err))
			return 1
		}
		if names, make = all.entries, listed; len(names) == 0 && all.cut == "" {
			complain("there are no hosts in %s", show(dir))
		}
		if all.omitted > 0 {
			complain("%d more entries are no hosts, and have no line", all.omitted)
			status = 1
		}
		if all.cut != "" {
			complain("the hosts directory %s: only %d of them are checked", all.cut, len(names))
			status = 1
		}
	}
	c := &checker{hosts: hosts}
	c.logAll, err = askLogAll(hosts)
	if err != nil {
		complain("cannot find out whether all connections are logged: %v", err)
	}
	for coming := range c.verdicts(len(names), func(i int) host { return make(names[i]) }) {
		v := <-coming
		if !v.ok {
			status = 1
		}
		if _, err := fmt.Fprintln(stdout, v.line); err != nil {
			complain("%v", err)
			return 1
		}
	}
	return status
}

// askLogAll asks whether the connections of all hosts are logged. That may wait for a file system.
func askLogAll(hosts *hostdir.Hosts) (all bool, err error) {
	done := make(chan struct{})
	go func() {
		all, err = hosts.LogAll()
		close(done)
	}()
	select {
	case <-done:
		return all, err
	case <-time.After(lookupLimit):
		return false, errors.New("what * leads to does not answer")
	}
}

// trouble says why a hosts directory cannot be used.
func trouble(dir string, err error) string {
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	text := fmt.Sprintf("%s: %v", show(dir), err)
	if err != unix.EACCES {
		return text
	}
	at, walkErr := walk(dir)
	switch {
	case walkErr == unix.EACCES:
		return fmt.Sprintf("%s: %s", text, needs(unix.X_OK, at))
	case walkErr == nil && unix.Access(at, unix.X_OK) != nil:
		return fmt.Sprintf("%s: %s", text, needs(unix.X_OK, at))
	case walkErr == nil && unix.Access(at, unix.R_OK) != nil:
		return fmt.Sprintf("%s: %s", text, needs(unix.R_OK, at))
	}
	return text
}

// A host is what one line of the output is about.
type host struct {
	label string // what the line begins with
	name  []byte // the canonical name, or a wildcard; nil if only the entry is known
	entry []byte // the entry of that name
	wrong string // why no client ever gets there; "" if one may

	listed bool // it is an entry of the hosts directory, not an argument
}

// named returns the host that the user calls s.
func named(s string) host {
	// sniproxy is less strict than sniproxy-hostname, which refuses what cannot be a DNS name.
	name, err := canonical(s)
	if err != nil {
		name, err = hostname.Parse(s)
	}
	if err != nil {
		return host{label: show(s), wrong: fmt.Sprintf("not a host name: %v", err)}
	}
	return host{label: string(name), name: name, entry: hostdir.AppendName(nil, name)}
}

// listed returns the host that an entry of the hosts directory is meant for.
func listed(entry string) host {
	h := host{label: show(entry), entry: []byte(entry), listed: true}
	if hostdir.Hashed {
		switch star := []byte("*"); {
		case slices.Equal(hostdir.AppendName(nil, star), h.entry):
			h.name = star
		case !isHash(entry):
			h.wrong = "not the hash of a name, as this is a hashed build"
			if name, err := hostname.Parse(entry); err == nil {
				h.wrong += ": rename it to " + string(hostdir.AppendName(nil, name))
			}
		}
		return h
	}
	name, err := canonical(entry)
	if err == nil && string(name) == entry {
		h.name = name
		return h
	}
	h.wrong = "not a canonical name, so it is never looked up"
	if name, parseErr := hostname.Parse(entry); isHash(entry) {
		h.wrong += ": it may be a hash, which only a hashed build looks for"
	} else if parseErr == nil {
		h.wrong += ": rename it to " + string(name)
	} else {
		h.wrong += ": " + parseErr.Error()
	}
	return h
}

// canonical returns a name, or a wildcard, in sniproxy's canonical form.
func canonical(s string) ([]byte, error) {
	if s == "*" {
		return []byte(s), nil
	}
	rest, wildcard := strings.CutPrefix(s, "*.")
	if !wildcard {
		return sni.AppendCanonical(nil, []byte(s))
	}
	// The shortest name that it serves has one byte in place of the asterisk.
	name, err := sni.AppendCanonical(nil, []byte("a."+rest))
	if err == nil {
		name[0] = '*'
	}
	return name, err
}

// isHash reports whether an entry can be the hash of a name.
func isHash(entry string) bool {
	hash, err := base64.RawURLEncoding.Strict().DecodeString(entry)
	return err == nil && len(hash) == 32
}
