package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: the package comment lists exactly the packages that the program is made of, and each
// imports only those below it.
func TestPackages(t *testing.T) {
	text, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "// # Packages\n")
	section, _, _ = strings.Cut(section, "\npackage main\n")
	var rooms []string
	for _, m := range regexp.MustCompile(`(?m)^//\t(\S+)`).FindAllStringSubmatch(section, -1) {
		rooms = append(rooms, "sniproxy/"+m[1])
	}
	found := make(map[string]bool)
	for _, tags := range []string{"", "portable", "hashed"} {
		list := exec.Command(hostdirtest.Need(t, "go"), "list", "-deps", "-tags", tags, "-f", "{{.ImportPath}} {{join .Imports \" \"}}", ".")
		out, err := list.Output()
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if !strings.HasPrefix(f[0], "sniproxy/") {
				continue
			}
			found[f[0]] = true
			room := slices.Index(rooms, f[0])
			if room < 0 {
				t.Errorf("%s is not in the list", f[0])
				continue
			}
			for _, imported := range f[1:] {
				if strings.HasPrefix(imported, "sniproxy/") && !slices.Contains(rooms[room+1:], imported) {
					t.Errorf("%s imports %s, which is not below it", f[0], imported)
				}
			}
		}
	}
	for _, room := range rooms {
		if !found[room] {
			t.Errorf("%s is no part of the program", room)
		}
	}
}
