package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// answering is a backend that reads a hello, whatever is in it, and answers with a word.
func answering(word string) func(*net.UnixConn) {
	return func(c *net.UnixConn) {
		// The proxy sends all that it has read in one write.
		if n, err := c.Read(make([]byte, sni.MaxHello)); n > 0 && err == nil {
			io.WriteString(c, word)
		}
	}
}

// sayHello returns a hello with any name, also one that crypto/tls would not send.
func sayHello(name string) []byte { return snitest.Named(name).Stream() }

// expectAnswers fails the test unless clients that ask for the names get the words. The word ""
// stands for the alert unrecognized_name.
func (d *daemon) expectAnswers(words map[string]string) {
	d.t.Helper()
	for name, word := range words {
		got, err := d.exchange(sayHello(name))
		if err != nil || word == "" && alert(got) != int(sni.UnrecognizedName) || word != "" && string(got) != word {
			d.t.Errorf("%.60q: got %q, error %v, want %q", name, got, err, word)
		}
	}
}

// Goal: a wildcard serves names with exactly one label in the place of its asterisk and no
// directory of their own, and * serves all others. Without * these are unknown. Changes count at
// once.
func TestWildcard(t *testing.T) {
	d := start(t)
	for _, name := range []string{"exact.example.com", "*.example.com", "*.b.example.com", "*.com", "*.c"} {
		d.serve(name, answering(name))
	}
	words := map[string]string{
		"exact.example.com":        "exact.example.com",
		"EXACT.Example.COM":        "exact.example.com",
		"a.example.com":            "*.example.com",
		"A.EXAMPLE.com":            "*.example.com",
		"_a-.example.com":          "*.example.com",
		"xn--fa-hia.example.com":   "*.example.com",
		"b.example.com":            "*.example.com", // not that of *.b.example.com
		"com.example.com":          "*.example.com",
		"a.b.example.com":          "*.b.example.com",
		"exact.b.example.com":      "*.b.example.com",
		"example.com":              "*.com", // not that of *.example.com
		"example.com.c":            "",
		"com.c":                    "*.c",
		"a.b.b.example.com":        "",
		"a.exact.example.com":      "",
		"a.example":                "",
		"a.example.com.example":    "",
		"a.example.comm":           "",
		"aexample.com.example.net": "",
		"com":                      "",
		"c":                        "",
		"a":                        "",
	}
	d.expectAnswers(words)

	d.serve("*", answering("*"))
	for name, word := range words {
		if word == "" {
			words[name] = "*"
		}
	}
	d.expectAnswers(words)

	d.serve("com", answering("com"))
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*.example.com")))
	hostdirtest.Must(t, os.Rename(d.hostDir("exact.example.com"), d.hostDir("a.b.example.com")))
	for name, word := range words {
		if word == "*.example.com" {
			words[name] = "*"
		}
	}
	maps.Copy(words, map[string]string{
		"com": "com", "exact.example.com": "*", "EXACT.Example.COM": "*", "a.b.example.com": "exact.example.com",
	})
	d.expectAnswers(words)

	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
	for name, word := range words {
		if word == "*" {
			words[name] = ""
		}
	}
	d.expectAnswers(words)
}

// Goal: there is no fallback from an entry that exists but cannot serve: neither from a name's
// directory, or anything in its place, to the wildcard, nor from a wildcard to *. The reason in the
// log is about that entry.
func TestWildcardDown(t *testing.T) {
	d := start(t, ordinaryUser(t))
	d.serve("*", answering("*"))
	d.serve("*.up.example", answering("wildcard"))
	bad := maps.Clone(badHosts)
	maps.Copy(bad, tricks)
	delete(bad, "no directory")
	d.put("exact.down.example", bad["no socket"])
	for what, do := range bad {
		t.Run(what, func(t *testing.T) {
			for _, entry := range []string{"bad.up.example", "*.down.example"} {
				name := strings.Replace(entry, "*", "bad", 1)
				d.put(entry, do)
				word := ""
				if info, err := os.Lstat(d.hostDir(entry)); err == nil && entry != name && !info.IsDir() && info.Mode()&os.ModeSymlink == 0 {
					word = "*" // what is neither a directory nor a symlink is no wildcard
				}
				d.expectAnswers(map[string]string{name: word, "good.up.example": "wildcard", "exact.down.example": "", "any.example": "*"})
				hostdirtest.Must(t, os.RemoveAll(d.hostDir(entry)))
				word = "*"
				if entry == "bad.up.example" {
					word = "wildcard"
				}
				d.expectAnswers(map[string]string{name: word})
			}
		})
	}
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
	for what, do := range bad {
		t.Run(what+" for everything", func(t *testing.T) {
			d.put("*", do)
			d.expectAnswers(map[string]string{"any.example": "", "any": "", "good.up.example": "wildcard"})
			hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
		})
	}
}

// Goal: the line about a refused client says why the entry that exists cannot serve, whichever
// entry that is.
func TestWildcardDownLog(t *testing.T) {
	d := start(t, ordinaryUser(t))
	uid := os.Geteuid()
	if uid == 0 {
		uid = 65534
	}
	d.put("exact.example", badHosts["abandoned socket"])
	d.put("*.example", badHosts["no socket"])
	d.put("*", tricks["directory without permission"])
	for name, reason := range map[string]string{
		"exact.example": "nobody listens on tls-socket",
		"any.example":   "no tls-socket in the directory",
		"a.any.example": fmt.Sprintf("permission denied for uid %d", uid),
		"example":       fmt.Sprintf("permission denied for uid %d", uid),
	} {
		c := d.dial()
		c.Write(sayHello(name))
		got, err := io.ReadAll(c)
		expectRecord(t, got, err, sni.UnrecognizedName)
		d.expectNotice(notice{c.LocalAddr().String(), name, reason, sni.UnrecognizedName})
	}
}

// Goal: the longest names reach their wildcard if the path of its socket fits, and * in any case,
// unless they have a directory of their own, whatever its length.
func TestWildcardLongNames(t *testing.T) {
	d := start(t)
	d.serve("*", answering("*"))
	elsewhere := hostdirtest.Dir(t)
	hostdirtest.Serve(t, hostDir(elsewhere, "target"), answering("wildcard"))
	label := strings.Repeat("a", 63)
	rest := strings.Repeat("."+label, 3)
	for _, first := range []int{1, 61, 62, 63} {
		name := strings.Repeat("b", first) + rest
		if len(name) > sni.MaxName {
			d.expectAnswers(map[string]string{name: ""})
			continue
		}
		d.expectAnswers(map[string]string{name: "*"})
		entries := []string{"*" + rest, name}
		if first == 62 && len(name) != sni.MaxName {
			t.Fatalf("the name has %d bytes", len(name))
		}
		word := "wildcard"
		if !hostdir.Hashed && !anyName {
			word = ""
		}
		for _, entry := range entries {
			hostdirtest.Must(t, os.Symlink(hostDir(elsewhere, "target"), d.hostDir(entry)))
			d.expectAnswers(map[string]string{name: word})
			hostdirtest.Must(t, os.Remove(d.hostDir(entry)))
		}
	}
}

// flows has clients ask for names, one after the other in each of four goroutines, and calls
// answered for each answer, in one goroutine.
func (d *daemon) flows(n int, names []string, answered func(name, got string)) {
	type answer struct{ name, got string }
	answers := make(chan answer)
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			for j := range n {
				name := names[(i+j)%len(names)]
				got, err := d.exchange(sayHello(name))
				if err != nil {
					d.t.Errorf("%s: %v", name, err)
				}
				answers <- answer{name, string(got)}
			}
		})
	}
	go func() {
		clients.Wait()
		close(answers)
	}()
	for a := range answers {
		answered(a.name, a.got)
	}
}

// Goal: while the directory of a name comes and goes under load, it or the wildcard serves the
// clients. While the wildcard comes and goes, it or * does. No client is refused, and nothing else
// serves one.
func TestWildcardComesAndGoes(t *testing.T) {
	for _, tt := range []struct{ entry, word, other, third string }{
		{"a.example", "exact", "wildcard", "everything"},
		{"*.example", "wildcard", "everything", "exact"},
	} {
		t.Run(tt.entry, func(t *testing.T) {
			d := start(t)
			d.serve("*", answering("everything"))
			d.serve("*.example", answering("wildcard"))
			d.serve("b.example", answering("neighbour"))
			if tt.entry == "a.example" {
				d.serve("a.example", answering("exact"))
			}
			dir, aside := d.hostDir(tt.entry), filepath.Join(d.dir, ".aside")
			counts := map[string]int{}
			d.flows(250, []string{"a.example", "a.example", "b.example"}, func(name, got string) {
				if name == "b.example" {
					if got != "neighbour" {
						t.Errorf("a client of the neighbour got %q", got)
					}
					return
				}
				if counts[got]++; got != tt.word && got != tt.other && counts[got] < 3 {
					t.Errorf("an answer is %q", got)
				}
				// The others are in the middle of something.
				if err := os.Rename(dir, aside); errors.Is(err, os.ErrNotExist) {
					err = os.Rename(aside, dir)
					if err != nil {
						t.Error(err)
					}
				} else if err != nil {
					t.Error(err)
				}
			})
			t.Logf("answers: %v", counts)
			if counts[tt.word] == 0 || counts[tt.other] == 0 {
				t.Errorf("of %q there were %d answers, of %q %d", tt.word, counts[tt.word], tt.other, counts[tt.other])
			}
		})
	}
}

// namelessHellos are hellos that are complete and valid, and name no host.
func namelessHellos() map[string][]byte {
	pad := func(n int) *snitest.Message {
		return helloWith(func(m *snitest.Message) { m.Extension(snitest.Padding, make([]byte, n)) })
	}
	return map[string][]byte{
		"of crypto/tls":          snitest.Hello(""),
		"of crypto/tls, TLS 1.2": snitest.HelloConfig(&tls.Config{MaxVersion: tls.VersionTLS12}),
		"without extensions":     snitest.ClientHello{}.Build().Stream(),
		"with an empty list":     helloWith(func(*snitest.Message) {}).Stream(),
		"with other extensions":  pad(300).Stream(),
		"with another type":      otherName(func(*snitest.Message) {}).Stream(),
		"in records of 3 bytes":  snitest.Records(pad(30).Bytes, 3),
		"large":                  pad(30_000).Stream(),
	}
}

// Goal: * serves clients whose complete hello has no server name, however the hello is cut, and
// gets all bytes. Without * they are refused, with a line that says why.
func TestNameless(t *testing.T) {
	d := start(t)
	for what, sent := range namelessHellos() {
		got, err := d.exchange(sent)
		if err != nil || alert(got) != int(sni.UnrecognizedName) {
			t.Errorf("%s, without *: got %q, error %v", what, got, err)
		}
	}
	c := d.dial()
	c.Write(snitest.Hello(""))
	io.ReadAll(c)
	d.expectNotice(notice{c.LocalAddr().String(), "", "no server name", sni.UnrecognizedName})

	d.serve("a.example", answering("a.example"))
	d.serve("*.example", answering("*.example"))
	d.serve("*", func(c *net.UnixConn) { io.Copy(c, c) })
	for what, sent := range namelessHellos() {
		whole := append(slices.Clip(sent), "and more"...)
		for _, piece := range []int{len(whole), 1 << 10, 7} {
			if got, err := d.tell(whole, piece, true); err != nil || string(got) != string(whole) {
				t.Errorf("%s, in pieces of %d: got %d bytes back, error %v, want %d", what, piece, len(got), err, len(whole))
			}
		}
	}
}

// Goal: a * that cannot serve gives clients without a name unrecognized_name, with the reason in
// the log, as it does for those with a name.
func TestNamelessDown(t *testing.T) {
	d := start(t, ordinaryUser(t))
	for what, do := range badHosts {
		t.Run(what, func(t *testing.T) {
			d.put("*", do)
			d.expectAlert(snitest.Hello(""), sni.UnrecognizedName)
			hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
		})
	}
	d.put("*", badHosts["no socket"])
	c := d.dial()
	c.Write(snitest.Hello(""))
	got, err := io.ReadAll(c)
	expectRecord(t, got, err, sni.UnrecognizedName)
	d.expectNotice(notice{c.LocalAddr().String(), "", "no tls-socket in the directory", sni.UnrecognizedName})
}

// Goal: nobody serves what cannot be understood, even where there is a * and a wildcard for
// anything: a hello that is malformed, cut or not TLS, before or behind the place of the name, or a
// name that is not canonical. The alerts are the same as without a *.
func TestNotUnderstood(t *testing.T) {
	d, without := start(t), start(t)
	var served atomic.Int64
	for _, name := range []string{"*", "*.example", "*.0.0.1", "*.a"} {
		d.serve(name, func(c *net.UnixConn) {
			served.Add(1)
			answering("served")(c)
		})
	}
	expectRefused := func(what string, sent []byte, end bool) {
		t.Helper()
		want, err := without.tell(sent, len(sent)+1, end)
		if err != nil || alert(want) < 0 {
			t.Fatalf("%s: without * the answer is %x, error %v", what, want, err)
		}
		got, err := d.tell(sent, len(sent)+1, end)
		if err != nil || string(got) != string(want) {
			t.Errorf("%s: got %x, error %v, want %x", what, got, err, want)
		}
	}

	for _, name := range []string{
		"", ".", "..", "a..", "a.example..", "a..example", ".example", "..example", "-a.example", "a.-example", "*", "*.example", "**",
		"a b.example", "a\nb.example", "a/b.example", "../a.example", "a\x00.example", "\x00", "\xff.example", "\xc3\xa9.example",
		"[::1", "::1::", "[::1]:443", "[a.example]", "127.0.0.1:443", "%eth0", "a,b.example", "a%00.example", "a\\b.example",
		strings.Repeat("a", 255), strings.Repeat("a.", 130) + "example", strings.Repeat("a", 60_000),
	} {
		expectRefused(fmt.Sprintf("name %.40q", name), sayHello(name), false)
	}

	// Whatever length is wrong, without a name and up to a name.
	extensions := func() *snitest.Message {
		return helloWith(func(m *snitest.Message) {
			m.Extension(43, make([]byte, 2))
			m.Extension(snitest.Padding, make([]byte, 20))
		})
	}
	for _, length := range []string{"message", "session id", "cipher suites", "compression methods", "extensions", "extension 43", "extension 21"} {
		for _, by := range []int{1, -1, 4, 1 << 16} {
			what := fmt.Sprintf("nameless, length of %s wrong by %d", length, by)
			// One that is too long may only wait for the rest.
			expectRefused(what, wrong(extensions(), by, length).Stream(), true)
		}
	}
	for _, length := range []string{"host name", "server name list", "server name"} {
		for _, by := range []int{1, 1 << 16} {
			expectRefused(fmt.Sprintf("length of %s wrong by %d", length, by), wrong(snitest.Named("a.example"), by, length).Stream(), true)
		}
	}

	// Whatever is cut off, or not there.
	whole := snitest.Hello("")
	for _, n := range []int{0, 1, 5, 6, 60, len(whole) / 2, len(whole) - 1} {
		expectRefused(fmt.Sprintf("nameless, %d bytes of %d", n, len(whole)), whole[:n], true)
	}
	good := extensions().Bytes
	half := len(good) / 2
	for what, sent := range map[string][]byte{
		"plain HTTP":                []byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
		"SSH":                       []byte("SSH-2.0-OpenSSH_9.2\r\n"),
		"a record that is too long": {22, 3, 1, 0x48, 0},
		"another message":           snitest.Record(22, append([]byte{2}, good[1:]...)...),
		"an alert in the middle":    slices.Concat(snitest.Record(22, good[:half]...), snitest.Record(21, 1, 0), snitest.Record(22, good[half:]...)),
		"an empty record":           slices.Concat(snitest.Record(22, good[:half]...), snitest.Record(22), snitest.Record(22, good[half:]...)),
		"the name twice": helloWith(func(m *snitest.Message) {
			m.Extension(0, nil)
			m.Extension(0, nil)
		}).Stream(),
		"an empty server name": helloWith(func(m *snitest.Message) { m.Extension(0, nil) }).Stream(),
	} {
		expectRefused(what, sent, true)
	}
	if n := served.Load(); n > 0 {
		t.Errorf("%d were served", n)
	}

	// An IPv4 address is a canonical name; clients must not send it, and some do.
	d.expectAnswers(map[string]string{"127.0.0.1": "served", "10.20.30.40": "served", "a.example": "served"})
}

// Goal: the clients in use that name no host, since they are told not to or connect to an address,
// reach the site in *.
func TestNamelessClients(t *testing.T) {
	d := start(t)
	ca := newAuthority(t)
	d.serveHTTPS("*", &tls.Config{Certificates: []tls.Certificate{ca.issue(t, "site.example")}})
	for _, tt := range []struct {
		program string
		name    string
		args    []string
	}{
		{"openssl", ", TLS 1.3", []string{"s_client", "-connect", d.addr, "-noservername", "-tls1_3"}},
		{"openssl", ", TLS 1.2", []string{"s_client", "-connect", d.addr, "-noservername", "-tls1_2"}},
		{"curl", ", HTTP/2", []string{"-q", "-sS", "-k", "--noproxy", "*", "--http2", "https://" + d.addr + "/"}},
		{"curl", ", HTTP/1.1", []string{"-q", "-sS", "-k", "--noproxy", "*", "--http1.1", "https://" + d.addr + "/"}},
		{"gnutls-cli", "", []string{"--insecure", "--disable-sni", "--port", d.addr[len("127.0.0.1:"):], "127.0.0.1"}},
	} {
		t.Run(tt.program+tt.name, func(t *testing.T) {
			out, status := execute(t, tt.program, tt.args...)
			if status != 0 || !strings.Contains(out, "host= tls=") {
				t.Errorf("exit status %d; it printed %q", status, out)
			}
		})
	}
	t.Run("crypto/tls", func(t *testing.T) {
		c, err := tls.Dial("tcp", d.addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		if got, err := io.ReadAll(c); err != nil || !strings.Contains(string(got), "host= tls=") {
			t.Errorf("got %q, error %v", got, err)
		}
	})
}

// Users that tests of owners give entries to. The daemon itself runs as 65534.
const (
	hostmaster = 65533
	lodger     = 65532
)

// startOwned starts a daemon, as another user, in a hosts directory that the user owner has.
func startOwned(t *testing.T, owner int, mode os.FileMode) *daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	d := start(t, ordinaryUser(t))
	hostdirtest.Must(t, errors.Join(os.Chown(d.dir, owner, owner), os.Chmod(d.dir, mode)))
	return d
}

// followed tells whether the kernel lets the daemon follow symlinks of a user in its hosts
// directory, for which fs.protected_symlinks may be a reason not to.
func (d *daemon) followed(owner int) bool {
	b, err := os.ReadFile("/proc/sys/fs/protected_symlinks")
	if err != nil || strings.TrimSpace(string(b)) == "0" {
		return true
	}
	st, err := os.Stat(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	mode := st.Mode()
	return mode&os.ModeSticky == 0 || mode.Perm()&0o002 == 0 || owner == 65534 || owner == ownerOf(d.t, d.dir)
}

const notCounted = ", and the wildcard for it belongs neither to root nor to the owner of the hosts directory"

// Goal: whatever the mode of the hosts directory, a wildcard, be it a directory or a symlink,
// counts only if the owner of the hosts directory or root owns it, whoever owns what it leads to.
// Any other is as good as absent, except that the line about a refused client mentions it.
func TestWildcardOwners(t *testing.T) {
	const ignored = "no directory" + notCounted
	for _, hosts := range []struct {
		owner int
		mode  os.FileMode
	}{
		{0, os.ModeSticky | 0o777},
		{0, os.ModeSticky | 0o775},
		{0, 0o755},
		{hostmaster, os.ModeSticky | 0o777},
		{hostmaster, 0o755},
		{hostmaster, 0o775},
		{65534, 0o755},
	} {
		t.Run(fmt.Sprintf("%d %v", hosts.owner, hosts.mode), func(t *testing.T) {
			d := startOwned(t, hosts.owner, hosts.mode)
			elsewhere := hostdirtest.Dir(t)
			for name, owner := range map[string]int{"roots": 0, "tenants": lodger} {
				hostdirtest.Serve(t, hostDir(elsewhere, name), answering("link"))
				hostdirtest.Must(t, os.Chown(hostDir(elsewhere, name), owner, owner))
			}
			refused := func(name, reason string, sent []byte) {
				t.Helper()
				c := d.dial()
				defer c.Close()
				c.Write(sent)
				got, err := io.ReadAll(c)
				expectRecord(t, got, err, sni.UnrecognizedName)
				d.expectNotice(notice{c.LocalAddr().String(), name, reason, sni.UnrecognizedName})
			}

			for _, owner := range []int{0, hostmaster, lodger, 65534} {
				counts := owner == 0 || owner == hosts.owner && owner != 65534 // which stands for unknown users
				for _, target := range []string{"", "roots", "tenants"} {
					if target != "" && counts && !d.followed(owner) {
						continue // see TestWildcardProtectedSymlinks
					}
					word := "link"
					entry := d.hostDir("*.example")
					if target == "" {
						word = "directory"
						d.serve("*.example", answering(word))
					} else if err := os.Symlink(hostDir(elsewhere, target), entry); err != nil {
						t.Fatal(err)
					}
					hostdirtest.Must(t, os.Lchown(entry, owner, owner))
					if counts {
						d.expectAnswers(map[string]string{"a.example": word})
					} else {
						refused("a.example", ignored, sayHello("a.example"))
					}
					// The same as the entry for everything else.
					hostdirtest.Must(t, os.Rename(entry, d.hostDir("*")))
					if counts {
						d.expectAnswers(map[string]string{"a.example": word, "single": word})
						if got, err := d.exchange(snitest.Hello("")); err != nil || string(got) != word {
							t.Errorf("without a name: got %q, error %v, want %q", got, err, word)
						}
					} else {
						refused("single", ignored, sayHello("single"))
						refused("", "no server name, and the directory * belongs neither to root nor to the owner of the hosts directory", snitest.Hello(""))
					}
					hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
				}
			}
		})
	}
}

// Goal: a tenant's wildcards change nothing: names have their directories, whoever made them, and a
// good * serves the rest, whose own failure is the one in the log. The daemon checks the owner of
// the hosts directory for each client.
func TestWildcardIgnored(t *testing.T) {
	d := startOwned(t, 0, os.ModeSticky|0o777)
	give := func(name string, owner int) {
		t.Helper()
		hostdirtest.Must(t, os.Lchown(d.hostDir(name), owner, owner))
	}
	d.serve("a.example", answering("exact"))
	give("a.example", lodger)
	d.serve("*.example", answering("tenant's"))
	give("*.example", lodger)
	d.expectAnswers(map[string]string{"a.example": "exact", "b.example": ""})

	d.serve("*", answering("everything"))
	d.expectAnswers(map[string]string{"a.example": "exact", "b.example": "everything", "a.b.example": "everything"})

	hostdirtest.Must(t, os.Rename(d.hostPath("*", "tls-socket"), d.hostPath("*", "aside")))
	c := d.dial()
	c.Write(sayHello("b.example"))
	got, err := io.ReadAll(c)
	expectRecord(t, got, err, sni.UnrecognizedName)
	d.expectNotice(notice{c.LocalAddr().String(), "b.example", "no tls-socket in the directory", sni.UnrecognizedName})
	hostdirtest.Must(t, os.Rename(d.hostPath("*", "aside"), d.hostPath("*", "tls-socket")))

	// * is ignored as well, and a name without another candidate has nothing to be said of.
	give("*", 65534)
	d.expectAnswers(map[string]string{"a.example": "exact", "b.example": "", "single": ""})
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("*")))
	c = d.dial()
	c.Write(sayHello("a.b.example"))
	got, err = io.ReadAll(c)
	expectRecord(t, got, err, sni.UnrecognizedName)
	d.expectNotice(notice{c.LocalAddr().String(), "a.b.example", "no directory", sni.UnrecognizedName})
	told, _, _ := notices(d.err.String())
	if last := told[len(told)-1]; last.reason != "no directory" {
		t.Errorf("the log has %+v", last)
	}

	// A directory cannot have two owners, but it can change hands.
	for _, owner := range []int{lodger, 0, lodger} {
		hostdirtest.Must(t, os.Chown(d.dir, owner, owner))
		word := "tenant's"
		if owner == 0 {
			word = ""
		}
		d.expectAnswers(map[string]string{"b.example": word})
	}
}

// Goal: where the kernel protects symlinks (fs.protected_symlinks), it follows one in a sticky
// hosts directory that all may write to only for the link's owner, or if the directory's owner owns
// it. So it follows root's only if root owns the directory. Elsewhere it follows all. The engine
// for Linux reads the symlink of a wildcard itself, so there it does not matter.
func TestWildcardProtectedSymlinks(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/fs/protected_symlinks")
	if err != nil || strings.TrimSpace(string(b)) == "0" {
		t.Skip("fs.protected_symlinks is not set")
	}
	for _, tt := range []struct {
		owner, link int // of the hosts directory and of the symlink
		mode        os.FileMode
		refused     bool
	}{
		{0, 0, os.ModeSticky | 0o777, false},
		{hostmaster, hostmaster, os.ModeSticky | 0o777, false},
		{hostmaster, 0, os.ModeSticky | 0o777, true},
		{hostmaster, 0, os.ModeSticky | 0o775, false},
		{hostmaster, 0, 0o777, false},
		{hostmaster, 0, 0o755, false},
	} {
		t.Run(fmt.Sprintf("link of %d in %v of %d", tt.link, tt.mode, tt.owner), func(t *testing.T) {
			d := startOwned(t, tt.owner, tt.mode)
			elsewhere := hostdirtest.Dir(t)
			hostdirtest.Serve(t, hostDir(elsewhere, "target"), answering("served"))
			for _, entry := range []string{"a.example", "*"} {
				hostdirtest.Must(t, os.Symlink(hostDir(elsewhere, "target"), d.hostDir(entry)))
				hostdirtest.Must(t, os.Lchown(d.hostDir(entry), tt.link, tt.link))
				c := d.dial()
				c.Write(sayHello("a.example"))
				got, err := io.ReadAll(c)
				if tt.refused && (entry != "*" || isPortable(t)) {
					expectRecord(t, got, err, sni.UnrecognizedName)
					d.expectNotice(notice{c.LocalAddr().String(), "a.example", "permission denied for uid 65534", sni.UnrecognizedName})
				} else if err != nil || string(got) != "served" {
					t.Errorf("%s: got %q, error %v", entry, got, err)
				}
				hostdirtest.Must(t, os.Remove(d.hostDir(entry)))
			}
		})
	}
}

// Goal: a link from one name to another makes neither a wildcard: symlinks stand for what they lead
// to, under the name of the entry.
func TestWildcardSymlinks(t *testing.T) {
	d := start(t)
	d.serve("one.example", answering("one"))
	for link, target := range map[string]string{"*.one.example": "one.example", "www.two.example": "*.one.example"} {
		hostdirtest.Must(t, os.Symlink(hostDir("", target), d.hostDir(link)))
	}
	d.expectAnswers(map[string]string{
		"one.example": "one", "www.one.example": "one", "www.two.example": "one",
		"two.example": "", "a.two.example": "", "a.www.one.example": "",
	})
}

// ownerOf returns who owns a file; a symlink is not followed.
func ownerOf(t testing.TB, path string) int {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(st.Sys().(*syscall.Stat_t).Uid)
}
