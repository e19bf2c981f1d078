package hostdirtest

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// pebbleModule is the ACME server of Let's Encrypt for tests. `.ci/run` fetches it.
const pebbleModule = "github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1"

var pebbleMu sync.Mutex

// Pebble builds the ACME server in a directory, if no test has done so before, and returns its
// path.
func Pebble(t testing.TB, dir string) string {
	t.Helper()
	pebbleMu.Lock()
	defer pebbleMu.Unlock()
	path := filepath.Join(dir, "pebble")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	cmd := exec.Command(Need(t, "go"), "install", pebbleModule)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Logf("go install %s: %v\n%s", pebbleModule, err, out)
		Missing(t, "pebble")
	}
	return path
}

// PebbleCommand returns that server with settings, such as its listenAddress and the ports that it
// validates on. Its own certificate and key are cert.pem and key.pem in dir. It asks a name server
// for addresses.
func PebbleCommand(t testing.TB, pebble, dir, names string, settings map[string]any) *exec.Cmd {
	t.Helper()
	all := map[string]any{"certificate": filepath.Join(dir, "cert.pem"), "privateKey": filepath.Join(dir, "key.pem")}
	maps.Copy(all, settings)
	text, err := json.Marshal(map[string]any{"pebble": all})
	Must(t, err)
	config := filepath.Join(dir, "settings.json")
	Must(t, os.WriteFile(config, text, 0o600))
	cmd := exec.Command(pebble, "-config", config, "-dnsserver", names)
	cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1")
	return cmd
}

// NameServer answers that every name has one address, of IPv4. It does so over TCP, and returns
// where.
func NameServer(t testing.TB, ip string) (addr string) {
	t.Helper()
	l := ListenTCP(t, "tcp4", "127.0.0.1:0")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for answerName(c, ip) == nil {
				}
			}()
		}
	}()
	return l.Addr().String()
}

// answerName answers one question.
func answerName(c net.Conn, ip string) error {
	var length uint16
	if err := binary.Read(c, binary.BigEndian, &length); err != nil {
		return err
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		return err
	}
	m.Response, m.Additionals = true, nil
	for _, q := range m.Questions {
		if q.Type == dnsmessage.TypeA {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
				Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(ip).To4())},
			})
		}
	}
	b, err := m.AppendPack(make([]byte, 2))
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	_, err = c.Write(b)
	return err
}
