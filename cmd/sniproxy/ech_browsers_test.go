package main

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/ech"
)

// Goal: Chromium and Firefox, which learn a key from the DNS, reach hosts without the network
// seeing their names: also across a HelloRetryRequest, and with an old key in the DNS, for which
// the public host, in shared mode, gives them the new one.
func TestECHBrowsers(t *testing.T) {
	t.Parallel()
	for name, browse := range map[string]func(*testing.T, *authority, string, string){"Chromium": chromium, "Firefox": firefox} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := newAuthority(t)
			key, old := newECHKey(t), newECHKey(t)
			d := start(t, echKeys(t, key.MarshalPEM()))
			d.logAll()
			network := d.tap(false)
			_, port, _ := net.SplitHostPort(network.addr)

			// The first page loads the others.
			hosts := []string{"first.hidden.example", "again.hidden.example", "old.hidden.example"}
			page := "<!DOCTYPE html><title>test</title>"
			for _, host := range hosts[1:] {
				page += fmt.Sprintf("<iframe src=https://%s:%s/></iframe>", host, port)
			}
			var mu sync.Mutex
			served := map[string]bool{}
			serve := func(host string, config *tls.Config) {
				config.Certificates = []tls.Certificate{ca.issue(t, host)}
				server := &http.Server{
					Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						mu.Lock()
						served[r.TLS.ServerName+r.URL.Path] = true
						mu.Unlock()
						w.Header().Set("Content-Type", "text/html")
						if r.TLS.ServerName == hosts[0] {
							io.WriteString(w, page)
						}
					}),
					TLSConfig: config,
					ErrorLog:  log.New(io.Discard, "", 0),
				}
				l := d.host(host)
				go server.ServeTLS(l, "", "")
				t.Cleanup(func() { server.Close() })
			}
			serve(hosts[0], &tls.Config{})
			again := &tls.Config{}
			retry(again)
			serve(hosts[1], again)
			serve(hosts[2], &tls.Config{})
			serve(publicName, &tls.Config{EncryptedClientHelloKeys: []tls.EncryptedClientHelloKey{shared(t, key)}})
			dns := serveDNS(t, ca.issue(t, dnsName), map[string]*ech.Key{hosts[0]: key, hosts[1]: key, hosts[2]: old})

			browse(t, ca, dns, "https://"+hosts[0]+":"+port+"/")
			for _, host := range hosts {
				mu.Lock()
				if !served[host+"/"] {
					t.Errorf("%s was not asked", host)
				}
				mu.Unlock()
				d.err.Await(t, " for "+host+": ")
			}
			d.err.Await(t, " for "+publicName+": ") // where the old key led
			network.expectHidden(t)
		})
	}
}

// chromium opens a page, with a DNS server.
func chromium(t *testing.T, ca *authority, dns, url string) {
	browser := hostdirtest.Need(t, "chromium")
	home := hostdirtest.Dir(t)
	nssDatabase(t, filepath.Join(home, ".pki/nssdb"), ca)
	servers := fmt.Sprintf(`{"servers": [{"template": "https://%s/{?dns}", "endpoints": [{"ips": ["127.0.0.1"]}]}]}`, dns)
	state, err := json.Marshal(map[string]any{"dns_over_https": map[string]string{"mode": "secure", "templates": servers}})
	hostdirtest.Must(t, err)
	data := filepath.Join(home, "data")
	hostdirtest.Must(t, os.Mkdir(data, 0o755))
	hostdirtest.Must(t, os.WriteFile(filepath.Join(data, "Local State"), state, 0o644))
	execute(t, "env", "HOME="+home, browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+data, "--dump-dom", url)
}

// firefox opens a page, with a DNS server.
func firefox(t *testing.T, ca *authority, dns, url string) {
	browser := hostdirtest.Need(t, "firefox-esr")
	profile := hostdirtest.Dir(t)
	nssDatabase(t, profile, ca)
	var prefs strings.Builder
	for name, value := range map[string]any{
		"network.trr.mode":                           3, // this DNS server alone
		"network.trr.uri":                            "https://" + dns + "/",
		"network.trr.bootstrapAddr":                  "127.0.0.1",
		"network.trr.allow-rfc1918":                  true,
		"network.trr.confirmationNS":                 "skip",
		"network.dns.port_prefixed_qname_https_rr":   true,
		"network.dns.force_waiting_https_rr":         true,
		"network.captive-portal-service.enabled":     false,
		"network.connectivity-service.enabled":       false,
		"browser.shell.checkDefaultBrowser":          false,
		"datareporting.policy.dataSubmissionEnabled": false,
	} {
		text, err := json.Marshal(value)
		hostdirtest.Must(t, err)
		fmt.Fprintf(&prefs, "user_pref(%q, %s);\n", name, text)
	}
	hostdirtest.Must(t, os.WriteFile(filepath.Join(profile, "user.js"), []byte(prefs.String()), 0o644))
	// It ends when it has the picture.
	execute(t, "env", "HOME="+profile, browser, "--headless", "--no-remote", "--profile", profile,
		"--screenshot", filepath.Join(profile, "page.png"), url)
}

// dnsName is the name of the DNS server.
const dnsName = "dns.example"

// serveDNS starts a DNS server that browsers ask by HTTPS (RFC 8484), and returns its name and
// port. All names below example are of this machine. The keys of hosts are in their HTTPS records:
// RFC 9460 and RFC 9848.
func serveDNS(t testing.TB, cert tls.Certificate, keys map[string]*ech.Key) (addr string) {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			query, err := io.ReadAll(r.Body)
			if r.Method == http.MethodGet {
				query, err = base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
			}
			var m dnsmessage.Message
			if err == nil {
				err = m.Unpack(query)
			}
			if err != nil || len(m.Questions) != 1 {
				http.Error(w, "no query", http.StatusBadRequest)
				return
			}
			const https = 65
			q := m.Questions[0]
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			answer := func(body dnsmessage.ResourceBody) {
				header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 300}
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: body})
			}
			name := strings.TrimSuffix(q.Name.String(), ".")
			_, host, _ := strings.Cut(name, "._https.") // behind _PORT, as the port is another than 443
			switch key := keys[host]; {
			case !strings.HasSuffix(name, ".example"):
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				answer(&dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}})
			case q.Type == https && key != nil:
				answer(&dnsmessage.UnknownResource{Type: https, Data: httpsRecord(host, key.ConfigList())})
			}
			b, err := m.Pack()
			if err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Type", "application/dns-message")
			w.Write(b)
		}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	go server.ServeTLS(l, "", "")
	t.Cleanup(func() { server.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return net.JoinHostPort(dnsName, port)
}

// httpsRecord returns the data of `HTTPS 1 HOST. alpn="h2,http/1.1" ech=LIST`.
func httpsRecord(host string, list []byte) []byte {
	data := []byte{0, 1}
	for label := range strings.SplitSeq(host, ".") {
		data = append(append(data, byte(len(label))), label...)
	}
	data = append(data, 0)
	const alpn, echConfig = 1, 5
	for _, p := range []struct {
		key   uint16
		value string
	}{{alpn, "\x02h2\x08http/1.1"}, {echConfig, string(list)}} {
		data = binary.BigEndian.AppendUint16(data, p.key)
		data = binary.BigEndian.AppendUint16(data, uint16(len(p.value)))
		data = append(data, p.value...)
	}
	return data
}
