package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/acme"

	"sniproxy/hostdir/hostdirtest"
)

// A pebble is an ACME server.
type pebble struct {
	*process
	site     *site
	addr     string
	dir      string
	lifetime time.Duration // of certificates
}

// newPebble starts an ACME server that finds the hosts of a site, which trusts its certificates.
func newPebble(t testing.TB, s *site, lifetime time.Duration) *pebble {
	t.Helper()
	hostdirtest.Pebble(t, programs)
	p := &pebble{site: s, addr: freeAddr(t), dir: t.TempDir(), lifetime: lifetime}
	p.start(t)
	return p
}

func (p *pebble) start(t testing.TB) {
	t.Helper()
	cert, key := p.site.ca.issue(t, time.Hour, "127.0.0.1")
	put(t, filepath.Join(p.dir, certFile), cert)
	put(t, filepath.Join(p.dir, keyFile), key)
	var port int
	fmt.Sscan(portOf(p.site.addr), &port)
	cmd := hostdirtest.PebbleCommand(t, hostdirtest.Pebble(t, programs), p.dir, hostdirtest.NameServer(t, "127.0.0.1"), map[string]any{
		"listenAddress": p.addr, "httpPort": 1, "tlsPort": port, "retryAfter": map[string]int{"authz": 1, "order": 1},
		"profiles": map[string]any{"default": map[string]any{"description": "short", "validityPeriod": int(p.lifetime / time.Second)}},
	})
	cmd.Env = append(cmd.Env, "PEBBLE_WFE_NONCEREJECT=20", "PEBBLE_AUTHZREUSE=0")
	p.process = launch(t, cmd)
	awaitListener(t, "tcp", p.addr)
}

// stop kills the server, with all that it knows.
func (p *pebble) kill(t testing.TB) {
	p.Process.Kill()
	p.wait(t)
}

// orders returns how many certificates the server has been asked for.
func (p *pebble) orders() int { return strings.Count(p.lines.String(), " Added order ") }

// command returns sniproxy-tls with this server.
func (p *pebble) command(t testing.TB, state, host string, names ...string) *exec.Cmd {
	t.Helper()
	cmd := p.site.command(t, host, append([]string{"tcp://" + echo(t)}, names...)...)
	cmd.Env = append(cmd.Env, "ACME_DIRECTORY=https://"+p.addr+"/dir", "STATE_DIRECTORY="+state, "SSL_CERT_FILE="+p.site.caPEM)
	return cmd
}

// serial returns the number of the certificate that a client of the host gets, "" if it gets none.
// It does not verify that: the server's own CA is new at each start.
func (s *site) serial(host string) string {
	config := s.config(host)
	config.InsecureSkipVerify = true
	c, err := s.try(config)
	if err != nil {
		return ""
	}
	defer c.Close()
	leaf := c.ConnectionState().PeerCertificates[0]
	if leaf.VerifyHostname(host) != nil || time.Now().After(leaf.NotAfter) {
		return ""
	}
	return leaf.SerialNumber.String()
}

// Goal: each NAME gets a certificate from a real ACME server, whose validation comes through the
// proxy. The account and the certificates are kept where nobody else can read them. A restart
// orders nothing, and uses the same account.
func TestOrder(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := newPebble(t, s, 24*time.Hour)
	state := filepath.Join(hostdirtest.Dir(t), "state")
	names := []string{"one.example", "www.one.example"}
	hostdirtest.Must(t, os.Symlink(hostdirtest.Entry(names[0]), filepath.Join(s.hosts, hostdirtest.Entry(names[1]))))
	p := launch(t, ca.command(t, state, "one.example", names...))
	if line := p.lines.Await(t, "serving "); line != "serving one.example www.one.example" {
		t.Errorf("%q", line)
	}
	serials := map[string]string{}
	for _, name := range names {
		p.lines.Await(t, "sniproxy-tls: "+name+": new certificate, valid until ")
		serials[name] = s.serial(name)
		if serials[name] == "" {
			t.Errorf("%s has no certificate", name)
		}
	}
	// Who names no host is served as the first.
	hostdirtest.Must(t, os.Symlink(hostdirtest.Entry("one.example"), filepath.Join(s.hosts, hostdirtest.Entry("*"))))
	c := s.dial(t, &tls.Config{InsecureSkipVerify: true})
	if err := c.ConnectionState().PeerCertificates[0].VerifyHostname("one.example"); err != nil {
		t.Error(err)
	}
	for _, path := range []string{state, state + "/" + serverName(ca.addr+"/dir")} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	filepath.WalkDir(state, func(path string, e fs.DirEntry, _ error) error {
		if info, err := e.Info(); err != nil || !e.IsDir() && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
		return nil
	})
	account, err := os.ReadFile(filepath.Join(state, serverName(ca.addr+"/dir"), accountFile))
	hostdirtest.Must(t, err)
	if n := ca.orders(); n != 2 {
		t.Errorf("%d orders", n)
	}
	if status := p.stop(t, os.Interrupt); status != 0 {
		t.Errorf("exit status %d", status)
	}

	p = launch(t, ca.command(t, state, "one.example", names...))
	p.lines.Await(t, "serving ")
	for _, name := range names {
		if got := s.serial(name); got != serials[name] {
			t.Errorf("%s: another certificate after the restart", name)
		}
	}
	// Another host of the same user has the same account. The server has no certificate for the
	// validation, although clients must have one.
	p.stop(t, os.Interrupt)
	put(t, filepath.Join(s.dir(t, "three.example"), clientCAFile), s.ca.pem())
	cmd := ca.command(t, state, "three.example", "three.example")
	cmd.Env = append(cmd.Env, "ACME_EMAIL=admin@three.example")
	p = launch(t, cmd)
	p.lines.Await(t, "three.example: new certificate")
	if line := p.lines.Find("as the address of the account"); line != "" {
		t.Errorf("%q", line)
	}
	if n := ca.orders(); n != 3 {
		t.Errorf("%d orders", n)
	}
	after, err := os.ReadFile(filepath.Join(state, serverName(ca.addr+"/dir"), accountFile))
	if err != nil || string(after) != string(account) || strings.Count(ca.lines.String(), "There are now 1 accounts") != 1 || strings.Contains(ca.lines.String(), "There are now 2 accounts") {
		t.Errorf("another account: %v", err)
	}
}

// Goal: a client that comes while the first order is under way waits for it. The alert for a name
// that is no NAME is unrecognized_name, and nothing is ordered for it.
func TestFirstClient(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := newPebble(t, s, time.Hour)
	hostdirtest.Must(t, os.Symlink(hostdirtest.Entry("one.example"), filepath.Join(s.hosts, hostdirtest.Entry("other.example"))))
	p := launch(t, ca.command(t, t.TempDir(), "one.example", "one.example"))
	p.lines.Await(t, "serving ")
	if s.serial("one.example") == "" {
		t.Error("the first client was refused")
	}
	_, err := s.try(s.config("other.example"))
	if !isAlert(err, "unrecognized name") {
		t.Errorf("another name: %v", err)
	}
	// So is who validates what nobody has ordered.
	config := s.config("one.example")
	config.NextProtos = []string{acme.ALPNProto}
	_, err = s.try(config)
	if !isAlert(err, "unrecognized name") {
		t.Errorf("a validation: %v", err)
	}
	p.lines.Await(t, "a client asked for a host that is not served: to serve other.example, give it as a NAME")
	if n := ca.orders(); n != 1 {
		t.Errorf("%d orders", n)
	}
}

// Goal: certificates that are valid for seconds are renewed, again and again. While the ACME server
// is down the old one is served for as long as it is valid; a line says why, and tries go on with
// growing pauses. A server that comes back without what it knew gets a new account for the same
// key.
func TestRenewal(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	t.Parallel()
	s := newSite(t)
	ca := newPebble(t, s, 15*time.Second)
	p := launch(t, ca.command(t, t.TempDir(), "one.example", "one.example"))
	seen := map[string]bool{}
	hostdirtest.Await(t, "two certificates", func() bool {
		if serial := s.serial("one.example"); serial != "" {
			seen[serial] = true
		} else if len(seen) > 0 {
			t.Fatal("there was a moment without a certificate")
		}
		return len(seen) >= 2
	})
	ca.kill(t)
	line := p.lines.Await(t, "one.example: cannot get a certificate: cannot reach the ACME server: ")
	if !strings.Contains(line, "; the old one is valid until ") || !strings.Contains(line, "; next try in ") {
		t.Errorf("%q", line)
	}
	if s.serial("one.example") == "" {
		t.Error("the old certificate is not served")
	}
	hostdirtest.Await(t, "its end", func() bool { return s.serial("one.example") == "" })
	p.lines.Await(t, "; clients are refused until then")
	_, err := s.try(s.config("one.example"))
	if !isAlert(err, "internal error") {
		t.Errorf("without a certificate: %v", err)
	}
	ca.start(t)
	hostdirtest.Await(t, "a new certificate", func() bool { return s.serial("one.example") != "" })
}

// Goal: if the name does not lead here, a line says what the server found, and what to look at.
// Tries have growing pauses.
func TestNotValidated(t *testing.T) {
	t.Parallel()
	s, other := newSite(t), newSite(t)
	ca := newPebble(t, other, time.Hour) // it looks for hosts behind another proxy
	ca.site = &site{ca: other.ca, caPEM: other.caPEM, hosts: s.hosts, addr: s.addr}
	p := launch(t, ca.command(t, t.TempDir(), "one.example", "one.example"))
	line := p.lines.Await(t, "one.example: cannot get a certificate: the ACME server cannot validate the name: ")
	if !strings.Contains(line, "does the name lead to this machine, and port 443 to sniproxy?") {
		t.Errorf("%q", line)
	}
	hostdirtest.Await(t, "more tries", func() bool { return strings.Count(p.lines.String(), "next try in") >= 3 })
	if s.serial("one.example") != "" {
		t.Error("there is a certificate")
	}
}

// Goal: pauses double up to a limit; they get shorter than that only before a certificate ends; and
// never shorter than what the server asks for.
func TestPauses(t *testing.T) {
	defer func(first, most time.Duration) { pauseFirst, pauseMost = first, most }(pauseFirst, pauseMost)
	pauseFirst, pauseMost = time.Minute, time.Hour
	about := func(got, want time.Duration) bool { return got >= want && got <= want*11/10 }
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		if got := pauseAfter(i+1, nil, errors.New("")); !about(got, want*time.Minute) {
			t.Errorf("after %d failures: %v", i+1, got)
		}
	}
	if got := pauseAfter(1000, nil, errors.New("")); !about(got, time.Hour) {
		t.Errorf("after many: %v", got)
	}
	limited := &acme.Error{StatusCode: 429, ProblemType: "urn:ietf:params:acme:error:rateLimited", Header: http.Header{"Retry-After": {"36000"}}}
	if got := pauseAfter(1, nil, limited); !about(got, 10*time.Hour) {
		t.Errorf("with a limit: %v", got)
	}
}

// Goal: a symlink or a file of certificates that comes later takes the place of the ACME server.
func TestFilesComeLater(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ca := newPebble(t, s, time.Hour)
	p := launch(t, ca.command(t, t.TempDir(), "one.example", "one.example"))
	p.lines.Await(t, "one.example: new certificate")
	s.install(t, "one.example", "one.example")
	hostdirtest.Await(t, "the certificate in the file", func() bool {
		c, err := s.try(s.config("one.example"))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}
