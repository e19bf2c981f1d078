package examples_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

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

// manualSection returns the source of a section of sniproxy(8), and manualSubsection that of a
// subsection, down to the next.
func manualSection(t *testing.T, title string) string {
	t.Helper()
	_, section, ok := strings.Cut(fileText(t, "../cmd/sniproxy/sniproxy.8"), "\n.Sh "+title+"\n")
	if !ok {
		t.Fatalf("sniproxy(8) has no section %s", title)
	}
	section, _, _ = strings.Cut(section, "\n.Sh ")
	return section
}

func manualSubsection(t *testing.T, section, title string) string {
	t.Helper()
	_, subsection, ok := strings.Cut(manualSection(t, section), "\n.Ss "+title+"\n")
	if !ok {
		t.Fatalf("in sniproxy(8), %s has no subsection %s", section, title)
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

// Goal: mandoc has nothing to say against a manual page, but for what depends on the machine: which
// manuals of others it has, and its clock.
func TestManualLint(t *testing.T) {
	mandoc := program(t, "mandoc")
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

// Goal: each program has a manual page beside it, of the right section, and each page has what
// readers look for, and refers to the others where they are.
func TestManualPages(t *testing.T) {
	section := func(program string) string {
		if program == "sniproxy" {
			return "8" // System Manager's Manual
		}
		return "1"
	}
	mains, err := filepath.Glob("../cmd/*/main.go")
	if err != nil || len(mains) == 0 {
		t.Fatalf("no programs: %v", err)
	}
	pages := manuals(t)
	for _, file := range mains {
		dir := filepath.Dir(file)
		name := filepath.Base(dir)
		if page := filepath.Join(dir, name+"."+section(name)); !slices.Contains(pages, page) {
			t.Errorf("there is no %s", page)
		}
	}
	reference := regexp.MustCompile(`(?m)^\.Xr (sniproxy\S*) (\S+)`)
	for _, page := range pages {
		name := filepath.Base(filepath.Dir(page))
		text := "\n" + fileText(t, page)
		for _, line := range []string{
			".Dt " + strings.ToUpper(name) + " " + section(name),
			".Nm " + name,
			".Sh NAME", ".Sh SYNOPSIS", ".Sh DESCRIPTION", ".Sh ENVIRONMENT", ".Sh FILES", ".Sh SIGNALS", ".Sh EXIT STATUS",
			".Sh EXAMPLES", ".Sh SEE ALSO", ".Sh SECURITY CONSIDERATIONS",
		} {
			if !strings.Contains(text, "\n"+line+"\n") {
				t.Errorf("%s has no line %q", page, line)
			}
		}
		for _, other := range reference.FindAllStringSubmatch(text, -1) {
			if other[2] != section(other[1]) {
				t.Errorf("%s refers to %s(%s)", page, other[1], other[2])
			}
		}
	}
}

// Goal: sniproxy(8) has the exit statuses that the README has.
func TestManualExitStatus(t *testing.T) {
	row := firsts(t, `(?m)^\| exit status \| (.*) \|$`, readmeSection(t, "Interface"))[0]
	want := firsts(t, `(?:^|; )(\d+) `, row)
	if got := firsts(t, `(?m)^\.It (\d+)$`, manualSection(t, "EXIT STATUS")); !slices.Equal(got, want) {
		t.Errorf("exit statuses %v in sniproxy(8), %v in the README", got, want)
	}
}

// Goal: sniproxy(8) has the alerts that there are, by the names that they have.
func TestManualAlerts(t *testing.T) {
	got := firsts(t, `(?m)^\.It (\d+ Ta [a-z_]+) Ta `, manualSubsection(t, "DESCRIPTION", "Alerts"))
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

// Goal: sniproxy(8) has every file that the README has for a host's directory.
func TestManualFiles(t *testing.T) {
	got := firsts(t, `(?m)^\.It Ar name Ns Pa /(\S+)$`, manualSection(t, "FILES"))
	for _, file := range firsts(t, `(?m)^    NAME/(\S+)  `, readmeSection(t, "Hosts directory")) {
		if !slices.Contains(got, file) {
			t.Errorf("sniproxy(8) does not have NAME/%s", file)
		}
	}
}

// Goal: the reasons for which sniproxy(8) says that a client is refused are words of the program.
func TestManualReasons(t *testing.T) {
	var source strings.Builder
	for _, dir := range []string{"cmd/sniproxy", "hostdir", "sni"} {
		files, err := filepath.Glob("../" + dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if !strings.HasSuffix(file, "_test.go") {
				source.WriteString(fileText(t, file))
			}
		}
	}
	for _, reason := range firsts(t, `(?m)^\.It Sy (.+)$`, manualSubsection(t, "DIAGNOSTICS", "Why a client is refused")) {
		if !strings.Contains(source.String(), `"`+reason) {
			t.Errorf("the program does not say %q", reason)
		}
	}
}
