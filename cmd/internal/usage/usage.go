// Package usage has what the programs say about themselves: the usage, with the version.
package usage

import (
	"fmt"
	"runtime/debug"
)

// Asked reports whether the first argument asks for the usage. Then it goes to standard output, and
// the exit status is 0.
func Asked(args []string) bool { return len(args) > 0 && args[0] == "-h" }

// Text returns a usage with the version of the program behind it.
func Text(usage string) string {
	info, _ := debug.ReadBuildInfo()
	return usage + "\nThis is version " + version(info) + ".\n"
}

// version returns the version of the module; without one, as in a build that knows nothing of a
// repository's tags, the commit.
func version(info *debug.BuildInfo) string {
	if info == nil {
		return "unknown"
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		if v = settings["vcs.revision"]; v == "" {
			v = "unknown"
		} else if settings["vcs.modified"] == "true" {
			v += "+dirty"
		}
	}
	return fmt.Sprintf("%s, %s, for %s/%s", v, info.GoVersion, settings["GOOS"], settings["GOARCH"])
}
