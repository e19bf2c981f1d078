package sni_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: the inputs that the fuzz targets begin with reach every statement of the parser and of the
// rule for names.
func TestFuzzInputsReachAll(t *testing.T) {
	goTool := hostdirtest.Need(t, "go")
	file := filepath.Join(t.TempDir(), "profile")
	out, err := exec.Command(goTool, "test", "-run", "^Fuzz", "-coverprofile", file, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	profile, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"foreign.go", "hello.go", "name.go"} {
		if !strings.Contains(string(profile), "/"+source+":") {
			t.Errorf("nothing of %s is in the profile\n%s", source, profile)
		}
	}
	// A Parser does not use all of alert.go: not Record, not user_canceled, and no description
	// without a name.
	for line := range strings.Lines(string(profile)) {
		if strings.HasSuffix(line, " 0\n") && !strings.Contains(line, "/alert.go:") {
			t.Errorf("not reached: %s", line)
		}
	}
}
