// Command sniproxy-check tells what sniproxy would do for the hosts in a hosts directory.
//
//	sniproxy-check [-t] [-u USER] [HOSTS-DIRECTORY [NAME…]]
//
// The default directory is the working directory. It prints a line for every entry of the
// directory, except those that begin with a dot, or for every NAME, whether it has an entry or not.
// The line has the name and "ok" with remarks, or the problem and what to do about it. NAME is a
// host name, as sniproxy-hostname takes it, or a wildcard: *.example.com, or *.
//
// In a build with the tag hashed, entries are hashes and are shown as such. It finds a NAME by its
// hash.
//
// # For whom it answers
//
// It answers for USER, a name or a number, or USER:GROUP,GROUP with the groups; else for the user
// of a running sniproxy whose working directory this is, one after the other if there are several;
// else for the user sniproxy; else, with a remark, for who asks. root becomes that user before it
// looks at anything of tenants. Anybody else is told what modes, groups and ACLs say of that user,
// along the whole path, beside what the look-up says.
//
// # How it finds out
//
// It makes the same look-up as sniproxy. So it connects to each backend, sends nothing, takes
// nothing that the backend sends, and closes the connection. A backend may log that as a failed
// handshake. The look-up decides whether a host can be served; only then does it look for the
// reason.
//
// With -t it goes on with a TLS handshake, behind the PROXY header that the markers ask for, and
// looks at the certificate. A datagram socket is handed one end of a TCP connection. If the
// handshake fails, it tries again with another header or without one, to tell whether the markers
// are the reason. After a good one it makes another, to tell whether the backend confirms Encrypted
// Client Hello: it is the client, and the proxy that decrypts the hello, with a key of its own.
//
// # Limits
//
// No directory can keep it for long or make it use much memory. It looks at 100,000 entries at
// most, and prints 2,000 lines at most for those that are no hosts. It waits for a look-up as long
// as sniproxy does, ten seconds, and as long for all handshakes with a backend. After eight hosts
// of one owner took that long, or 128 in all, others get one second. After 64, or 256 in all, it
// tries others once and makes no look-up that may wait. It says on standard error what it left out.
//
// The exit status is 0 if every host can be served; 1 if one cannot, if that cannot be told, if
// something was left out, if the hosts directory cannot be read, or if the output cannot be
// written; 2 for wrong usage, or if there is no such USER.
package main

import (
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/cmd/internal/usage"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

const usageText = `usage: sniproxy-check [-t] [-u USER] [HOSTS-DIRECTORY [NAME...]]

Tells, for every host in a hosts directory, or for every NAME, whether sniproxy
can serve it, and if not, why not and what to do. The default is the working
directory. A NAME may be a wildcard.

  -t       make a TLS handshake with each backend, look at its certificate, and
           tell whether it confirms Encrypted Client Hello (ECH)
  -u USER  answer for USER, or USER:GROUP,GROUP. The default is the user of the
           sniproxy that runs in the hosts directory, or else the user sniproxy.
           root becomes that user; anybody else is told what modes and ACLs say.

It connects to each backend, sends nothing without -t, and closes the
connection; the backend may log that as a failed handshake.
`

const hashedUsage = `
This is a hashed build: it looks for the hash of each NAME, as the hashed build
of sniproxy does.
`

// atOnce is how many hosts are looked up at the same time. Almost all take no time, but a file
// system that does not answer takes ten seconds, and so does a backend whose backlog is full.
const atOnce = 32

func main() {
	if os.Args[0] != watchedName {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	unix.CloseOnExec(statusFD)
	status := run(os.Args[1:], os.Stdout, os.Stderr)
	unix.Write(statusFD, []byte{byte(status)})
	os.Exit(status)
}

func run(args []string, stdout, stderr io.Writer) int {
	// The first timer makes Go's runtime open descriptors for its poller, and the runtime ends the
	// program if none are left. So start one now, before look-ups use descriptors.
	time.AfterFunc(time.Hour, func() {}).Stop()
	text := usageText
	if hostdir.Hashed {
		text += hashedUsage
	}
	if usage.Asked(args) {
		if _, err := io.WriteString(stdout, usage.Text(text)); err != nil {
			fmt.Fprintf(stderr, "sniproxy-check: %v\n", err)
			return 1
		}
		return 0
	}
	o, ok := parseOptions(args)
	if !ok {
		fmt.Fprint(stderr, usage.Text(text))
		return 2
	}
	if o.tls && os.Args[0] != watchedName && !refusesDescriptors() {
		if status, ok := watch(args, stdout, stderr); ok {
			return status
		}
	}
	complain := func(format string, args ...any) {
		fmt.Fprintf(stderr, "sniproxy-check: "+format+"\n", args...)
	}
	all, remarks, err := findEyes(o.user, o.dir)
	if err != nil {
		complain("-u: %v", err)
		return 2
	}
	for _, r := range remarks {
		complain("%s", r)
	}
	if len(all) > 1 {
		return o.forEach(all, stdout, stderr)
	}
	return o.check(all[0], stdout, complain)
}

// Options are what the arguments ask for.
type options struct {
	tls   bool   // to make a handshake with each backend
	user  string // whom to answer for, "" for the user of sniproxy
	dir   string // the hosts directory
	names []string
}

// parseOptions reads the arguments. It reports whether they are right.
func parseOptions(args []string) (o options, ok bool) {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.BoolVar(&o.tls, "t", false, "")
	flags.StringVar(&o.user, "u", "", "")
	if flags.Parse(args) != nil {
		return o, false
	}
	given := false
	flags.Visit(func(f *flag.Flag) { given = given || f.Name == "u" })
	if given && o.user == "" {
		return o, false
	}
	o.dir, o.names = ".", flags.Args()
	if len(o.names) > 0 {
		o.dir, o.names = o.names[0], o.names[1:]
	}
	return o, !strings.HasPrefix(o.dir, "-")
}

// forEach answers for several users, one after the other, each in a process of its own, since root
// becomes a user for good.
func (o *options) forEach(all []eyes, stdout, stderr io.Writer) (status int) {
	for i := range all {
		if _, err := fmt.Fprintf(stdout, "For %v, %s:\n", &all[i], all[i].why); err != nil {
			fmt.Fprintf(stderr, "sniproxy-check: %v\n", err)
			return 1
		}
		args := []string{"-u", all[i].argument(), "--", o.dir}
		if o.tls {
			args = append([]string{"-t"}, args...)
		}
		cmd := exec.Command(itself(), append(args, o.names...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, stderr // not /dev/null, which a sandbox may not have
		if err := cmd.Run(); err != nil {
			if _, ended := errors.AsType[*exec.ExitError](err); !ended {
				fmt.Fprintf(stderr, "sniproxy-check: cannot answer for %v: %v\n", &all[i], err)
			}
			status = 1
		}
	}
	return status
}

// check answers for a user, and returns the exit status.
func (o *options) check(e eyes, stdout io.Writer, complain func(string, ...any)) int {
	dir, names := o.dir, o.names
	if err := os.Chdir(dir); err != nil {
		complain("cannot enter the hosts directory %s", trouble(dir, err))
		return 1
	}
	c := &checker{eyes: e, tls: o.tls}
	c.root, _ = os.Getwd() // for advice only
	if !e.own && os.Geteuid() == 0 {
		c.open() // only root may list it, perhaps
		if err := c.eyes.become(); err == errPrivileged {
			complain("cannot become %v: %v", &e, err)
			return 1
		} else if err != nil {
			complain("cannot become %v: %v; so it tells what %s say", &e, err, byModes)
		}
	}
	hosts, err := hostdir.Open()
	if err != nil {
		switch {
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
			complain("cannot open the hosts directory %s: %v: raise the limit (ulimit -n)", show(dir), err)
		case errors.Is(err, unix.EACCES):
			complain("cannot open the hosts directory %s: %s", show(dir), c.eyes.needs(unix.X_OK, "."))
		default:
			complain("cannot open the hosts directory %s: %v", show(dir), err)
		}
		return 1
	}
	for _, line := range hosts.Remarks() {
		complain("%s", line)
	}
	c.hosts = hosts
	asked := make(chan bool, 1)
	go func() {
		if _, ignored, _ := hosts.AcceptProxy(); ignored != "" {
			complain(".accept-proxy in the hosts directory does not count: %s", ignored)
		}
		asked <- c.keysOf(hosts, complain)
	}()
	select {
	case c.keys = <-asked:
	case <-time.After(lookupLimit):
		complain("cannot find out whether there are .accept-proxy, .ech and */log-connections: %s", noAnswer)
		c.dead.Store(true)
	}
	status := 0
	make := named
	if len(names) == 0 {
		all, err := c.list()
		if err != nil {
			complain("cannot list the hosts directory %s; sniproxy need not do that: with NAMEs it can be checked all the same", trouble(dir, err))
			return 1
		}
		// Entries have no neighbours named: all are listed, and to compare each with all takes
		// long. Nor may the directory be read again, while the first reader may still be at it.
		c.listOnce.Do(func() {})
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
	if !c.dead.Load() {
		if c.logAll, err = askLogAll(hosts); err != nil {
			complain("cannot find out whether all connections are logged: %v", err)
		}
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
func askLogAll(hosts *hostdir.Hosts) (bool, error) {
	var all bool
	var err error
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
	self := ours()
	at, walkErr := self.walk(dir)
	switch {
	case walkErr == unix.EACCES:
		return fmt.Sprintf("%s: %s", text, self.needs(unix.X_OK, at))
	case walkErr == nil && unix.Access(at, unix.X_OK) != nil:
		return fmt.Sprintf("%s: %s", text, self.needs(unix.X_OK, at))
	case walkErr == nil && unix.Access(at, unix.R_OK) != nil:
		return fmt.Sprintf("%s: %s", text, self.needs(unix.R_OK, at))
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
