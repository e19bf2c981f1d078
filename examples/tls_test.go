package examples_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: under a real systemd the units for sniproxy-tls serve hosts, of the administrator and of a
// user.
func TestSystemdTLS(t *testing.T) {
	if os.Getenv(inside) != "" {
		t.Run("system", testUnitsTLS)
		t.Run("user", testUnitsUserTLS)
		return
	}
	t.Parallel()
	hostdirtest.InSystemd(t, "..", inside+"=1", installed(t)...)
}

// installCertificate makes a certificate of its own for a host, in cert.pem and key.pem in its
// directory, which become its owner's. It returns what a client must trust.
func installCertificate(t *testing.T, dir, name string) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(certificatePEM(t, dir, name)) {
		t.Fatal("there is no certificate")
	}
	return pool
}

// certificatePEM makes a certificate that signs itself, in cert.pem and key.pem in a directory,
// whose owner they get. It returns the certificate.
func certificatePEM(t *testing.T, dir, name string) []byte {
	t.Helper()
	cert := certificate(t, name)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	hostdirtest.Must(t, err)
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	var owner syscall.Stat_t
	hostdirtest.Must(t, syscall.Stat(dir, &owner))
	for file, text := range map[string][]byte{"cert.pem": chain, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
		path := filepath.Join(dir, file)
		hostdirtest.Must(t, os.WriteFile(path, text, 0o600))
		hostdirtest.Must(t, os.Chown(path, int(owner.Uid), int(owner.Gid)))
	}
	return chain
}

// startService starts a plain HTTP service that tells which client it has, and returns its address.
func startService(t *testing.T) string {
	t.Helper()
	return startServiceOn(t, "127.0.0.1:0")
}

func startServiceOn(t *testing.T, addr string) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	hostdirtest.Must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Host, " for ", r.Header.Get("X-Forwarded-For"))
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return l.Addr().String()
}

// getHTTPS returns the page of a host behind the proxy at an address.
func getHTTPS(addr, name string, roots *x509.CertPool) (string, error) {
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		},
	}
	answer, err := (&http.Client{Transport: transport, Timeout: hostdirtest.Patience}).Get("https://" + name + "/")
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return string(text), err
}

// awaitPage waits until a host is served.
func awaitPage(t *testing.T, name string, roots *x509.CertPool) {
	t.Helper()
	var text string
	var err error
	want := name + " for 127.0.0.1"
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		text, err = getHTTPS(unitAddr, name, roots)
		return text == want
	}) {
		t.Fatalf("%q, %v", text, err)
	}
}

// uidOf returns the user of a process.
func uidOf(t *testing.T, pid int) string {
	t.Helper()
	var stat syscall.Stat_t
	hostdirtest.Must(t, syscall.Stat(fmt.Sprintf("/proc/%d", pid), &stat))
	return strconv.Itoa(int(stat.Uid))
}

// environment returns a variable in the environment of a process.
func environment(t *testing.T, pid int, name string) string {
	t.Helper()
	for setting := range strings.SplitSeq(fileText(t, fmt.Sprintf("/proc/%d/environ", pid)), "\x00") {
		if value, ok := strings.CutPrefix(setting, name+"="); ok {
			return value
		}
	}
	return ""
}

// expectRestarts restarts what serves a host, again and again, while clients come. None may be
// lost.
func expectRestarts(t *testing.T, name string, roots *x509.CertPool, restart func()) {
	t.Helper()
	pages := startLoadOf(t, func() error {
		text, err := getHTTPS(unitAddr, name, roots)
		if err == nil && text != name+" for 127.0.0.1" {
			err = fmt.Errorf("the page is %q", text)
		}
		return err
	})
	for range 5 {
		pages.more(50)
		restart()
	}
	pages.more(50)
	pages.end()
}

// Goal: sniproxy-tls@.service, installed as its comment says, serves a host with HTTPS as a user of
// its own, loses no client at restarts, keeps what an ACME server knows it by, and stops as a
// success.
func testUnitsTLS(t *testing.T) {
	const name, unit = "tls.example", "sniproxy-tls@tls.example.service"
	startUnits(t)
	dir := "/srv/sniproxy/" + name
	command(t, "mkdir", "-p", "/etc/sniproxy-tls")
	command(t, "mkdir", "-m", "0711", dir)
	hostdirtest.Must(t, os.WriteFile("/etc/sniproxy-tls/"+name, []byte("BACKEND=http://"+startService(t)+"\n"), 0o644))
	roots := installCertificate(t, dir, name)
	command(t, "chown", "sniproxy-tls", dir+"/cert.pem", dir+"/key.pem")
	command(t, "systemctl", "enable", "--now", unit)
	t.Cleanup(func() {
		command(t, "systemctl", "stop", "sniproxy-tls@*.service")
		os.RemoveAll(dir)
	})
	awaitPage(t, name, roots)
	if got := command(t, "stat", "-c", "%U %G %a", dir+"/tls-socket"); got != "root sniproxy 660" {
		t.Errorf("the socket is %s", got)
	}
	// The program's own limit is below the kernel's.
	var limit, most int64
	if _, err := fmt.Sscanf(environment(t, mainPID(t, unit), "GOMEMLIMIT"), "%dMiB", &limit); err != nil {
		t.Errorf("GOMEMLIMIT: %v", err)
	}
	fmt.Sscan(property(t, unit, "MemoryMax"), &most)
	if limit <= 0 || limit<<20 >= most {
		t.Errorf("GOMEMLIMIT is %d MiB, and MemoryMax %d bytes", limit, most)
	}
	account, err := user.Lookup("sniproxy-tls")
	hostdirtest.Must(t, err)
	if got := uidOf(t, mainPID(t, unit)); got != account.Uid {
		t.Errorf("it runs as user %s, want %s", got, account.Uid)
	}
	expectRestarts(t, name, roots, func() {
		before := mainPID(t, unit)
		command(t, "systemctl", "restart", unit)
		if after := mainPID(t, unit); after == before {
			t.Errorf("process %d serves after the restart", before)
		}
	})
	command(t, "systemctl", "stop", unit)
	checkStopped(t, unit)
	awaitProperty(t, strings.TrimSuffix(unit, ".service")+".socket", "ActiveState", "inactive") // stopped as well, a moment later
	expectRefused(t, unitAddr, snitest.Hello(name))
	if _, err := os.Lstat(dir + "/tls-socket"); err == nil {
		t.Error("the socket is there after the stop")
	}

	// Without a certificate it wants one of an ACME server, of which there is none here.
	for _, file := range []string{"cert.pem", "key.pem"} {
		hostdirtest.Must(t, os.Remove(filepath.Join(dir, file)))
	}
	hostdirtest.Must(t, os.WriteFile("/etc/sniproxy-tls/"+name, []byte("BACKEND=tcp://127.0.0.1:1\nNAMES=www.tls.example more.tls.example\nACME_DIRECTORY=https://127.0.0.1:1/dir\n"), 0o644))
	command(t, "systemctl", "start", unit)
	for _, line := range []string{"serving tls.example www.tls.example more.tls.example", "www.tls.example: cannot get a certificate: cannot reach the ACME server: "} {
		hostdirtest.Await(t, line+" in the journal", func() bool {
			out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "--unit="+unit).Output()
			return err == nil && strings.Contains(string(out), line)
		})
	}
	if _, err := os.Stat("/var/lib/sniproxy-tls/127.0.0.1_1_dir/account.key"); err != nil {
		t.Error(err)
	}
}

// Goal: with user/sniproxy-tls@.service a user serves a host of his own without an administrator;
// it is served without a login, as after a start of the machine.
func testUnitsUserTLS(t *testing.T) {
	const name, alice = "alice.example", "alice"
	startUnits(t)
	command(t, "useradd", "--create-home", alice)
	account, err := user.Lookup(alice)
	hostdirtest.Must(t, err)
	// as runs a command line as alice, who is not logged in.
	as := func(line string) string {
		t.Helper()
		return command(t, "setpriv", "--reuid="+alice, "--regid="+alice, "--init-groups", "--reset-env", "env", "-C", account.HomeDir,
			"XDG_RUNTIME_DIR=/run/user/"+account.Uid, "sh", "-euc", line)
	}
	dir := "/srv/sniproxy/" + name
	command(t, "usermod", "-aG", "sniproxy-hosts", alice)
	as("mkdir -m 0711 " + dir)
	roots := installCertificate(t, dir, name)
	// Her manager runs from here on, whether she is there or not.
	as("loginctl enable-linger \"$(id -un)\"")
	manager := "user@" + account.Uid + ".service"
	t.Cleanup(func() {
		command(t, "loginctl", "disable-linger", alice)
		command(t, "systemctl", "stop", manager)
		os.RemoveAll(dir)
	})
	awaitProperty(t, manager, "ActiveState", "active")
	as("mkdir -p ~/.config/systemd/user ~/.config/sniproxy-tls && cp " + userUnits + "* ~/.config/systemd/user/ && echo BACKEND=http://" + startService(t) + " >~/.config/sniproxy-tls/" + name)
	as("systemctl --user daemon-reload && systemctl --user enable --now sniproxy-tls@" + name)
	awaitPage(t, name, roots)
	pid := as("systemctl --user show --value --property=MainPID sniproxy-tls@" + name)
	n, err := strconv.Atoi(pid)
	hostdirtest.Must(t, err)
	if got := uidOf(t, n); got != account.Uid {
		t.Errorf("it runs as user %s, want %s", got, account.Uid)
	}

	expectRestarts(t, name, roots, func() { as("systemctl --user restart sniproxy-tls@" + name) })

	// The machine starts: nobody has logged in, and her manager starts with it.
	command(t, "systemctl", "stop", manager)
	if text, err := getHTTPS(unitAddr, name, roots); err == nil {
		t.Errorf("the host is served while nothing runs: %q", text)
	}
	command(t, "systemctl", "start", manager)
	awaitPage(t, name, roots)
	if _, err := os.Stat("/var/lib/systemd/linger/" + alice); err != nil {
		t.Error(err)
	}
}
