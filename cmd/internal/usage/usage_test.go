package usage

import (
	"runtime/debug"
	"strings"
	"testing"
)

// Goal: the version is that of the module or, where there is none, the commit, with a mark if that
// was changed; and if nothing is known, that is said.
func TestVersion(t *testing.T) {
	built := func(version string, settings ...debug.BuildSetting) *debug.BuildInfo {
		settings = append(settings, debug.BuildSetting{Key: "GOOS", Value: "linux"}, debug.BuildSetting{Key: "GOARCH", Value: "amd64"})
		return &debug.BuildInfo{GoVersion: "go1.26", Main: debug.Module{Version: version}, Settings: settings}
	}
	commit := debug.BuildSetting{Key: "vcs.revision", Value: "0123abcd"}
	changed := debug.BuildSetting{Key: "vcs.modified", Value: "true"}
	const rest = ", go1.26, for linux/amd64"
	for want, info := range map[string]*debug.BuildInfo{
		"v1.2.3" + rest:         built("v1.2.3", commit),
		"0123abcd" + rest:       built("(devel)", commit),
		"0123abcd+dirty" + rest: built("", commit, changed),
		"unknown" + rest:        built("(devel)"),
		"unknown":               nil,
	} {
		if got := version(info); got != want {
			t.Errorf("version %q, want %q", got, want)
		}
	}
	if got := Text("usage: x\n"); !strings.HasPrefix(got, "usage: x\n\nThis is version ") || !strings.HasSuffix(got, ".\n") {
		t.Errorf("text %q", got)
	}
}

// Goal: -h asks for the usage only as the first argument: behind it are arguments of its own.
func TestAsked(t *testing.T) {
	for args, want := range map[string]bool{"-h": true, "-h x": true, "x -h": false, "--help": false, "": false} {
		if got := Asked(strings.Fields(args)); got != want {
			t.Errorf("%q: %t", args, got)
		}
	}
}
