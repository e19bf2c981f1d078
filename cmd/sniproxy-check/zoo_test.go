package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// serve makes a host with a backend that tells each client the version of the PROXY header that
// came, 0 for none, and the name of the directory.
func serve(t *testing.T, dir string) {
	t.Helper()
	hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
		b := make([]byte, 1<<16)
		n, err := c.Read(b)
		version := 0
		switch {
		case err != nil:
			return // sniproxy-check sends nothing
		case bytes.HasPrefix(b[:n], []byte("PROXY ")):
			version = 1
		case bytes.HasPrefix(b[:n], []byte("\r\n\r\n\x00\r\nQUIT\n")):
			version = 2
		}
		fmt.Fprintf(c, "%d %s", version, filepath.Base(dir))
	})
}

// An animal is a host with some oddity, or a name to ask for.
type animal struct {
	name string // canonical, or a wildcard, if make makes something
	make func(dir string)
	says finding

	forbidden finding // the same if an ordinary user asks, if that differs
	asked     finding // the same of the name, if that differs from the entry
	asIf      string  // what sniproxy does for clients, if that differs

	entry bool // name is the name of the entry, whatever that is, and no client can ask for it
	bad   bool // name is no host name
}

// A finding is what sniproxy-check must say of a host. In it ENTRY stands for the entry, UID for
// the user who asks, and OWNER for the user who has made the zoo.
type finding struct {
	what     string   // what comes first: the problem in the words of sniproxy, or "ok" and the facts
	mentions []string // words that must follow, in this order: paths, users, modes
	unsaid   string   // what must not follow, if it is not empty
}

func is(what string, mentions ...string) finding { return finding{what: what, mentions: mentions} }

// has reports whether a line, without its label, is the finding. Behind "ok" nothing may follow if
// there is nothing to mention.
func (f finding) has(line string, names *strings.Replacer) bool {
	rest, ok := strings.CutPrefix(line, names.Replace(f.what))
	if !ok || rest != "" && !strings.HasPrefix(rest, ": ") && !strings.HasPrefix(rest, "; ") {
		return false
	}
	if f.unsaid != "" && strings.Contains(rest, f.unsaid) {
		return false
	}
	words := strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(" ,;:()", r) })
	for _, m := range f.mentions {
		i := slices.Index(words, names.Replace(m))
		if i < 0 {
			return false
		}
		words = words[i+1:]
	}
	return rest == "" || len(f.mentions) > 0 || !strings.HasPrefix(f.what, "ok")
}

// The problems, in the words of sniproxy.
var (
	noDirectory   = words(hostdir.NoDirectory)
	noSocket      = words(hostdir.NoSocket)
	dangling      = words(hostdir.Dangling)
	notPermitted  = "permission denied for uid UID"
	nobodyListens = words(hostdir.NobodyListens)
	notSocket     = words(hostdir.NotSocket)
	notStream     = words(hostdir.NotStream)
	pathTooLong   = words(hostdir.PathTooLong)
	notCounted    = (&hostdir.Error{Problem: hostdir.NoDirectory, Ignored: true}).Error()
	backlogFull   = hostdir.BacklogFull.Error()
	hangs         = "the look-up has waited for a file system until the time limit"
	gone          = (&hostdir.Error{Problem: hostdir.Other, Errno: unix.ENOTCONN}).Error()
)

func words(p hostdir.Problem) string { return (&hostdir.Error{Problem: p}).Error() }

// A zoo is a hosts directory.
type zoo struct {
	t       *testing.T
	hosts   string
	others  string // a directory beside it
	animals []animal
}

func newZoo(t *testing.T) *zoo {
	dir := hostdirtest.Dir(t)
	z := &zoo{t: t, hosts: filepath.Join(dir, "hosts"), others: filepath.Join(dir, "others")}
	must(t, os.Mkdir(z.hosts, 0o755))
	must(t, os.Mkdir(z.others, 0o755))
	return z
}

func (z *zoo) add(animals ...animal) {
	for _, a := range animals {
		if a.make != nil {
			a.make(filepath.Join(z.hosts, a.entryName()))
		}
		z.animals = append(z.animals, a)
	}
}

func (a animal) entryName() string {
	if a.entry {
		return a.name
	}
	return entryOf(a.name)
}

// makeSocket makes something in place of a socket.
func makeSocket(t *testing.T, do func(path string) error) func(string) {
	return func(dir string) {
		must(t, os.Mkdir(dir, 0o755))
		must(t, do(filepath.Join(dir, "tls-socket")))
	}
}

func symlink(t *testing.T, target string) func(string) {
	return func(path string) { must(t, os.Symlink(target, path)) }
}

// good makes a host that can be served, with some files.
func good(t *testing.T, files ...string) func(string) {
	return func(dir string) {
		serve(t, dir)
		for _, f := range files {
			hostdirtest.Touch(t, filepath.Join(dir, f))
		}
	}
}

// theirs makes something that belongs to somebody else.
func theirs(t *testing.T, make func(string), path ...string) func(string) {
	return func(dir string) {
		make(dir)
		must(t, os.Lchown(filepath.Join(append([]string{dir}, path...)...), 1000, 1000))
	}
}

// addOthers adds entries and names that are no hosts.
func (z *zoo) addOthers() {
	z.addEntries()
	z.addNames()
	z.add(absent)
}

// addHosts adds hosts with everything that can be wrong with one.
func (z *zoo) addHosts() {
	t := z.t
	long := strings.Repeat("long-name.", 15) + "example"
	elsewhere := filepath.Join(z.others, "elsewhere")
	serve(t, elsewhere)
	locked := filepath.Join(z.others, "locked")
	serve(t, filepath.Join(locked, "inner"))
	must(t, os.Chmod(locked, 0o600))
	fileBeside := filepath.Join(z.others, "file")
	hostdirtest.Touch(t, fileBeside)

	z.add(
		animal{name: "good.example", make: good(t, "notes.txt", "index.log"), says: is("ok")},
		animal{name: "v1.example", make: good(t, "send-proxy-v1"), says: is("ok, PROXY v1")},
		animal{name: "v2.example", make: good(t, "send-proxy-v2"), says: is("ok, PROXY v2")},
		animal{name: "both.example", make: good(t, "send-proxy-v1", "send-proxy-v2"), says: is("ok, PROXY v2")},
		animal{name: "logged.example", make: good(t, "log-connections"), says: is("ok, logged")},
		animal{name: "logged2.example", make: good(t, "log-connections", "send-proxy-v2"), says: is("ok, PROXY v2, logged")},
		animal{name: "dangling-marker.example", make: func(dir string) {
			good(t)(dir)
			symlink(t, "nowhere")(filepath.Join(dir, "log-connections"))
		}, says: is("ok, logged")},
		animal{name: "v3.example", make: good(t, "send-proxy-v3"), says: is("ok", "send-proxy-v3")},
		animal{name: "underscores.example", make: good(t, "send_proxy_v1"), says: is("ok", "send_proxy_v1")},
		animal{name: "bare.example", make: good(t, "send-proxy"), says: is("ok", "send-proxy")},
		animal{name: "capitals.example", make: good(t, "Send-Proxy-V2"), says: is("ok", "Send-Proxy-V2")},
		animal{name: "typo.example", make: good(t, "sned-proxy-v2"), says: is("ok", "sned-proxy-v2")},
		animal{name: "logging.example", make: good(t, "log"), says: is("ok", "log")},
		animal{name: "newline.example", make: good(t, "log\nforged: ok"), says: is("ok", `"log\nforged`, `ok"`)},
		animal{name: "logs.example", make: good(t, "log-connection"), says: is("ok", "log-connection")},
		animal{name: "unlisted.example", make: func(dir string) {
			good(t, "send-proxy-v1")(dir)
			must(t, os.Chmod(dir, 0o711))
		}, says: is("ok, PROXY v1")},
		animal{name: "linked.example", make: symlink(t, elsewhere), says: is("ok", "ENTRY", elsewhere+"/tls-socket", "chroot")},
		animal{name: "switched.example", make: makeSocket(t, func(path string) error {
			return os.Symlink(filepath.Join(elsewhere, "tls-socket"), path)
		}), says: is("ok", "ENTRY/tls-socket", elsewhere+"/tls-socket", "chroot")},
		animal{name: "leaving.example", make: symlink(t, "../others/elsewhere"), says: is("ok", "ENTRY", "../others/elsewhere/tls-socket", "chroot")},
		animal{name: "staying.example", make: symlink(t, entryOf("good.example")), says: is("ok")},

		animal{name: "absent.example", says: is(noDirectory)},
		animal{name: "file.example", make: func(dir string) { hostdirtest.Touch(t, dir) }, says: is(noDirectory, "regular")},
		animal{name: "dangling.example", make: symlink(t, "nowhere"), says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "dangling2.example", make: symlink(t, elsewhere+"/a/b"),
			says: is(noDirectory, elsewhere+"/a")},
		animal{name: "loop.example", make: symlink(t, entryOf("loop.example")), says: is(noDirectory, "circles")},
		animal{name: "impossible.example", make: symlink(t, strings.Repeat("a", 256)), says: is(noDirectory, strings.Repeat("a", 256))},
		animal{name: "linked-file.example", make: symlink(t, fileBeside),
			says: is(noDirectory, fileBeside, "regular")},
		animal{name: "through-file.example", make: symlink(t, fileBeside+"/x"),
			says: is(noDirectory, fileBeside, "regular")},

		animal{name: "no-socket.example", make: func(dir string) { must(t, os.Mkdir(dir, 0o755)) },
			says: is(noSocket, "ENTRY/tls-socket")},
		animal{name: "misnamed.example", make: func(dir string) {
			must(t, os.Mkdir(dir, 0o755))
			hostdirtest.Touch(t, filepath.Join(dir, "tls_socket"))
		}, says: is(noSocket, "ENTRY/tls-socket", "ENTRY/tls_socket")},
		animal{name: "dangling-socket.example", make: makeSocket(t, func(path string) error { return os.Symlink("nowhere", path) }),
			says: is(dangling, "ENTRY/nowhere")},
		animal{name: "socket-loop.example", make: makeSocket(t, func(path string) error { return os.Symlink("tls-socket", path) }),
			says: is(dangling, "circles")},
		animal{name: "impossible-socket.example", make: makeSocket(t, func(path string) error { return os.Symlink(strings.Repeat("a", 256), path) }),
			says: is(pathTooLong)},
		animal{name: "regular.example", make: makeSocket(t, func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0), os.Chmod(path, 0o777))
		}), says: is(notSocket, "regular")},
		animal{name: "closed-regular.example", make: makeSocket(t, func(path string) error { return os.WriteFile(path, nil, 0o444) }),
			says: is(notSocket, "regular")},
		animal{name: "fifo.example", make: makeSocket(t, func(path string) error {
			return errors.Join(unix.Mkfifo(path, 0o777), os.Chmod(path, 0o777))
		}), says: is(notSocket, "FIFO")},
		animal{name: "directory.example", make: makeSocket(t, func(path string) error {
			return errors.Join(os.Mkdir(path, 0o777), os.Chmod(path, 0o777))
		}), says: is(notSocket, "directory")},
		animal{name: "packets.example", make: func(dir string) { hostdirtest.Bind(t, dir, unix.SOCK_SEQPACKET) },
			says: is(notStream, "seqpacket")},
		animal{name: "datagram.example", make: func(dir string) {
			hostdirtest.ServeDatagram(t, dir, func(c *net.TCPConn, _ []byte) { fmt.Fprintf(c, "0 %s handed", filepath.Base(dir)) })
		},
			says: is("ok, handed over")},
		animal{name: "silent.example", make: func(dir string) { hostdirtest.Bind(t, dir, unix.SOCK_STREAM) }, says: is(nobodyListens)},
		animal{name: "abandoned.example", make: func(dir string) { hostdirtest.Abandon(t, dir) }, says: is(nobodyListens)},
		animal{name: "deaf.example", make: func(dir string) { hostdirtest.FillBacklog(t, dir) },
			says: is(backlogFull, "ten")},
		animal{name: long, make: symlink(t, "../others/elsewhere"), says: is("ok", "ENTRY", "chroot")},

		animal{name: "closed.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chmod(dir, 0o644))
		}, says: is("ok"), forbidden: is(notPermitted, "x", "ENTRY", "0644", "OWNER")},
		animal{name: "closed-socket.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chmod(dir+"/tls-socket", 0o555))
		}, says: is("ok"), forbidden: is(notPermitted, "w", "ENTRY/tls-socket", "0555", "OWNER")},
		animal{name: "closed-on-the-way.example", make: symlink(t, filepath.Join(locked, "inner")), says: is("ok", "ENTRY", "chroot"),
			forbidden: is(notPermitted, "x", locked, "0600", "OWNER")},
		absent,
	)
}

// addEntries adds entries that no client can ask for.
func (z *zoo) addEntries() {
	const never = "not a canonical name, so it is never looked up"
	for _, a := range []animal{
		{name: "Capital.Example", says: is(never, "capital.example")},
		{name: "dot.example.", says: is(never, "dot.example")},
		{name: "bücher.example", says: is(never, "xn--bcher-kva.example")},
		{name: "*.Capital.Example", says: is(never, "*.capital.example")},
		{name: "a..b", says: is(never, "empty")},
		{name: "-a.example", says: is(never, "hyphen")},
		{name: "a.*", says: is(never, "asterisk")},
		{name: "a b: ok", says: is(never, "character")},
		{name: "a\nforged: ok", says: is(never, "character")},
		{name: "\xff.example", says: is(never, "UTF-8")},
		{name: strings.Repeat("a", 255), says: is(never, "longer")},
		{name: "EYbxj-n1MXKMRjIKgE3V0XmRpnG0cEBx7XxeVX2rqQ4", says: is(never, "hash", "hashed")},
	} {
		if hostdir.Hashed {
			a.says = is("not the hash of a name, as this is a hashed build")
			switch a.name {
			case "Capital.Example":
				a.says.mentions = []string{entryOf("capital.example")}
			case "EYbxj-n1MXKMRjIKgE3V0XmRpnG0cEBx7XxeVX2rqQ4":
				a.says = is("ok")
			}
		}
		a.entry, a.make = true, good(z.t)
		z.add(a)
	}
}

// absent is the wildcard * where it does not exist.
var absent = animal{name: "*", says: is(noDirectory)}

// addNames adds what are no names.
func (z *zoo) addNames() {
	for name, reason := range map[string]string{
		"":                        "server name is empty",
		strings.Repeat("a.", 200): "server name is longer than 254 bytes",
		"a..b":                    "server name has an empty label",
		"..":                      "server name has an empty label",
		"a.-b":                    "a label of the server name begins with a hyphen",
		"a/b":                     "server name is a URL, or has a path behind it",
		"a\nb: ok":                "server name has a space or a control character",
		"a.example:443":           "server name has a port behind it",
		"a@b":                     "server name has a character other than letters, digits, '-', '_' and '.'",
	} {
		z.add(animal{name: name, bad: true, says: is("not a host name: " + reason)})
	}
}

// addWildcards adds wildcards, and names that they serve.
func (z *zoo) addWildcards() {
	t := z.t
	z.add(
		animal{name: "*.w.example", make: good(t, "send-proxy-v2"), says: is("ok, PROXY v2")},
		animal{name: "a.w.example", says: is("ok, PROXY v2, served by *.w.example")},
		animal{name: "b.w.example", make: good(t), says: is("ok")},
		animal{name: "*.l.example", make: good(t, "log-connections"), says: is("ok, logged")},
		animal{name: "a.l.example", says: is("ok, logged, served by *.l.example")},
		animal{name: "b.l.example", make: good(t), says: is("ok")},
		animal{name: "c.w.example", make: func(dir string) { must(t, os.Mkdir(dir, 0o755)) }, says: is(noSocket)},
		animal{name: "d.a.w.example", says: is(noDirectory)},
		animal{name: "w.example", says: is(noDirectory)},
		animal{name: "*.down.example", make: func(dir string) { hostdirtest.Abandon(t, dir) }, says: is(nobodyListens)},
		animal{name: "a.down.example", says: is(nobodyListens)},
		animal{name: "*.absent.example", says: is(noDirectory)},
		animal{name: "*.file.example", make: func(dir string) { hostdirtest.Touch(t, dir) }, asIf: "no directory",
			says:  is("does not count", "regular"),
			asked: is(noDirectory, "ENTRY", "regular")},
		animal{name: "a.file.example", says: is(noDirectory, entryOf("*.file.example"), "regular")},
		animal{name: "*.dangling.example", make: symlink(t, "nowhere"), says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "a.dangling.example", says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "file.w.example", make: func(dir string) { hostdirtest.Touch(t, dir) }, says: is(noDirectory, "regular")},
		animal{name: "dangling.w.example", make: symlink(t, "nowhere"), says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "down.w.example", make: func(dir string) { hostdirtest.Abandon(t, dir) }, says: is(nobodyListens)},
		absent,
	)
	if os.Geteuid() != 0 {
		return // only root can give files away
	}
	must(t, os.Chown(z.hosts, 500, 500))
	z.add(
		animal{name: "*.theirs.example", make: theirs(t, good(t)), says: is(notCounted, "1000", "500")},
		animal{name: "a.theirs.example", says: is(notCounted, "1000", "500")},
		animal{name: "b.theirs.example", make: theirs(t, good(t)), says: is("ok")},
		animal{name: "*.owners.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chown(dir, 500, 500))
		}, says: is("ok")},
		animal{name: "*.link.example", make: theirs(t, symlink(t, entryOf("b.theirs.example"))), says: is(notCounted, "1000", "500")},
		animal{name: "*.ours.example", make: symlink(t, entryOf("b.theirs.example")), says: is("ok")},
		animal{name: "marked.example", make: theirs(t, good(t, "log-connections"), "log-connections"),
			says: is("ok", "log-connections", "1000", "500")},
		animal{name: "marked-by-root.example", make: theirs(t, good(t, "log-connections")), says: is("ok, logged")},
		animal{name: "marked-by-owner.example", make: func(dir string) {
			good(t, "log-connections")(dir)
			must(t, os.Chown(filepath.Join(dir, "log-connections"), 500, 500))
		}, says: is("ok, logged")},
	)
}

// addEverything adds a directory * that serves everything else.
func (z *zoo) addEverything() {
	t := z.t
	z.add(
		animal{name: "*", make: good(t, "log-connections", "send-proxy-v1"), says: is("ok, PROXY v1, logged")},
		animal{name: "unknown.example", says: is("ok, PROXY v1, logged, served by *")},
		animal{name: "single", says: is("ok, PROXY v1, logged, served by *")},
		animal{name: "known.example", make: good(t), says: is("ok, logged")},
		animal{name: "down.example", make: func(dir string) { hostdirtest.Abandon(t, dir) }, says: is(nobodyListens)},
		animal{name: "*.absent.example", says: is("ok, PROXY v1, logged, served by *")},
	)
	if os.Geteuid() == 0 {
		z.add(
			animal{name: "*.theirs.example", make: theirs(t, good(t)), asIf: "ok, PROXY v1, logged, served by *",
				says: is("it does not count, * serves its clients", "1000", "root")},
			animal{name: "a.theirs.example",
				says: is("ok, PROXY v1, logged, served by *", "*.theirs.example", "1000", "root")},
			animal{name: "b.theirs.example", make: theirs(t, good(t)), says: is("ok, logged")},
			animal{name: "marked.example", make: theirs(t, good(t, "log-connections"), "log-connections"),
				says: is("ok, logged", "log-connections", "1000", "root")},
		)
	}
}

// addNobodys adds a directory * that does not count.
func (z *zoo) addNobodys() {
	z.add(
		animal{name: "*", make: theirs(z.t, good(z.t, "log-connections")), says: is(notCounted)},
		animal{name: "unknown.example", says: is(notCounted)},
		animal{name: "known.example", make: good(z.t), says: is("ok")},
		animal{name: "logged.example", make: good(z.t, "log-connections"), says: is("ok, logged")},
		animal{name: "*.theirs.example", make: theirs(z.t, good(z.t)), says: is(notCounted, "1000", "1000")},
		animal{name: "a.theirs.example", says: is(notCounted, "1000", "1000")},
	)
}

// addLinked adds a symlink * to a directory of somebody who cannot have all connections logged.
func (z *zoo) addLinked() {
	t := z.t
	tenants := filepath.Join(z.others, "tenants")
	theirs(t, good(t, "log-connections"), "log-connections")(tenants)
	z.add(
		animal{name: "*", make: symlink(t, tenants), says: is("ok", "log-connections", "1000", "root")},
		animal{name: "known.example", make: good(t), says: is("ok")},
		animal{name: "logged.example", make: good(t, "log-connections"), says: is("ok, logged")},
	)
}

// addDown adds a directory * that cannot serve. Still the connections of all hosts are logged.
func (z *zoo) addDown() {
	t := z.t
	z.add(
		animal{name: "*", make: func(dir string) {
			hostdirtest.Abandon(t, dir)
			hostdirtest.Touch(t, filepath.Join(dir, "log-connections"))
		}, says: is(nobodyListens)},
		animal{name: "unknown.example", says: is(nobodyListens)},
		animal{name: "known.example", make: good(t), says: is("ok, logged")},
		animal{name: "*.w.example", make: good(t), says: is("ok, logged")},
		animal{name: "a.w.example", says: is("ok, logged, served by *.w.example")},
	)
}

// addDangling adds a symlink * that leads nowhere.
func (z *zoo) addDangling() {
	z.add(
		animal{name: "*", make: symlink(z.t, "nowhere"), says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "unknown.example", says: is(noDirectory, "nowhere", "nowhere")},
		animal{name: "known.example", make: good(z.t), says: is("ok")},
	)
}

// addClosed adds a directory * that is closed to all but root.
func (z *zoo) addClosed() {
	t := z.t
	z.add(
		animal{name: "*", make: func(dir string) {
			good(t, "log-connections")(dir)
			must(t, os.Chmod(dir, 0o600))
		}, says: is("ok, logged"), forbidden: is(notPermitted, "x", "ENTRY", "0600", "OWNER")},
		animal{name: "known.example", make: good(t), says: is("ok, logged"), forbidden: is("ok")},
	)
}

// Goal: for every host and name in a zoo of hosts directories, sniproxy-check says what sniproxy
// does, in the words of its log, whether it logs the connection, and why: with each engine, and for
// each user who runs them. What it says of * also holds for clients without a name. The zoo has
// every reason for a refusal, except those that say nothing about the host: a hello that is not
// valid or does not come, and too many look-ups. For the others see TestZooFileSystems, TestNoRoom
// and TestExchanged.
func TestZoo(t *testing.T) {
	t.Parallel()
	adds := []func(*zoo){(*zoo).addHosts, (*zoo).addOthers, (*zoo).addWildcards, (*zoo).addEverything, (*zoo).addDown, (*zoo).addDangling, (*zoo).addClosed}
	if os.Geteuid() == 0 {
		adds = append(adds, (*zoo).addNobodys, (*zoo).addLinked)
	}
	// Not all in one: sniproxy writes no more than 50 lines about refusals at once.
	var zoos []*zoo
	for _, add := range adds {
		z := newZoo(t)
		add(z)
		zoos = append(zoos, z)
	}
	reasons := visitAll(zoos...)
	if os.Geteuid() != 0 || runtime.GOOS != "linux" {
		return
	}
	expectReasons(t, reasons,
		"no server name",
		"no server name, and the directory * belongs neither to root nor to the owner of the hosts directory",
		"server name is empty",
		"server name is longer than 254 bytes",
		"server name has an empty label",
		"server name is a URL, or has a path behind it",
		"server name has a space or a control character",
		"server name has a port behind it",
		"a label of the server name begins with a hyphen",
		"server name has a character other than letters, digits, '-', '_' and '.'",
		noDirectory, noSocket, dangling, notSocket, strings.Replace(notPermitted, "UID", "65534", 1), nobodyListens, notStream, pathTooLong, notCounted, backlogFull)
}

// visitAll has each user visit each zoo, and returns all reasons for which sniproxy refused a
// client.
func visitAll(zoos ...*zoo) (reasons []string) {
	var visits []*visit
	for _, z := range zoos {
		for _, engine := range engines {
			for _, u := range users() {
				visits = append(visits, z.visit(engine, u))
			}
		}
	}
	for _, v := range visits {
		reasons = append(reasons, v.compare()...)
	}
	return reasons
}

func expectReasons(t *testing.T, reasons []string, want ...string) {
	t.Helper()
	for _, reason := range want {
		if !slices.Contains(reasons, reason) {
			t.Errorf("sniproxy refused no client with the reason %q", reason)
		}
	}
}

// A visit is a user in a zoo, with the programs of an engine.
type visit struct {
	*zoo
	engine string
	user   user
	addr   string
	log    hostdirtest.Lines
	end    func(unix.Signal) // ends sniproxy with a signal

	listed, named bytes.Buffer
	outcomes      [][]outcome // of sniproxy, for the clients of each animal
	done          sync.WaitGroup
}

// An outcome is what sniproxy does for a client.
type outcome struct {
	text   string // "ok" and the facts, in the words of sniproxy-check, or the reason for the refusal
	by     string // what follows ", logged": which directory serves the client, if not the host's own
	client string // in the words of the log: its address, and the name that it asked for
}

// visit begins a visit. It starts the programs itself, since only this thread may have the mounts.
func (z *zoo) visit(engine string, u user) *visit {
	t := z.t
	v := &visit{zoo: z, engine: engine, user: u, outcomes: make([][]outcome, len(z.animals))}
	v.start(u.command(build(t, "sniproxy", engine)))

	var names []string
	for _, a := range z.animals {
		if !a.entry {
			names = append(names, a.name)
		}
	}
	checker := build(t, "sniproxy-check", engine)
	for _, c := range []struct {
		out  *bytes.Buffer
		args []string
	}{{&v.listed, []string{z.hosts}}, {&v.named, append([]string{z.hosts}, names...)}} {
		cmd := u.command(checker, u.forItself(c.args...)...)
		cmd.Stdout, cmd.Stderr = c.out, os.Stderr
		must(t, cmd.Start())
		v.done.Go(func() { cmd.Wait() })
	}
	for i, a := range z.animals {
		hellos := a.hellos()
		v.outcomes[i] = make([]outcome, len(hellos))
		for j, h := range hellos {
			v.done.Go(func() { v.outcomes[i][j] = v.ask(a, h) })
		}
	}
	return v
}

// start starts sniproxy.
func (v *visit) start(proxy *exec.Cmd) {
	t := v.t
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	v.addr = l.Addr().String()
	stdin, err := l.File()
	must(t, err)
	l.Close()
	defer stdin.Close()
	proxy.Dir, proxy.Stdin, proxy.Stderr = v.hosts, stdin, &v.log
	must(t, proxy.Start())
	var once sync.Once
	v.end = func(s unix.Signal) {
		once.Do(func() {
			proxy.Process.Signal(s)
			proxy.Wait()
		})
	}
	t.Cleanup(func() { v.end(unix.SIGKILL) })
}

// A hello is what a client sends, and how the log calls it.
type hello struct {
	bytes []byte
	asks  string // " for NAME", or " without a name"
}

// hellos returns hellos of clients of a host. The first has a name. Others, for *, have none.
func (a animal) hellos() []hello {
	name := strings.Replace(a.name, "*", "any-label", 1)
	hellos := []hello{{snitest.Named(name).Stream(), " for " + name}}
	if a.name == "*" {
		for _, m := range []*snitest.Message{
			snitest.ClientHello{}.Build(),
			snitest.ClientHello{Extensions: func(*snitest.Message) {}}.Build(),
			snitest.NameList(func(m *snitest.Message) { m.Entry(snitest.OtherName, "name.example") }),
		} {
			hellos = append(hellos, hello{m.Stream(), " without a name"})
		}
	}
	return hellos
}

// ask returns what sniproxy does for a client of a host.
func (v *visit) ask(a animal, h hello) outcome {
	c, err := net.Dial("tcp4", v.addr)
	if err != nil {
		return outcome{text: err.Error()}
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	if _, err := c.Write(h.bytes); err != nil {
		return outcome{text: err.Error()}
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return outcome{text: err.Error()}
	}
	if len(got) > 0 && got[0] == 21 {
		refused, line := "refused "+c.LocalAddr().String(), ""
		if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool { line = v.log.Find(refused); return line != "" }) {
			return outcome{text: fmt.Sprintf("no line with %q", refused)}
		}
		_, line, _ = strings.Cut(line, refused)
		_, reason, _ := strings.Cut(line, ": ") // behind " for NAME", or nothing
		return outcome{text: reason[:strings.LastIndex(reason, " (alert ")]}
	}
	version, entry, _ := strings.Cut(string(got), " ")
	entry, handed := strings.CutSuffix(entry, " handed")
	text := "ok"
	if handed {
		text += ", handed over"
	}
	if version != "0" {
		text += ", PROXY v" + version
	}
	return outcome{text, v.servedBy(a, entry), c.LocalAddr().String() + h.asks}
}

// servedBy says which entry serves the clients of a host, "" if it is the host's own.
func (v *visit) servedBy(a animal, entry string) string {
	// The backend of a symlink says the name of the target, which may be any.
	if info, err := os.Lstat(filepath.Join(v.hosts, a.entryName())); err == nil && (info.Mode()&os.ModeSymlink != 0 || entry == a.entryName()) {
		return ""
	}
	if _, err := os.Lstat(filepath.Join(v.hosts, a.entryName(), "tls-socket")); err == nil && entry == "elsewhere" {
		return ""
	}
	for _, other := range v.animals {
		if entry == other.entryName() {
			entry = other.name
		}
	}
	return ", served by " + entry
}

// addLogged adds to the outcomes whether sniproxy has logged them. The log is complete once
// sniproxy has ended.
func (v *visit) addLogged() {
	v.end(unix.SIGTERM)
	log, logged := v.log.String(), 0
	for _, ofAnimal := range v.outcomes {
		for i := range ofAnimal {
			o := &ofAnimal[i]
			if o.client != "" && strings.Contains(log, "sniproxy: served "+o.client+": bytes ") {
				o.text += ", logged"
				logged++
			}
			o.text += o.by
		}
	}
	if n := strings.Count(log, "sniproxy: served "); n != logged {
		v.t.Errorf("engine %q, uid %d: the log has %d lines about connections, and %d are about our clients", v.engine, v.user.uid, n, logged)
	}
}

// compare compares what both programs say, and returns all reasons for which sniproxy refused a
// client.
func (v *visit) compare() (reasons []string) {
	t := v.t
	v.done.Wait()
	v.addLogged()
	defer func() {
		if t.Failed() {
			t.Logf("engine %q, uid %d:\n%s\n%s\n%s", v.engine, v.user.uid, v.listed.String(), v.named.String(), v.log.String())
		}
	}()
	listed, named := byLabel(v.listed.String()), byLabel(v.named.String())
	inList, inNames := 0, 0
	for i, a := range v.animals {
		for _, o := range v.outcomes[i] {
			if !strings.HasPrefix(o.text, "ok") {
				reasons = append(reasons, o.text)
			}
		}
		where := fmt.Sprintf("engine %q, uid %d, %.60q", v.engine, v.user.uid, a.name)
		want := a.says
		switch {
		case a.forbidden.what != "" && v.user.uid != 0:
			want = a.forbidden
		}
		names := strings.NewReplacer("ENTRY", a.entryName(), "UID", strconv.Itoa(v.user.uid), "OWNER", strconv.Itoa(os.Geteuid()))

		var lines []string
		label := show(a.name)
		if !a.entry {
			inNames++
			line, ok := named[label]
			if !ok {
				t.Errorf("%s: no line among the names", where)
			}
			if a.asked.what == "" {
				lines = append(lines, line)
			} else if !a.asked.has(line, names) {
				t.Errorf("%s: of the name it says %q, want %q", where, line, a.asked)
			}
		}
		if a.make != nil {
			inList++
			line, ok := listed[show(a.entryName())]
			if !ok {
				t.Errorf("%s: no line among the entries", where)
			}
			// Nobody can tell that a hash is that of a wildcard.
			if !hostdir.Hashed || !strings.HasPrefix(a.name, "*.") {
				lines = append(lines, line)
			}
		}
		for _, line := range lines {
			if !want.has(line, names) {
				t.Errorf("%s: it says %q, want %q", where, line, want)
			}
			for i, o := range v.outcomes[i] {
				if i > 0 {
					line = ofNameless.Replace(line)
				}
				if !agree(a, line, o.text) {
					t.Errorf("%s, client %d: it says %q, and sniproxy %q", where, i, line, o.text)
				}
			}
		}
	}
	if len(listed) != inList || len(named) != inNames {
		t.Errorf("engine %q, uid %d: %d and %d lines, want %d and %d", v.engine, v.user.uid, len(listed), len(named), inList, inNames)
	}
	return reasons
}

// ofNameless turns what sniproxy-check says of * into what it means for clients without a name. If
// no directory serves them, sniproxy does not speak of a directory, which they have not asked for,
// but says that there is no name.
var ofNameless = strings.NewReplacer(
	"no directory, and the wildcard for it belongs", "no server name, and the directory * belongs",
	"no directory", "no server name",
)

// agree reports whether sniproxy does what sniproxy-check says of a host.
func agree(a animal, line, answer string) bool {
	head, _, _ := strings.Cut(line, "; ")
	switch {
	case a.asIf != "":
		return answer == a.asIf
	case a.entry && hostdir.Hashed:
		return true // nobody can tell
	case a.entry:
		return !strings.HasPrefix(answer, "ok")
	case a.bad:
		return line == "not a host name: "+answer
	case strings.HasPrefix(answer, "ok"):
		return head == answer
	}
	rest, ok := strings.CutPrefix(line, answer)
	return ok && (rest == "" || strings.HasPrefix(rest, ": ") || strings.HasPrefix(rest, "; "))
}

// byLabel returns the lines by their labels.
func byLabel(text string) map[string]string {
	lines := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		label, rest, _ := strings.Cut(line, ": ")
		if strings.HasPrefix(line, `"`) {
			label, _ = strconv.QuotedPrefix(line)
			rest = strings.TrimPrefix(line[len(label):], ": ")
		}
		lines[label] = rest
	}
	return lines
}
