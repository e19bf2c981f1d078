package examples_test

import (
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: for each fault, curl and a browser say what sniproxy(8) has by symptom, and the log what
// stands there beside it.
func TestSymptoms(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("the same without -short")
	}
	curl, chromium := hostdirtest.Need(t, "curl"), hostdirtest.Need(t, "chromium")
	page := strings.Join(strings.Fields(manualSubsection(t, "sniproxy.8", "DIAGNOSTICS", "By symptom")), " ")

	hosts := hostdirtest.Dir(t)
	s := &backendSite{t: t, dir: filepath.Join(hosts, hostdirtest.Entry("one.example"))}
	s.makeCertificate()
	var log hostdirtest.Lines
	s.addr = startProxyLogged(t, hosts, &log)
	host := func(name string) string { return filepath.Join(hosts, hostdirtest.Entry(name)) }
	serveTLS := func(name string, server *http.Server) {
		l := hostdirtest.Listen(t, host(name))
		t.Cleanup(func() { server.Close() })
		go server.ServeTLS(l, s.chain, s.key)
	}
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })
	serveTLS("one.example", &http.Server{Handler: hello})
	serveTLS("other.example", &http.Server{Handler: hello})
	hostdirtest.Serve(t, host("header.example"), func(c *net.UnixConn) { c.Read(make([]byte, 5)) })
	plain := &http.Server{Handler: hello}
	t.Cleanup(func() { plain.Close() })
	go plain.Serve(hostdirtest.Listen(t, host("plain.example")))
	hostdirtest.FillBacklog(t, host("full.example"))

	_, port, _ := net.SplitHostPort(s.addr)
	ask := func(url string, withBrowser bool) (curlSays, browserSays string) {
		name := strings.Split(strings.Split(url, "//")[1], ":")[0]
		out, _ := exec.Command(curl, "-q", "-sS", "--noproxy", "*", "--cacert", s.chain, "--resolve", name+":"+port+":127.0.0.1", url).CombinedOutput()
		if !withBrowser {
			return string(out), ""
		}
		browser := exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir="+hostdirtest.Dir(t),
			"--host-resolver-rules=MAP * 127.0.0.1", "--enable-logging=stderr", "--dump-dom", url)
		browserOut, _ := browser.CombinedOutput()
		return string(out), string(browserOut)
	}
	if got, _ := ask("https://one.example:"+port, false); got != "hello" {
		t.Fatalf("without a fault curl says %q", got)
	}
	for _, symptom := range []struct{ url, curl, browser, log string }{
		{"https://none.example:" + port, "unrecognized name", "ERR_SSL_UNRECOGNIZED_NAME_ALERT", "refused"},
		{"https://header.example:" + port, "Connection reset by peer", "ERR_CONNECTION_RESET", "without an answer"},
		{"https://plain.example:" + port, "wrong version number", "ERR_SSL_PROTOCOL_ERROR", ""},
		{"https://full.example:" + port, "alert internal error", "", "the backlog of tls-socket is full"},
		{"https://other.example:" + port, "no alternative certificate subject name matches", "", ""},
		{"http://one.example:" + port, "Received HTTP/0.9 when not allowed", "ERR_INVALID_HTTP_RESPONSE", "plain HTTP, not TLS"},
		{"https://127.0.0.1:" + freePort(t), "Couldn't connect to server", "ERR_CONNECTION_REFUSED", ""},
	} {
		before := log.String()
		c, b := ask(symptom.url, symptom.browser != "")
		if !strings.Contains(c, symptom.curl) || !strings.Contains(b, symptom.browser) {
			t.Errorf("%s: curl says %q, want %q; the browser says %q, want %q", symptom.url, c, symptom.curl, b, symptom.browser)
		}
		for _, words := range []string{symptom.curl, symptom.browser, symptom.log} {
			if !strings.Contains(page, words) {
				t.Errorf("sniproxy(8) does not have %q by symptom", words)
			}
		}
		if symptom.log != "" {
			hostdirtest.Await(t, "a line with "+symptom.log, func() bool {
				return strings.Contains(strings.TrimPrefix(log.String(), before), symptom.log)
			})
		} else if added := strings.TrimPrefix(log.String(), before); added != "" {
			t.Errorf("%s: the log says %q", symptom.url, added)
		}
	}
}
