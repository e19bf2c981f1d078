package examples_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: under a real systemd the units of the redirect, as they are, send a client of either family
// to HTTPS; a restart loses none; it sees nothing but itself; the stop frees the port and is a
// success.
func TestSystemdRedirect(t *testing.T) {
	if os.Getenv(inside) != "" {
		testRedirectUnits(t)
		return
	}
	t.Parallel()
	curl := hostdirtest.Need(t, "curl")
	units, err := filepath.Abs("systemd")
	hostdirtest.Must(t, err)
	hostdirtest.InSystemd(t, "..", inside+"=1", "-f", build(t, "sniproxy-redirect")+":/usr/bin/sniproxy-redirect",
		"-f", curl+":/usr/bin/curl", units)
}

func testRedirectUnits(t *testing.T) {
	const service = "sniproxy-redirect.service"
	command(t, "systemctl", "start", "sniproxy-redirect.socket")
	follow := func() {
		t.Helper()
		for _, to := range []string{"127.0.0.1", "[::1]"} {
			got := command(t, "curl", "--silent", "--show-error", "--output", os.DevNull, "--write-out", "%{http_code} %header{location}",
				"--connect-to", "::"+to, "http://One.example/a?b")
			if got != "308 https://one.example/a?b" {
				t.Errorf("by %s: %s", to, got)
			}
		}
	}
	follow()
	pid := mainPID(t, service)
	const want = "/run /run/systemd /run/systemd/incoming /usr /usr/bin /usr/bin/sniproxy-redirect"
	if got := visible(t, pid, ""); got != want {
		t.Errorf("the service sees %s, want %s", got, want)
	}
	if got := command(t, "stat", "--format=%U", "/proc/"+property(t, service, "MainPID")); got != "sniproxy-redirect" {
		t.Errorf("the service runs as %s", got)
	}
	for range 5 {
		command(t, "systemctl", "restart", service)
		follow()
	}
	if mainPID(t, service) == pid {
		t.Error("the service was not restarted")
	}
	command(t, "systemctl", "stop", "sniproxy-redirect.socket") // and with it, the service
	checkStopped(t, service)
	if !canListen("[::]:80") {
		t.Error("port 80 is not free after the stop")
	}
	log := command(t, "journalctl", "--no-pager", "--output=cat", "--unit="+service)
	for _, line := range []string{"listening on [::]:80", "got SIGHUP, shutting down"} {
		if !strings.Contains(log, line+"\n") {
			t.Errorf("the journal has no line %q:\n%s", line, log)
		}
	}
}

// Goal: the sandbox of the redirect is that of the proxy.
func TestRedirectSandbox(t *testing.T) {
	sandbox := func(file string) string {
		_, settings, ok := strings.Cut(fileText(t, file), "\nTemporaryFileSystem=")
		if !ok {
			t.Fatalf("%s has no sandbox", file)
		}
		var lines []string
		for line := range strings.Lines(settings) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "BindReadOnlyPaths=") {
				lines = append(lines, line)
			}
		}
		return strings.Join(lines, "")
	}
	if got, want := sandbox("systemd/sniproxy-redirect.service"), sandbox("systemd/sniproxy.service"); got != want {
		t.Errorf("sniproxy-redirect.service has\n%s\nsniproxy.service has\n%s", got, want)
	}
}
