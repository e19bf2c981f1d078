package examples_test

import (
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
)

// readme returns the README of the project.
func readme(t *testing.T) string {
	t.Helper()
	return fileText(t, "../README.md")
}

// sectionOf returns the section with the title of a file in Markdown, down to the next of its
// level.
func sectionOf(t *testing.T, file, title string) string {
	t.Helper()
	_, section, ok := strings.Cut(fileText(t, file), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("%s has no section %q", file, title)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

func readmeSection(t *testing.T, title string) string {
	t.Helper()
	return sectionOf(t, "../README.md", title)
}

// tableRows returns the cells of the table rows in a section that match the pattern.
func tableRows(t *testing.T, section, pattern string) [][]string {
	t.Helper()
	rows := regexp.MustCompile(`(?m)^\| `+pattern+` \|`).FindAllStringSubmatch(section, -1)
	if len(rows) == 0 {
		t.Fatalf("no table row matches %s", pattern)
	}
	return rows
}

// Goal: the README stays short.
func TestReadmeLength(t *testing.T) {
	const most = 400
	if lines := strings.Count(readme(t), "\n"); lines > most {
		t.Errorf("the README has %d lines, more than %d: let manual pages and examples say it", lines, most)
	}
}

// Goal: the links of the README, and of the file about the engine, lead to files that exist.
func TestReadmeLinks(t *testing.T) {
	for _, file := range []string{"../README.md", "../cmd/internal/epoll/README.md"} {
		for _, to := range firsts(t, `\]\(([^)#:]+)(?:#[^)]*)?\)`, fileText(t, file)) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), to)); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}

// Goal: users find each file that is there to be pasted: the README links it, or the files beside
// it name it. Each begins with a comment that says what it is.
func TestReadmeExamples(t *testing.T) {
	for _, dir := range []string{"backends", "container", "forward", "inetd", "s6", "systemd"} {
		texts := map[string]string{}
		err := filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
			if err == nil && !entry.IsDir() {
				texts[file] = fileText(t, file)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		for file, text := range texts {
			named := strings.Contains(readme(t), "(examples/"+file+")")
			for other, text := range texts {
				named = named || other != file && strings.Contains(text, filepath.Base(file))
			}
			if !named {
				t.Errorf("neither the README nor a file in examples/%s names examples/%s", dir, file)
			}
			const number = "s6/notification-fd" // has a number alone
			if file != number && !strings.HasPrefix(text, "#") && !strings.HasPrefix(text, "//") {
				t.Errorf("examples/%s does not begin with a comment", file)
			}
		}
	}
}

// Goal: the code layout names the directory of each package once, and nothing else.
func TestReadmeLayout(t *testing.T) {
	var named []string
	for _, row := range tableRows(t, readmeSection(t, "Code layout"), "`([^`]+)`") {
		named = append(named, row[1])
	}
	packages := map[string]bool{}
	for name := range strings.FieldsSeq(command(t, hostdirtest.Need(t, "go"), "list", "-e", "sniproxy/...")) {
		packages[strings.TrimPrefix(name, "sniproxy/")] = true
	}
	for dir := range packages {
		if !slices.Contains(named, dir) {
			t.Errorf("the code layout does not name %s", dir)
		}
	}
	for i, dir := range named {
		if !packages[dir] {
			t.Errorf("the code layout names %s, which is no package", dir)
		}
		if slices.Contains(named[:i], dir) {
			t.Errorf("the code layout names %s twice", dir)
		}
	}
}

// Goal: each fault in the list of those that the program survives has a test, which exists.
func TestSurvives(t *testing.T) {
	var tests strings.Builder
	err := filepath.WalkDir("../cmd", func(file string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(file, "_test.go") {
			tests.WriteString(fileText(t, file))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	section := sectionOf(t, "../cmd/internal/epoll/README.md", "What it survives")
	rows := tableRows(t, section, "([^|]+) \\| [^|]+ \\| (`Test[A-Za-z]+`[^|]*)")
	if got := strings.Count(section, "\n| ") - 1; got != len(rows) {
		t.Errorf("%d of %d faults have a test", len(rows), got)
	}
	for _, row := range rows {
		for _, name := range firsts(t, "`(Test[A-Za-z]+)`", row[2]) {
			if !strings.Contains(tests.String(), "\nfunc "+name+"(") {
				t.Errorf("%s: there is no %s", row[1], name)
			}
		}
	}
}

// readmeLimits are the constants behind the rows of the README's table of limits.
var readmeLimits = map[string]string{
	"time from accept until the backend is connected":                "Hello",
	"first part of a connection, in which the server name must come": "sni.MaxHello",
	"bytes of a name": "sni.MaxName",
	"silence of one side, after the other has ended, before both are ended": "halfClosed",
	"silence of a client before TCP keepalive probes it":                    "KeepaliveIdle",
	"time for open connections at the stop":                                 "Drain",
	"look-ups under way at once that may wait for a file system":            "Tasks",
	"those of one tenant": "TasksOfTenant",
	"those of one entry":  "TasksOfEntry",
	"part of the descriptors that is kept for new clients": "ReserveParts",
	"but at least": "ReserveLeast",
	"connections of one tenant on their way to backends that they are handed to":  "UnderWay",
	"descriptors that a tenant's backends have passed and that are left to close": "Closing",
}

// Goal: the limits in the README are those of the code.
func TestReadmeLimits(t *testing.T) {
	code := map[string]int64{"sni.maxhello": sni.MaxHello, "sni.maxname": sni.MaxName}
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, "../cmd/internal/limits/limits.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	config := types.Config{Importer: importer.ForCompiler(files, "source", nil)}
	limits, err := config.Check("limits", files, []*ast.File{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range limits.Scope().Names() {
		if c, ok := limits.Scope().Lookup(name).(*types.Const); ok {
			code[strings.ToLower(name)], _ = constant.Int64Val(c.Val())
		}
	}
	rows := tableRows(t, readmeSection(t, "Limits"), "([^|]+) \\| (?:1/)?(\\d+) ?([A-Za-z]*)")
	if len(rows) != len(readmeLimits) {
		t.Errorf("the table has %d limits, and %d are known", len(rows), len(readmeLimits))
	}
	for _, row := range rows {
		unit, ok := map[string]int64{
			"": 1, "KiB": 1 << 10, "MiB": 1 << 20,
			"ms": int64(time.Millisecond), "s": int64(time.Second), "min": int64(time.Minute),
		}[row[3]]
		if !ok {
			t.Errorf("%s: unknown unit %q", row[1], row[3])
		}
		n, err := strconv.ParseInt(row[2], 10, 64)
		if err != nil {
			t.Error(err)
		}
		name := readmeLimits[row[1]]
		if value, ok := code[strings.ToLower(name)]; !ok || value != n*unit {
			t.Errorf("%s: %d in the README, and %s is %d in the code", row[1], n*unit, name, value)
		}
	}
}

// Goal: nothing tells root to make a host's directory with install -d, which follows a symlink that
// a tenant has made under that name, and gives away what it leads to.
func TestNoInstallOfHosts(t *testing.T) {
	files, err := filepath.Glob("../cmd/*/*.[1-8]")
	hostdirtest.Must(t, err)
	files = append(files, "../README.md")
	hostdirtest.Must(t, filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasSuffix(path, "_test.go") {
			files = append(files, path)
		}
		return err
	}))
	wrong := regexp.MustCompile(`install -d .*-[og] .*\.example`)
	for _, file := range files {
		b, err := os.ReadFile(file)
		hostdirtest.Must(t, err)
		if line := wrong.Find(b); line != nil {
			t.Errorf("%s: %s", file, line)
		}
	}
}
