package hostdirtest_test

import (
	"os/exec"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: no program links what is for tests alone.
func TestOnlyTests(t *testing.T) {
	out, err := exec.Command(hostdirtest.Need(t, "go"), "list", "-deps", "sniproxy/cmd/...", "sniproxy/examples/...").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if name := strings.TrimSuffix(line, "\n"); name == "testing" || strings.HasSuffix(name, "test") && strings.HasPrefix(name, "sniproxy/") {
			t.Errorf("programs link %s", name)
		}
	}
}
