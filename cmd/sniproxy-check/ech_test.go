package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/ech"
)

// Goal: of each backend that has a good certificate it is said whether it confirms Encrypted Client
// Hello, also across a HelloRetryRequest and behind a PROXY header. One that does not is no fault.
func TestECHBackends(t *testing.T) {
	t.Parallel()
	h := newTLSHosts(t)
	cert := certify(t, begin, end, "*.e.example")
	// Each connection is served by the next of the functions; the last serves all others.
	serve := func(dir string, serve ...func(c net.Conn)) {
		var n atomic.Int64
		hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
			serve[min(int(n.Add(1)), len(serve))-1](c)
		})
	}
	with := func(change func(*tls.Config)) func(net.Conn) {
		config := &tls.Config{Certificates: []tls.Certificate{cert}}
		if change != nil {
			change(config)
		}
		return func(c net.Conn) { tls.Server(c, config).Handshake() }
	}
	plain := with(nil)
	const good = "ok; TLS 1.3, with a certificate for *.e.example "
	serve(h.add("good.e.example", good, good2101+"; confirms ECH"), plain)
	serve(h.add("retry.e.example", good, good2101+"; confirms ECH"), with(func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }))
	speak(t, h.add("marked.e.example", "ok, PROXY v2; TLS 1.3", good2101+"; confirms ECH", "send-proxy-v2"), cert)
	serve(h.add("client.e.example", good, good2101+"; confirms ECH"), with(func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert }))
	serve(h.add("old.e.example", "ok; TLS 1.2", good2101+"; does not confirm ECH, which needs TLS 1.3"), with(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }))
	// These are good once, and then no more.
	serve(h.add("closing.e.example", good, "; whether it confirms ECH cannot be told: the backend has closed the connection without an answer"), plain, func(c net.Conn) { c.Read(make([]byte, 1<<16)) })
	serve(h.add("alert.e.example", good, "; does not confirm ECH, but refuses the handshake: remote error: tls: handshake failure"), plain, func(c net.Conn) {
		c.Read(make([]byte, 1<<16))
		c.Write([]byte{21, 3, 3, 0, 2, 2, 40})
	})
	serve(h.add("cut.e.example", good, "; whether it confirms ECH cannot be told: no handshake can be made: "), plain, func(c net.Conn) {
		c.Read(make([]byte, 1<<16))
		c.Write([]byte{22, 3, 3, 0, 50, 2, 0, 0, 46})
	})
	silent := func(c net.Conn) { io.Copy(io.Discard, c) }
	serve(h.add("silent.e.example", good, "; whether it confirms ECH cannot be told: the backend gave no answer to a ClientHello for ten seconds"), plain, silent)
	// A fault of another kind, so that the exit status is 1, and nothing is said of ECH.
	serve(h.add("another.example", anothers+"another.example but for *.e.example: ", "give the backend one for another.example"), plain)
	if stdout := h.check(); strings.Count(stdout, " ECH") != len(h.names)-1 {
		t.Errorf("ECH is said of another number of hosts than %d:\n%s", len(h.names)-1, stdout)
	}
	// With keys, what follows from that is said.
	putKeys(t, h.dir, 0o700, 0o600, "a.pem")
	stdout, stderr, status := check(t, users()[0], "", "-t", h.dir, "good.e.example", "old.e.example")
	if stderr != "" || status != 0 || !strings.Contains(stdout, "confirms ECH\n") || !strings.Contains(stdout, "which needs TLS 1.3: clients that hide this name fail, so have no ech= ") {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}

// putKeys makes an .ech of a hosts directory anew, with modes for it and for its files, which are
// keys.
func putKeys(t *testing.T, hosts string, dirMode, mode os.FileMode, names ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(hosts, ".ech")
	must(t, os.RemoveAll(dir))
	must(t, os.Mkdir(dir, 0o700))
	for _, name := range names {
		key, err := ech.GenerateKey("public.example")
		must(t, err)
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, key.MarshalPEM(), 0o600))
		must(t, os.Chmod(path, mode))
	}
	must(t, os.Chmod(dir, dirMode))
	return dir
}

// Goal: what is wrong with keys is said in the words of the log, for the user who is asked for; and
// what the log does not say, that everybody can read them. Hosts are served all the same. Of a host
// with a datagram socket it is said that they are of no use to it, if there are any.
func TestECHKeys(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	hosts := hostdirtest.Dir(t)
	hostdirtest.ListenDatagram(t, filepath.Join(hosts, entryOf("handed.example")))
	root, other := user{0}, user{65534}
	const unfit = "; " + noECH
	const ignored = ".ech in the hosts directory does not count: "
	bad := func(name string) string { return "key file .ech/" + name + " in the hosts directory is no good: " }
	var many []string
	for i := range hostdir.MaxKeys + 2 {
		many = append(many, fmt.Sprintf("%02d", i))
	}
	for what, c := range map[string]struct {
		user    user
		prepare func()
		want    []string // what lines on standard error begin with
		keys    bool     // there are some
	}{
		"none":             {root, func() { os.RemoveAll(filepath.Join(hosts, ".ech")) }, nil, false},
		"empty":            {root, func() { putKeys(t, hosts, 0o700, 0) }, nil, false},
		"good":             {root, func() { putKeys(t, hosts, 0o750, 0o644, "a.pem", ".new") }, nil, true},
		"open":             {root, func() { putKeys(t, hosts, 0o755, 0o644, "a.pem") }, []string{"key file .ech/a.pem in the hosts directory can be read by everybody: chmod o-rwx .ech"}, true},
		"open, but closed": {root, func() { putKeys(t, hosts, 0o755, 0o640, "a.pem") }, nil, true},
		"group writes":     {root, func() { putKeys(t, hosts, 0o770, 0o600, "a.pem") }, []string{ignored + "its mode 0770 lets others than its owner change it"}, false},
		"a tenant's": {root, func() { must(t, os.Chown(putKeys(t, hosts, 0o700, 0o600, "a.pem"), 65532, 65532)) },
			[]string{ignored + "it belongs to uid 65532, neither to root"}, false},
		"a file": {root, func() {
			must(t, os.RemoveAll(filepath.Join(hosts, ".ech")))
			hostdirtest.Touch(t, filepath.Join(hosts, ".ech"))
		}, []string{ignored + "it is no directory"}, false},
		"bad": {root, func() {
			hostdirtest.Touch(t, filepath.Join(putKeys(t, hosts, 0o700, 0o600, "a.pem", "c.pem"), "b.pem"))
			must(t, os.Chmod(filepath.Join(hosts, ".ech/c.pem"), 0o666))
		}, []string{bad("b.pem") + "it has no complete PRIVATE KEY block", bad("c.pem") + "its mode 0666 lets others than its owner change it"}, true},
		"too many":            {root, func() { putKeys(t, hosts, 0o700, 0o600, many...) }, []string{fmt.Sprintf(".ech in the hosts directory has %d files, but only the first %d by name count: remove old keys", hostdir.MaxKeys+2, hostdir.MaxKeys)}, true},
		"closed to sniproxy":  {other, func() { putKeys(t, hosts, 0o700, 0o600, "a.pem") }, []string{ignored + "permission denied: let uid 65534, "}, false},
		"a file closed to it": {other, func() { putKeys(t, hosts, 0o755, 0o600, "a.pem") }, []string{bad("a.pem") + "permission denied: let uid 65534, "}, false},
	} {
		c.prepare()
		stdout, stderr, status := check(t, c.user, "", hosts)
		for i, line := range strings.SplitAfter(stderr, "\n") {
			if (i < len(c.want)) != (line != "") || line != "" && !strings.HasPrefix(line, "sniproxy-check: "+c.want[i]) {
				t.Errorf("%s: stderr %q, want %q", what, stderr, c.want)
				break
			}
		}
		if keys := strings.HasSuffix(stdout, unfit+"\n"); keys != c.keys || !strings.HasPrefix(stdout, entryOf("handed.example")+": ok, handed over") || status != 0 {
			t.Errorf("%s: stdout %q, exit status %d", what, stdout, status)
		}
	}

	// Who cannot become the user is not told of permissions of his own.
	for what, c := range map[string]struct {
		dirMode os.FileMode
		want    string
	}{
		"directory": {0o700, "the keys in .ech in the hosts directory cannot be checked: you may not read them; ask root to run this"},
		"file":      {0o755, "key file .ech/a.pem in the hosts directory cannot be checked: you may not read it; ask root to run this"},
	} {
		putKeys(t, hosts, c.dirMode, 0o600, "a.pem")
		stdout, stderr, _ := checkFor(t, other, "", "-u", "0:0", hosts)
		if !strings.HasSuffix(stdout, unfit+"\n") || stderr != "sniproxy-check: "+c.want+"\n" {
			t.Errorf("closed %s: stdout %q, stderr %q, want %q", what, stdout, stderr, c.want)
		}
	}
}
