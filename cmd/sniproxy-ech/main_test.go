package main

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/ech"
)

// With this in its environment, the test binary is sniproxy-ech.
const runMain = "SNIPROXY_ECH_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
	}
	os.Exit(m.Run())
}

// runProgram runs sniproxy-ech to its end.
func runProgram(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return hostdirtest.Run(t, hostdirtest.Command(t, runMain+"=1", args...))
}

// makeKey makes a key, and returns its file and the value of ech= in the record.
func makeKey(t *testing.T, publicName string) (file []byte, list []byte) {
	t.Helper()
	stdout, stderr, status := runProgram(t, publicName)
	if status != 0 {
		t.Fatalf("exit status %d, stderr %q", status, stderr)
	}
	comment, line, _ := strings.Cut(stderr, "\n")
	encoded, ok := strings.CutPrefix(line, `NAME. 300 IN HTTPS 1 . alpn="h2,http/1.1" ech=`)
	list, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(encoded, "\n"))
	if !ok || err != nil || !strings.HasPrefix(comment, "; ") || strings.Count(stderr, "\n") != 2 {
		t.Fatalf("stderr %q, error %v; want a comment and the record", stderr, err)
	}
	return []byte(stdout), list
}

// Goal: the daemon reads the key file, the record is that of the key, and each key is new.
func TestKey(t *testing.T) {
	file, list := makeKey(t, "Öffentlich.example.")
	key, err := ech.ParseKey(file)
	hostdirtest.Must(t, err)
	if got, want := key.PublicName(), "xn--ffentlich-z7a.example"; got != want {
		t.Errorf("public name %q, want %q", got, want)
	}
	if !bytes.Equal(key.ConfigList(), list) {
		t.Errorf("the record has %x, the key file %x", list, key.ConfigList())
	}
	if other, _ := makeKey(t, "public.example"); bytes.Equal(other[:100], file[:100]) {
		t.Error("two keys are the same")
	}
}

// Goal: with the private key of the file a server of crypto/tls accepts a client that has the
// record.
func TestHandshake(t *testing.T) {
	file, list := makeKey(t, "public.example")
	block, _ := pem.Decode(file)
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	hostdirtest.Must(t, err)
	secret, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	hostdirtest.Must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"hidden.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, secret.Public(), secret)
	hostdirtest.Must(t, err)
	roots := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	hostdirtest.Must(t, err)
	roots.AddCert(cert)

	ours, theirs := net.Pipe()
	defer ours.Close()
	go tls.Server(theirs, &tls.Config{
		Certificates:             []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: secret}},
		EncryptedClientHelloKeys: []tls.EncryptedClientHelloKey{{Config: list[2:], PrivateKey: private.(*ecdh.PrivateKey).Bytes()}},
	}).Handshake()
	client := tls.Client(ours, &tls.Config{ServerName: "hidden.example", RootCAs: roots, EncryptedClientHelloConfigList: list})
	if err := client.Handshake(); err != nil || !client.ConnectionState().ECHAccepted {
		t.Errorf("error %v, accepted: %t", err, client.ConnectionState().ECHAccepted)
	}
}

// Goal: OpenSSL reads the private key: the file is in the form that others use.
func TestOpenSSL(t *testing.T) {
	openssl := hostdirtest.Need(t, "openssl")
	file, list := makeKey(t, "public.example")
	cmd := exec.Command(openssl, "pkey", "-noout", "-text_pub")
	cmd.Stdin = bytes.NewReader(file)
	out, messages, status := hostdirtest.Run(t, cmd)
	hexadecimal := strings.Join(strings.Fields(strings.ReplaceAll(out, ":", "")), "")
	public := list[11:43] // behind the lengths, the version, the config id and the KEM
	if status != 0 || !strings.Contains(out, "X25519") || !strings.HasSuffix(hexadecimal, hexOf(public)) {
		t.Errorf("exit status %d, stderr %q, stdout %q, want the public key %x", status, messages, out, public)
	}
}

// Goal: the command in the manual page gets the record's value of ech= from a key file.
func TestManualCommand(t *testing.T) {
	file, list := makeKey(t, "public.example")
	page, err := os.ReadFile("sniproxy-ech.1")
	hostdirtest.Must(t, err)
	_, rest, _ := strings.Cut(string(page), "\n$ sed ")
	command, _, _ := strings.Cut("sed "+rest, "\n")
	cmd := exec.Command("sh", "-c", strings.ReplaceAll(command, `\e`, `\`))
	cmd.Dir = t.TempDir()
	hostdirtest.Must(t, os.WriteFile(filepath.Join(cmd.Dir, "key.pem"), file, 0o600))
	if out, messages, _ := hostdirtest.Run(t, cmd); out != base64.StdEncoding.EncodeToString(list) {
		t.Errorf("%s prints %q, %q", cmd, out, messages)
	}
}

func hexOf(b []byte) string { return new(big.Int).SetBytes(append([]byte{1}, b...)).Text(16)[1:] }

// Goal: what clients would not take for a public name is refused: exit status 1, no key, and one
// line with the reason.
func TestRefused(t *testing.T) {
	for name, reason := range map[string]string{
		"":              "empty",
		"localhost":     "no dot",
		"*.example":     "wildcard",
		"*":             "wildcard",
		"a_b.example":   "a_b",
		"a-.example":    "a-",
		"192.0.2.1":     "number",
		"a.0x1f":        "number",
		"a..example":    "empty label",
		"https://a.org": "URL",
	} {
		stdout, stderr, status := runProgram(t, name)
		if stdout != "" || status != 1 || !strings.HasPrefix(stderr, "sniproxy-ech: ") || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, reason) {
			t.Errorf("%q: exit status %d, stdout %q, stderr %q; want a line with %q", name, status, stdout, stderr, reason)
		}
	}
}

// Goal: with no name, or several, there is the usage on stderr and exit status 2. With -h it is on
// stdout, and the exit status is 0. It has the version.
func TestUsage(t *testing.T) {
	asked, messages, status := runProgram(t, "-h")
	if messages != "" || status != 0 || !strings.HasPrefix(asked, "usage: sniproxy-ech PUBLIC-NAME") || !strings.Contains(asked, "\nThis is version ") {
		t.Errorf("-h: stdout %q, stderr %q, exit status %d; want the usage and 0", asked, messages, status)
	}
	for _, args := range [][]string{nil, {"a.example", "b.example"}} {
		if stdout, stderr, status := runProgram(t, args...); stdout != "" || status != 2 || stderr != asked {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d; want the usage and 2", args, stdout, stderr, status)
		}
	}
}

// Goal: if the key cannot be written there is no record either, which would stand for nothing; and
// the exit status is 1.
func TestOutputLost(t *testing.T) {
	r, w, err := os.Pipe()
	hostdirtest.Must(t, err)
	r.Close()
	defer w.Close()
	cmd := hostdirtest.Command(t, runMain+"=1", "public.example")
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = w, &stderr
	cmd.Run()
	if status := cmd.ProcessState.ExitCode(); status != 1 || !strings.HasPrefix(stderr.String(), "sniproxy-ech: write ") || strings.Count(stderr.String(), "\n") != 1 {
		t.Errorf("exit status %d, stderr %q; want 1 and one line about the write", status, stderr.String())
	}
}

// Goal: with the commands in the manual page for administrators sniproxy gets a key that it can
// read, and that nobody else can: sniproxy-check has nothing to say about it.
func TestManualRecipe(t *testing.T) {
	hostdirtest.NeedRoot(t)
	page, err := os.ReadFile("sniproxy-ech.7")
	hostdirtest.Must(t, err)
	_, section, _ := strings.Cut(string(page), "\n.Sh EXAMPLES\n")
	_, section, _ = strings.Cut(section, "\n.Bd -literal -offset indent\n")
	recipe, _, _ := strings.Cut(section, "\n.Ed\n")
	const group = "65534"
	recipe = strings.NewReplacer("\n# ", "\n", "chgrp sniproxy", "chgrp "+group).Replace("\n" + recipe)

	programs, hosts := hostdirtest.Dir(t), hostdirtest.Dir(t)
	hostdirtest.Program(t, programs, "sniproxy-ech")
	check := hostdirtest.Program(t, programs, "sniproxy-check")
	// The hosts directory of the README: its group may make hosts.
	hostdirtest.Must(t, os.Chmod(hosts, 0o775|os.ModeSticky))
	cmd := exec.Command("sh", "-e", "-c", "umask 022\n"+recipe)
	cmd.Dir = hosts
	cmd.Env = append(os.Environ(), "PATH="+programs+":"+os.Getenv("PATH"))
	if out, messages, status := hostdirtest.Run(t, cmd); status != 0 || out != "" || !strings.Contains(messages, " ech=") {
		t.Fatalf("%s: exit status %d, stdout %q, stderr %q", recipe, status, out, messages)
	}
	keys, err := filepath.Glob(filepath.Join(hosts, ".ech/*"))
	if err != nil || len(keys) != 1 {
		t.Errorf("there are %q, error %v; want one file", keys, err)
	}
	want := "sniproxy-check: there are no hosts in " + hosts + "\n"
	if out, messages, status := hostdirtest.Run(t, exec.Command(check, "-u", "65534:"+group, hosts)); status != 0 || out != "" || messages != want {
		t.Errorf("sniproxy-check: exit status %d, stdout %q, stderr %q, want %q", status, out, messages, want)
	}
}
