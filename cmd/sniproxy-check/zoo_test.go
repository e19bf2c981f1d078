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
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// patience is how long a test waits for what must come. It is no limit on speed.
const patience = 60 * time.Second

// bind makes a host with a socket that does not listen.
func bind(t *testing.T, dir string, kind int) (fd int) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
	must(t, err)
	unix.CloseOnExec(fd)
	// The path may be too long for a socket address.
	short := filepath.Join(workspace, "s"+strconv.Itoa(fd))
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: short}))
	must(t, os.Chmod(short, 0o777))
	must(t, os.Rename(short, filepath.Join(dir, "tls-socket")))
	return fd
}

// serve makes a host with a backend, which tells each client the name of the directory and the version of the PROXY
// protocol that it was spoken to with.
func serve(t *testing.T, dir string) net.Listener {
	t.Helper()
	return answer(t, bind(t, dir, unix.SOCK_STREAM), filepath.Base(dir))
}

// answer is the backend, on a socket that is bound.
func answer(t *testing.T, fd int, name string) net.Listener {
	t.Helper()
	must(t, unix.Listen(fd, 128))
	f := os.NewFile(uintptr(fd), "tls-socket")
	defer f.Close()
	l, err := net.FileListener(f)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 1<<16)
				n, err := c.Read(b)
				version := 0
				switch {
				case err != nil:
					return // sniproxy-check, which says nothing
				case bytes.HasPrefix(b[:n], []byte("PROXY ")):
					version = 1
				case bytes.HasPrefix(b[:n], []byte("\r\n\r\n\x00\r\nQUIT\n")):
					version = 2
				}
				fmt.Fprintf(c, "%d %s", version, name)
			}()
		}
	}()
	return l
}

// An animal is a host with some oddity, or a name that is asked for.
type animal struct {
	name string // canonical, or a wildcard, if make makes something
	make func(dir string)
	says string // what is said of it, behind its name; a pattern

	forbidden string // the same if somebody else than root asks
	asked     string // the same of the name, if that is something else than what is said of the entry
	asIf      string // what sniproxy does, if that is something else: what serves the clients

	entry bool // name is the name of the entry, whatever that is, and no client can ask for it
	bad   bool // name is none
}

// A zoo is a hosts directory.
type zoo struct {
	t       *testing.T
	hosts   string
	others  string // a directory beside it
	animals []animal
	mounts  bool // there are file systems that do not answer, or are gone
}

func newZoo(t *testing.T) *zoo {
	dir := directory(t)
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

// makeSocket makes something in the place of a socket.
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
			touch(t, filepath.Join(dir, f))
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

// addHosts adds all that can be the matter with a host itself.
func (z *zoo) addHosts() {
	t := z.t
	long := strings.Repeat("long-name.", 15) + "example"
	elsewhere := filepath.Join(z.others, "elsewhere")
	serve(t, elsewhere)
	locked := filepath.Join(z.others, "locked")
	serve(t, filepath.Join(locked, "inner"))
	must(t, os.Chmod(locked, 0o600))
	fileBeside := filepath.Join(z.others, "file")
	touch(t, fileBeside)

	const ok = "ok"
	inIt := func(what string) string {
		return "ok; " + what + " in it means nothing, only send-proxy-v1, send-proxy-v2 and log-connections do"
	}
	z.add(
		animal{name: "good.example", make: good(t, "notes.txt", "index.log"), says: ok},
		animal{name: "v1.example", make: good(t, "send-proxy-v1"), says: "ok, PROXY v1"},
		animal{name: "v2.example", make: good(t, "send-proxy-v2"), says: "ok, PROXY v2"},
		animal{name: "both.example", make: good(t, "send-proxy-v1", "send-proxy-v2"), says: "ok, PROXY v2"},
		animal{name: "logged.example", make: good(t, "log-connections"), says: "ok, logged"},
		animal{name: "logged2.example", make: good(t, "log-connections", "send-proxy-v2"), says: "ok, PROXY v2, logged"},
		animal{name: "dangling-marker.example", make: func(dir string) {
			good(t)(dir)
			symlink(t, "nowhere")(filepath.Join(dir, "log-connections"))
		}, says: "ok, logged"},
		animal{name: "v3.example", make: good(t, "send-proxy-v3"), says: inIt("send-proxy-v3")},
		animal{name: "underscores.example", make: good(t, "send_proxy_v1"), says: inIt("send_proxy_v1")},
		animal{name: "bare.example", make: good(t, "send-proxy"), says: inIt("send-proxy")},
		animal{name: "capitals.example", make: good(t, "Send-Proxy-V2"), says: inIt("Send-Proxy-V2")},
		animal{name: "typo.example", make: good(t, "sned-proxy-v2"), says: inIt("sned-proxy-v2")},
		animal{name: "logging.example", make: good(t, "log"), says: inIt("log")},
		animal{name: "newline.example", make: good(t, "log\nforged: ok"), says: inIt(`"log\\nforged: ok"`)},
		animal{name: "logs.example", make: good(t, "log-connection"), says: inIt("log-connection")},
		animal{name: "unlisted.example", make: func(dir string) {
			good(t, "send-proxy-v1")(dir)
			must(t, os.Chmod(dir, 0o711))
		}, says: "ok, PROXY v1"},
		animal{name: "linked.example", make: symlink(t, elsewhere), says: ok},
		animal{name: "switched.example", make: makeSocket(t, func(path string) error {
			return os.Symlink(filepath.Join(elsewhere, "tls-socket"), path)
		}), says: ok},

		animal{name: "absent.example", says: "no directory: make one, .*"},
		animal{name: "file.example", make: func(dir string) { touch(t, dir) }, says: "no directory: it is a regular file"},
		animal{name: "dangling.example", make: symlink(t, "nowhere"), says: "no directory: the symlink leads nowhere, there is no nowhere"},
		animal{name: "dangling2.example", make: symlink(t, elsewhere+"/a/b"),
			says: "no directory: the symlink leads nowhere, there is no " + elsewhere + "/a"},
		animal{name: "loop.example", make: symlink(t, entryOf("loop.example")), says: "no directory: the symlink goes round in circles"},
		animal{name: "impossible.example", make: symlink(t, strings.Repeat("a", 256)), says: "no directory: a+: file name too long"},
		animal{name: "linked-file.example", make: symlink(t, fileBeside),
			says: "no directory: the symlink leads to " + fileBeside + ", which is a regular file"},
		animal{name: "through-file.example", make: symlink(t, fileBeside+"/x"),
			says: "no directory: the symlink leads to " + fileBeside + ", which is a regular file"},

		animal{name: "no-socket.example", make: func(dir string) { must(t, os.Mkdir(dir, 0o755)) },
			says: "no tls-socket in the directory: let the backend listen on ENTRY/tls-socket"},
		animal{name: "misnamed.example", make: func(dir string) {
			must(t, os.Mkdir(dir, 0o755))
			touch(t, filepath.Join(dir, "tls_socket"))
		}, says: "no tls-socket in the directory: let the backend listen on ENTRY/tls-socket, not on ENTRY/tls_socket"},
		animal{name: "dangling-socket.example", make: makeSocket(t, func(path string) error { return os.Symlink("nowhere", path) }),
			says: "no tls-socket in the directory: the symlink leads nowhere, there is no ENTRY/nowhere"},
		animal{name: "socket-loop.example", make: makeSocket(t, func(path string) error { return os.Symlink("tls-socket", path) }),
			says: "no tls-socket in the directory: the symlink goes round in circles"},
		animal{name: "impossible-socket.example", make: makeSocket(t, func(path string) error { return os.Symlink(strings.Repeat("a", 256), path) }),
			says: "the path of tls-socket is too long for a socket address, use hashed names"},
		animal{name: "regular.example", make: makeSocket(t, func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0), os.Chmod(path, 0o777))
		}), says: "tls-socket is not a stream socket: it is a regular file"},
		animal{name: "closed-regular.example", make: makeSocket(t, func(path string) error { return os.WriteFile(path, nil, 0o444) }),
			says: "tls-socket is not a stream socket: it is a regular file", forbidden: "permission denied for uid UID: it is a regular file"},
		animal{name: "fifo.example", make: makeSocket(t, func(path string) error {
			return errors.Join(unix.Mkfifo(path, 0o777), os.Chmod(path, 0o777))
		}), says: "tls-socket is not a stream socket: it is a FIFO"},
		animal{name: "directory.example", make: makeSocket(t, func(path string) error {
			return errors.Join(os.Mkdir(path, 0o777), os.Chmod(path, 0o777))
		}), says: "tls-socket is not a stream socket: it is a directory"},
		animal{name: "datagram.example", make: func(dir string) { bind(t, dir, unix.SOCK_DGRAM) },
			says: "tls-socket is not a stream socket: it is a datagram or a seqpacket socket"},
		animal{name: "silent.example", make: func(dir string) { bind(t, dir, unix.SOCK_STREAM) }, says: "nobody listens on tls-socket: start the backend, .*"},
		animal{name: "abandoned.example", make: func(dir string) { abandon(t, dir) }, says: "nobody listens on tls-socket: start the backend, .*"},
		animal{name: "deaf.example", make: deaf(t),
			says: "the backlog of tls-socket is full: the backend has accepted nobody for ten seconds"},
		animal{name: long, make: symlink(t, elsewhere), says: ok},

		animal{name: "closed.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chmod(dir, 0o644))
		}, says: ok, forbidden: `permission denied for uid UID: x is missing on the directory ENTRY \(mode 0644, uid OWNER\): chmod or setfacl it`},
		animal{name: "closed-socket.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chmod(dir+"/tls-socket", 0o555))
		}, says: ok, forbidden: `permission denied for uid UID: w is missing on the socket ENTRY/tls-socket \(mode 0555, uid OWNER\): chmod or setfacl it`},
		animal{name: "closed-on-the-way.example", make: symlink(t, filepath.Join(locked, "inner")), says: ok,
			forbidden: `permission denied for uid UID: x is missing on the directory ` + locked + ` \(mode 0600, uid OWNER\): chmod or setfacl it`},
	)
}

// addEntries adds entries that no client can ask for.
func (z *zoo) addEntries() {
	for _, a := range []animal{
		{name: "Capital.Example", says: "not a canonical name, so it is never looked up: rename it to capital.example"},
		{name: "dot.example.", says: "not a canonical name, so it is never looked up: rename it to dot.example"},
		{name: "bücher.example", says: "not a canonical name, so it is never looked up: rename it to xn--bcher-kva.example"},
		{name: "*.Capital.Example", says: `not a canonical name, so it is never looked up: rename it to \*.capital.example`},
		{name: "a..b", says: "not a canonical name, so it is never looked up: .*empty label"},
		{name: "-a.example", says: "not a canonical name, so it is never looked up: .*hyphen"},
		{name: "a.*", says: "not a canonical name, so it is never looked up: .*character other than.*"},
		{name: "a b: ok", says: "not a canonical name, so it is never looked up: .*character other than.*"},
		{name: "a\nforged: ok", says: "not a canonical name, so it is never looked up: .*character other than.*"},
		{name: "\xff.example", says: "not a canonical name, so it is never looked up: not valid UTF-8"},
		{name: strings.Repeat("a", 255), says: "not a canonical name, so it is never looked up: .*longer than .*"},
		{name: "EYbxj-n1MXKMRjIKgE3V0XmRpnG0cEBx7XxeVX2rqQ4", says: "not a canonical name, so it is never looked up: it may be a hash, which only a hashed build looks for"},
	} {
		if hostdir.Hashed {
			a.says = "not the hash of a name, as this is a hashed build.*"
			switch a.name {
			case "Capital.Example":
				a.says = "not the hash of a name, as this is a hashed build: rename it to " + entryOf("capital.example")
			case "EYbxj-n1MXKMRjIKgE3V0XmRpnG0cEBx7XxeVX2rqQ4":
				a.says = "ok"
			}
		}
		a.entry, a.make = true, good(z.t)
		z.add(a)
	}
}

// deaf makes a host whose backend listens, and accepts nobody. Its backlog is full.
func deaf(t *testing.T) func(string) {
	return func(dir string) {
		must(t, unix.Listen(bind(t, dir, unix.SOCK_STREAM), 0))
		for {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			must(t, err)
			unix.CloseOnExec(fd)
			must(t, unix.SetNonblock(fd, true))
			t.Cleanup(func() { unix.Close(fd) })
			switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}); err {
			case nil:
			case unix.EAGAIN:
				return
			default:
				t.Fatal(err)
			}
		}
	}
}

// absent is what there is to be said of * where there is none.
var absent = animal{name: "*", says: "no directory: make one, .*"}

// addNames adds names that are none.
func (z *zoo) addNames() {
	for name, reason := range map[string]string{
		"":                        "server name is empty",
		strings.Repeat("a.", 200): "server name is longer than 254 bytes",
		"a..b":                    "server name has an empty label",
		"..":                      "server name has an empty label",
		"a.-b":                    "a label of the server name begins with a hyphen",
		"a/b":                     "server name has a character other than letters, digits, '-', '_' and '.'",
		"a\nb: ok":                "server name has a character other than letters, digits, '-', '_' and '.'",
	} {
		z.add(animal{name: name, bad: true, says: "not a host name: " + regexp.QuoteMeta(reason)})
	}
}

// addWildcards adds wildcards, and names that they are for.
func (z *zoo) addWildcards() {
	t := z.t
	z.add(
		animal{name: "*.w.example", make: good(t, "send-proxy-v2"), says: "ok, PROXY v2"},
		animal{name: "a.w.example", says: `ok, PROXY v2, served by \*\.w\.example`},
		animal{name: "b.w.example", make: good(t), says: "ok"},
		animal{name: "*.l.example", make: good(t, "log-connections"), says: "ok, logged"},
		animal{name: "a.l.example", says: `ok, logged, served by \*\.l\.example`},
		animal{name: "b.l.example", make: good(t), says: "ok"},
		animal{name: "c.w.example", make: func(dir string) { must(t, os.Mkdir(dir, 0o755)) }, says: "no tls-socket in the directory: .*"},
		animal{name: "d.a.w.example", says: "no directory: make one, .*"},
		animal{name: "w.example", says: "no directory: make one, .*"},
		animal{name: "*.down.example", make: func(dir string) { abandon(t, dir) }, says: "nobody listens on tls-socket: .*"},
		animal{name: "a.down.example", says: "nobody listens on tls-socket: .*"},
		animal{name: "*.absent.example", says: "no directory: make one, .*"},
		animal{name: "*.file.example", make: func(dir string) { touch(t, dir) }, asIf: "no directory",
			says:  "does not count: it is a regular file, and must be a directory or a symlink",
			asked: `no directory: a wildcard must be a directory or a symlink, and ENTRY is a regular file`},
		animal{name: "a.file.example", says: `no directory: a wildcard must be a directory or a symlink, and \S+ is a regular file`},
		animal{name: "*.dangling.example", make: symlink(t, "nowhere"), says: "no directory: the symlink leads nowhere, .*"},
		animal{name: "a.dangling.example", says: "no directory: the symlink leads nowhere, .*"},
		animal{name: "file.w.example", make: func(dir string) { touch(t, dir) }, says: "no directory: it is a regular file"},
		animal{name: "dangling.w.example", make: symlink(t, "nowhere"), says: "no directory: the symlink leads nowhere, .*"},
		animal{name: "down.w.example", make: func(dir string) { abandon(t, dir) }, says: "nobody listens on tls-socket: .*"},
		absent,
	)
	if os.Geteuid() != 0 {
		return // who cannot give anything away has nothing of somebody else's
	}
	const ignored = "no directory, and the wildcard for it belongs neither to root nor to the owner of the hosts directory: " +
		"it is that of uid 1000, chown -h it to root or to uid 500, who has the hosts directory"
	must(t, os.Chown(z.hosts, 500, 500))
	z.add(
		animal{name: "*.theirs.example", make: theirs(t, good(t)), says: ignored},
		animal{name: "a.theirs.example", says: ignored},
		animal{name: "b.theirs.example", make: theirs(t, good(t)), says: "ok"},
		animal{name: "*.owners.example", make: func(dir string) {
			good(t)(dir)
			must(t, os.Chown(dir, 500, 500))
		}, says: "ok"},
		animal{name: "*.link.example", make: theirs(t, symlink(t, entryOf("b.theirs.example"))), says: ignored},
		animal{name: "*.ours.example", make: symlink(t, entryOf("b.theirs.example")), says: "ok"},
		animal{name: "marked.example", make: theirs(t, good(t, "log-connections"), "log-connections"),
			says: "ok; log-connections does not count: it is that of uid 1000, chown -h it to root or to uid 500, who has the hosts directory"},
		animal{name: "marked-by-root.example", make: theirs(t, good(t, "log-connections")), says: "ok, logged"},
		animal{name: "marked-by-owner.example", make: func(dir string) {
			good(t, "log-connections")(dir)
			must(t, os.Chown(filepath.Join(dir, "log-connections"), 500, 500))
		}, says: "ok, logged"},
	)
}

// addEverything adds a directory * that serves everything else.
func (z *zoo) addEverything() {
	t := z.t
	z.add(
		animal{name: "*", make: good(t, "log-connections", "send-proxy-v1"), says: "ok, PROXY v1, logged"},
		animal{name: "unknown.example", says: `ok, PROXY v1, logged, served by \*`},
		animal{name: "single", says: `ok, PROXY v1, logged, served by \*`},
		animal{name: "known.example", make: good(t), says: "ok, logged"},
		animal{name: "down.example", make: func(dir string) { abandon(t, dir) }, says: "nobody listens on tls-socket: .*"},
		animal{name: "*.absent.example", says: `ok, PROXY v1, logged, served by \*`},
	)
	if os.Geteuid() == 0 {
		z.add(
			animal{name: "*.theirs.example", make: theirs(t, good(t)), asIf: "ok, PROXY v1, logged, served by *",
				says: `it does not count, \* serves its clients: it is that of uid 1000, chown -h it to root`},
			animal{name: "a.theirs.example",
				says: `ok, PROXY v1, logged, served by \*; \*\.theirs\.example does not count: it is that of uid 1000, chown -h it to root`},
			animal{name: "b.theirs.example", make: theirs(t, good(t)), says: "ok, logged"},
			animal{name: "marked.example", make: theirs(t, good(t, "log-connections"), "log-connections"),
				says: "ok, logged; log-connections does not count: it is that of uid 1000, chown -h it to root"},
		)
	}
}

// addNobodys adds a directory * that does not count.
func (z *zoo) addNobodys() {
	const both = "no directory, and the wildcard for it belongs neither .*: it is that of uid 1000, .*; it is that of uid 1000, .*"
	z.add(
		animal{name: "*", make: theirs(z.t, good(z.t, "log-connections")), says: "no directory, and the wildcard for it belongs neither .*"},
		animal{name: "unknown.example", says: "no directory, and the wildcard for it belongs neither .*"},
		animal{name: "known.example", make: good(z.t), says: "ok"},
		animal{name: "logged.example", make: good(z.t, "log-connections"), says: "ok, logged"},
		animal{name: "*.theirs.example", make: theirs(z.t, good(z.t)), says: both},
		animal{name: "a.theirs.example", says: both},
	)
}

// addLinked adds a directory * that is a symlink to somebody else's, who cannot have all connections logged.
func (z *zoo) addLinked() {
	t := z.t
	tenants := filepath.Join(z.others, "tenants")
	theirs(t, good(t, "log-connections"), "log-connections")(tenants)
	z.add(
		animal{name: "*", make: symlink(t, tenants), says: "ok; log-connections does not count: it is that of uid 1000, chown -h it to root"},
		animal{name: "known.example", make: good(t), says: "ok"},
		animal{name: "logged.example", make: good(t, "log-connections"), says: "ok, logged"},
	)
}

// addDown adds a directory * that cannot serve, but has the connections of all hosts logged.
func (z *zoo) addDown() {
	t := z.t
	z.add(
		animal{name: "*", make: func(dir string) {
			abandon(t, dir)
			touch(t, filepath.Join(dir, "log-connections"))
		}, says: "nobody listens on tls-socket: .*"},
		animal{name: "unknown.example", says: "nobody listens on tls-socket: .*"},
		animal{name: "known.example", make: good(t), says: "ok, logged"},
		animal{name: "*.w.example", make: good(t), says: "ok, logged"},
		animal{name: "a.w.example", says: `ok, logged, served by \*\.w\.example`},
	)
}

// addDangling adds a directory * that is a symlink, and leads nowhere.
func (z *zoo) addDangling() {
	z.add(
		animal{name: "*", make: symlink(z.t, "nowhere"), says: "no directory: the symlink leads nowhere, there is no nowhere"},
		animal{name: "unknown.example", says: "no directory: the symlink leads nowhere, there is no nowhere"},
		animal{name: "known.example", make: good(z.t), says: "ok"},
	)
}

// addClosed adds a directory * that is closed to all but root.
func (z *zoo) addClosed() {
	t := z.t
	z.add(
		animal{name: "*", make: func(dir string) {
			good(t, "log-connections")(dir)
			must(t, os.Chmod(dir, 0o600))
		}, says: "ok, logged", forbidden: `permission denied for uid UID: x is missing on the directory ENTRY \(mode 0600, uid OWNER\): chmod or setfacl it`},
		animal{name: "known.example", make: good(t), says: "ok, logged", forbidden: "ok"},
	)
}

// Goal: of every host and every name in a zoo of hosts directories, sniproxy-check says what sniproxy does, in the words
// of its log, and whether it logs the connection: for each engine, and whoever runs them. What it says of * is said of
// clients without a name as well. And it says why. Every reason that sniproxy has for a refusal is there, but for those
// that say nothing of the host: a hello that is not valid, or does not come, and too many look-ups. For two more see
// TestNoRoom and TestExchanged.
func TestZoo(t *testing.T) {
	t.Parallel()
	// Not all in one: of refusals sniproxy has lines for no more than 50 at once.
	hosts, names := newZoo(t), newZoo(t)
	hosts.addHosts()
	hosts.addFileSystems()
	hosts.add(absent)
	names.addEntries()
	names.addNames()
	names.add(absent)
	zoos := []*zoo{hosts, names}
	more := []func(*zoo){(*zoo).addWildcards, (*zoo).addEverything, (*zoo).addDown, (*zoo).addDangling, (*zoo).addClosed}
	if os.Geteuid() == 0 {
		more = append(more, (*zoo).addNobodys, (*zoo).addLinked)
	}
	for _, add := range more {
		z := newZoo(t)
		add(z)
		zoos = append(zoos, z)
	}
	var visits []*visit
	for _, z := range zoos {
		for _, engine := range engines {
			for _, u := range users() {
				visits = append(visits, z.visit(engine, u))
			}
		}
	}
	var reasons []string
	for _, v := range visits {
		reasons = append(reasons, v.compare()...)
	}
	if os.Geteuid() != 0 || runtime.GOOS != "linux" {
		return
	}
	want := []string{
		"no server name",
		"no server name, and the directory * belongs neither to root nor to the owner of the hosts directory",
		"server name is empty",
		"server name is longer than 254 bytes",
		"server name has an empty label",
		"server name ends with a dot",
		"a label of the server name begins with a hyphen",
		"server name has a character other than letters, digits, '-', '_' and '.'",
		(&hostdir.Error{Problem: hostdir.NoDirectory, Ignored: true}).Error(),
		hostdir.BacklogFull.Error(), // for NoRoom see TestNoRoom, for Exchanged TestExchanged
	}
	if hosts.mounts {
		want = append(want, "the look-up has waited for a file system until the time limit",
			(&hostdir.Error{Problem: hostdir.Other, Errno: unix.ENOTCONN}).Error())
	}
	for p := hostdir.NoDirectory; p <= hostdir.Other; p++ {
		switch p {
		case hostdir.Other: // of a file system that is gone, see above
		case hostdir.NotPermitted:
			want = append(want, "permission denied for uid 65534")
		default:
			want = append(want, (&hostdir.Error{Problem: p}).Error())
		}
	}
	for _, reason := range want {
		if !slices.Contains(reasons, reason) {
			t.Errorf("sniproxy has refused nobody with the reason %q", reason)
		}
	}
}

// A visit is that of a user to a zoo, with the programs that were built for an engine.
type visit struct {
	*zoo
	engine string
	user   user
	addr   string
	log    lines
	end    func(unix.Signal) // ends sniproxy with a signal

	listed, named bytes.Buffer
	outcomes      [][]outcome // of sniproxy, for the clients of each animal
	done          sync.WaitGroup
}

// An outcome is what sniproxy does for a client.
type outcome struct {
	text   string // "ok" and the facts, in the words of sniproxy-check, or the reason for which it refuses the client
	by     string // what follows behind ", logged": which directory serves the client, if it is not the host's own
	client string // in the words of the log: its address, and the name that it asked for, if it did
}

// visit begins a visit. The programs are started here, since the mounts are those of this thread.
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
		cmd := u.command(checker, c.args...)
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

// hellos returns those of the clients that a host is for. The first has a name; others have none, and are for *.
func (a animal) hellos() []hello {
	name := strings.Replace(a.name, "*", "any-label", 1)
	hellos := []hello{{clientHello(serverName(0, name)), " for " + name}}
	if a.name == "*" {
		const otherType = 1 // of a name, which is not host_name
		for _, b := range [][]byte{clientHello(), clientHello(nil), clientHello(serverName(otherType, "name.example"))} {
			hellos = append(hellos, hello{b, " without a name"})
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
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(h.bytes); err != nil {
		return outcome{text: err.Error()}
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return outcome{text: err.Error()}
	}
	if len(got) > 0 && got[0] == 21 {
		line, err := v.log.await("refused " + c.LocalAddr().String())
		if err != nil {
			return outcome{text: err.Error()}
		}
		_, reason, _ := strings.Cut(line, ": ") // " for NAME: ", or ": "
		return outcome{text: reason[:strings.LastIndex(reason, " (alert ")]}
	}
	version, entry, _ := strings.Cut(string(got), " ")
	text := "ok"
	if version != "0" {
		text += ", PROXY v" + version
	}
	return outcome{text, v.servedBy(a, entry), c.LocalAddr().String() + h.asks}
}

// servedBy returns what is to be said of it that the backend in an entry serves the clients of a host.
func (v *visit) servedBy(a animal, entry string) string {
	// Which directory a symlink leads to is its own business.
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

// addLogged adds to the outcomes which of them sniproxy has a line in its log about. All lines are there when it has ended.
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

// compare compares, and returns all reasons for which sniproxy refused somebody.
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
		case a.forbidden != "" && v.user.uid != 0:
			want = a.forbidden
		}
		said := func(what string) *regexp.Regexp {
			what = strings.NewReplacer("ENTRY", regexp.QuoteMeta(a.entryName()), "UID", strconv.Itoa(v.user.uid), "OWNER", strconv.Itoa(os.Geteuid())).Replace(what)
			return regexp.MustCompile("^(?:" + what + ")$")
		}
		pattern := said(want)

		var lines []string
		label := show(a.name)
		if !a.entry {
			inNames++
			line, ok := named[label]
			if !ok {
				t.Errorf("%s: no line among the names", where)
			}
			if a.asked == "" {
				lines = append(lines, line)
			} else if !said(a.asked).MatchString(line) {
				t.Errorf("%s: of the name it says %q, want %q", where, line, a.asked)
			}
		}
		if a.make != nil {
			inList++
			line, ok := listed[show(a.entryName())]
			if !ok {
				t.Errorf("%s: no line among the entries", where)
			}
			// What the hash in a hashed build is of nobody can tell.
			if !hostdir.Hashed || !strings.HasPrefix(a.name, "*.") {
				lines = append(lines, line)
			}
		}
		for _, line := range lines {
			if !pattern.MatchString(line) {
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

// ofNameless makes of what sniproxy-check says of * what that means for clients without a name: where no directory is for
// them, sniproxy does not say that of a directory, which nobody has asked for, but that there is no name.
var ofNameless = strings.NewReplacer(
	"no directory, and the wildcard for it belongs", "no server name, and the directory * belongs",
	"no directory", "no server name",
)

// agree tells whether what sniproxy-check says of a host is what sniproxy does.
func agree(a animal, line, answer string) bool {
	head, _, _ := strings.Cut(line, "; ")
	switch {
	case a.asIf != "":
		return answer == a.asIf
	case a.entry && hostdir.Hashed:
		return true // who knows
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

// byLabel returns the lines by what they begin with.
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

// lines collects what a program prints.
type lines struct {
	mu   sync.Mutex
	text []byte
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	return len(b), nil
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// await waits for a line with a part, and returns what follows that.
func (l *lines) await(part string) (string, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for {
		if _, rest, ok := strings.Cut(l.String(), part); ok {
			if line, _, ok := strings.Cut(rest, "\n"); ok {
				return line, nil
			}
		}
		select {
		case <-tick.C:
		case <-late:
			return "", fmt.Errorf("no line with %q", part)
		}
	}
}

// clientHello returns a small ClientHello with some extensions, or without any if there is not even an empty list.
func clientHello(extensions ...[]byte) []byte {
	message := [][]byte{{3, 3}, make([]byte, 32), vector(1), vector(2, []byte{0x13, 1}), vector(1, []byte{0})}
	if extensions != nil {
		message = append(message, vector(2, extensions...))
	}
	return append([]byte{22, 3, 1}, vector(2, []byte{1}, vector(3, message...))...)
}

// serverName returns the extension server_name with a name of a type, which may be anything.
func serverName(kind byte, name string) []byte {
	list := vector(2, []byte{kind}, vector(2, []byte(name)))
	return append([]byte{0, 0}, vector(2, list)...)
}

// vector returns a vector of the presentation language of RFC 8446: its length, in some bytes, and what is in it.
func vector(size int, parts ...[]byte) []byte {
	all := bytes.Join(parts, nil)
	length := make([]byte, size)
	for i, n := size-1, len(all); i >= 0; i, n = i-1, n>>8 {
		length[i] = byte(n)
	}
	return append(length, all...)
}
