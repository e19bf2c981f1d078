package examples_test

import (
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/blake2s"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
)

// manuals returns the paths of all manual pages.
func manuals(t *testing.T) []string {
	t.Helper()
	pages, err := filepath.Glob("../cmd/*/*.[1-9]")
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) == 0 {
		t.Fatal("there are no manual pages")
	}
	return pages
}

func fileText(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// manualSection returns the source of a section of a manual page beside sniproxy, and
// manualSubsection that of a subsection, down to the next.
func manualSection(t *testing.T, page, title string) string {
	t.Helper()
	_, section, ok := strings.Cut(fileText(t, "../cmd/sniproxy/"+page), "\n.Sh "+title+"\n")
	if !ok {
		t.Fatalf("%s has no section %s", page, title)
	}
	section, _, _ = strings.Cut(section, "\n.Sh ")
	return section
}

func manualSubsection(t *testing.T, page, section, title string) string {
	t.Helper()
	_, subsection, ok := strings.Cut(manualSection(t, page, section), "\n.Ss "+title+"\n")
	if !ok {
		t.Fatalf("in %s, %s has no subsection %s", page, section, title)
	}
	subsection, _, _ = strings.Cut(subsection, "\n.Ss ")
	return subsection
}

// firsts returns the first group of each match of the pattern, of which there must be one.
func firsts(t *testing.T, pattern, text string) []string {
	t.Helper()
	var found []string
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found = append(found, match[1])
	}
	if len(found) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	return found
}

// Goal: mandoc finds nothing wrong with a manual page, apart from what depends on the machine:
// which other manuals it has, and its clock.
func TestManualLint(t *testing.T) {
	mandoc := hostdirtest.Need(t, "mandoc")
	foreign := regexp.MustCompile(`: STYLE: referenced manual not found: |: date in the future, using it anyway: `)
	for _, page := range manuals(t) {
		out, err := exec.Command(mandoc, "-T", "lint", "-W", "all", page).Output()
		const lastLevel = 4 // of messages on the page; what is higher is said on standard error alone
		exit, ok := errors.AsType[*exec.ExitError](err)
		if err != nil && (!ok || exit.ExitCode() < 0 || exit.ExitCode() > lastLevel) {
			t.Fatalf("mandoc %s: %v", page, err)
		}
		for line := range strings.Lines(string(out)) {
			if !foreign.MatchString(line) {
				t.Error(strings.TrimSpace(line))
			}
		}
	}
}

// Goal: each program has a manual page of the right section, and so have the hosts directory and
// Encrypted Client Hello. Each page has what readers look for, and refers to the others where they
// are.
func TestManualPages(t *testing.T) {
	section := func(name string) string {
		switch name {
		case "sniproxy", "sniproxy-redirect":
			return "8" // System Manager's Manual
		}
		return "1"
	}
	mains, err := filepath.Glob("../cmd/*/main.go")
	if err != nil || len(mains) == 0 {
		t.Fatalf("no programs: %v", err)
	}
	// File Formats Manual, and Miscellaneous Information Manual.
	want := []string{"../cmd/sniproxy/sniproxy-hosts.5", "../cmd/sniproxy-ech/sniproxy-ech.7"}
	for _, file := range mains {
		dir := filepath.Dir(file)
		name := filepath.Base(dir)
		want = append(want, filepath.Join(dir, name+"."+section(name)))
	}
	pages := manuals(t)
	slices.Sort(pages)
	slices.Sort(want)
	if !slices.Equal(pages, want) {
		t.Errorf("manual pages %v, want %v", pages, want)
	}
	reference := regexp.MustCompile(`(?m)^\.Xr (sniproxy\S*) (\S+)`)
	var there []string
	for _, page := range pages {
		there = append(there, filepath.Base(page))
	}
	for _, page := range pages {
		name, number, _ := strings.Cut(filepath.Base(page), ".")
		text := "\n" + fileText(t, page)
		lines := []string{
			".Dt " + strings.ToUpper(name) + " " + number,
			".Nm " + name,
			".Sh NAME", ".Sh DESCRIPTION", ".Sh FILES", ".Sh EXAMPLES", ".Sh SEE ALSO", ".Sh SECURITY CONSIDERATIONS",
		}
		if number != "5" && number != "7" {
			lines = append(lines, ".Sh SYNOPSIS", ".Sh ENVIRONMENT", ".Sh SIGNALS", ".Sh EXIT STATUS")
		}
		for _, line := range lines {
			if !strings.Contains(text, "\n"+line+"\n") {
				t.Errorf("%s has no line %q", page, line)
			}
		}
		for _, other := range reference.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(there, other[1]+"."+other[2]) {
				t.Errorf("%s refers to %s(%s)", page, other[1], other[2])
			}
		}
	}
}

// Goal: sniproxy(8) has the alerts that exist, by their names.
func TestManualAlerts(t *testing.T) {
	got := firsts(t, `(?m)^\.It (\d+ Ta [a-z_]+) Ta `, manualSubsection(t, "sniproxy.8", "DESCRIPTION", "Alerts"))
	var want []string
	for i := range 256 {
		if name := sni.Description(i).String(); !strings.HasPrefix(name, "description ") {
			want = append(want, strconv.Itoa(i)+" Ta "+name)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("alerts %v in sniproxy(8), %v in package sni", got, want)
	}
}

// Goal: sniproxy-hosts(5) has the same files for a host's directory as the README.
func TestManualFiles(t *testing.T) {
	got := firsts(t, `(?m)^\.It Ar name Ns Pa /(\S+)$`, manualSection(t, "sniproxy-hosts.5", "DESCRIPTION"))
	want := firsts(t, `(?m)^    NAME/(\S+)  `, readmeSection(t, "Add a host"))
	if !slices.Equal(got, want) {
		t.Errorf("sniproxy-hosts(5) has the files %v, the README %v", got, want)
	}
}

// Goal: the hash in sniproxy-hosts(5) is the right one.
func TestManualHash(t *testing.T) {
	sum := blake2s.Sum256([]byte("one.example"))
	hash := base64.RawURLEncoding.EncodeToString(sum[:])
	if !strings.Contains(manualSection(t, "sniproxy-hosts.5", "EXAMPLES"), "$ sniproxy-hostname one.example\n"+hash+"\n") {
		t.Errorf("sniproxy-hosts(5) does not have the hash of one.example, %s", hash)
	}
}

// Goal: the reasons for refusing a client in sniproxy(8) are words of the program.
func TestManualReasons(t *testing.T) {
	var source strings.Builder
	err := filepath.WalkDir("..", func(file string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(file, ".go") && !strings.HasSuffix(file, "_test.go") {
			source.WriteString(fileText(t, file))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, reason := range firsts(t, `(?m)^\.It Sy (.+)$`, manualSubsection(t, "sniproxy.8", "DIAGNOSTICS", "Why a client is refused")) {
		if !strings.Contains(source.String(), `"`+reason) {
			t.Errorf("the program does not say %q", reason)
		}
	}
}
