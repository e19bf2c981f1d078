package examples_test

import (
	"encoding/base64"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/blake2s"

	"sniproxy/sni"
)

// readme returns the README of the project.
func readme(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// readmeSection returns the section of the README with the title, down to the next of its level.
func readmeSection(t *testing.T, title string) string {
	t.Helper()
	_, section, ok := strings.Cut(readme(t), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("the README has no section %q", title)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
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

// Goal: what the README quotes of the examples is what they are, byte for byte.
func TestReadmeQuotes(t *testing.T) {
	quotes := regexp.MustCompile("(?ms)^`examples/([^`\n]+)`:\n\n?(?:```[a-z]*\n(.*?)^```$)?").FindAllStringSubmatch(readme(t), -1)
	if len(quotes) == 0 {
		t.Fatal("the README quotes nothing")
	}
	for _, quote := range quotes {
		file, text := quote[1], quote[2]
		want, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		} else if text != string(want) {
			t.Errorf("the README does not quote %s as it is", file)
		}
	}
}

// Goal: no file for a supervisor is forgotten where the README says what to do with them.
func TestReadmeSupervisors(t *testing.T) {
	section := readmeSection(t, "Supervisors")
	for _, dir := range []string{"systemd", "inetd", "s6"} {
		err := filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			if !strings.Contains(section, "examples/"+file) {
				t.Errorf("the README does not mention examples/%s", file)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// Goal: the code layout names each file of the project once, other than tests, and no file that is
// not there.
func TestReadmeLayout(t *testing.T) {
	var named []string
	for _, row := range tableRows(t, readmeSection(t, "Code layout"), "`([^`]+)`") {
		named = append(named, row[1])
	}
	ignored, err := os.ReadFile("../.gitignore")
	if err != nil {
		t.Fatal(err)
	}
	isIgnored := func(file string) bool {
		for pattern := range strings.FieldsSeq(string(ignored)) {
			name := path.Base(file)
			if strings.HasPrefix(pattern, "/") {
				name = "/" + file
			}
			if ok, err := path.Match(pattern, name); ok || err != nil {
				return true
			}
		}
		return false
	}
	var files []string
	err = fs.WalkDir(os.DirFS(".."), ".", func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case file == ".git" || entry.IsDir() && entry.Name() == "testdata":
			if entry.IsDir() {
				return fs.SkipDir
			}
		case !entry.IsDir() && !strings.HasSuffix(file, "_test.go") && !isIgnored(file):
			files = append(files, file)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !slices.Contains(named, file) {
			t.Errorf("the code layout does not name %s", file)
		}
	}
	for i, file := range named {
		if !slices.Contains(files, file) {
			t.Errorf("the code layout names %s, which is not there", file)
		}
		if slices.Contains(named[:i], file) {
			t.Errorf("the code layout names %s twice", file)
		}
	}
}

// Goal: each fault that the README says is survived has a test that there is.
func TestReadmeSurvives(t *testing.T) {
	files, err := filepath.Glob("../cmd/sniproxy/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(b)
	}
	section := readmeSection(t, "What it survives")
	rows := tableRows(t, section, "([^|]+) \\| [^|]+ \\| `(Test[A-Za-z]+)`[^|]*")
	if got := strings.Count(section, "\n| ") - 1; got != len(rows) {
		t.Errorf("%d of %d faults have a test", len(rows), got)
	}
	for _, row := range rows {
		if !strings.Contains(tests.String(), "\nfunc "+row[2]+"(") {
			t.Errorf("%s: there is no %s", row[1], row[2])
		}
	}
}

// Goal: the table of alerts has the alerts that there are, by the names that they have.
func TestReadmeAlerts(t *testing.T) {
	got := map[string]string{}
	for _, row := range tableRows(t, readmeSection(t, "Interface"), `(\d+) \| ([a-z_]+)`) {
		got[row[1]] = row[2]
	}
	for i := range 256 {
		number, name := strconv.Itoa(i), sni.Description(i).String()
		if strings.HasPrefix(name, "description ") {
			name = ""
		}
		if got[number] != name {
			t.Errorf("alert %d is %q in the table, and %q in package sni", i, got[number], name)
		}
	}
}

// Goal: the table of limits has all constants of limits.go, and its values are theirs.
func TestReadmeLimits(t *testing.T) {
	want := map[string]int64{"sni.MaxHello": sni.MaxHello, "sni.MaxName": sni.MaxName}
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, "../cmd/sniproxy/limits.go", nil, 0)
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
			want[name], _ = constant.Int64Val(c.Val())
		}
	}
	got := map[string]int64{}
	for _, row := range tableRows(t, readmeSection(t, "Overload and limits"), "`([A-Za-z.]+)` \\| (\\d+) ?([A-Za-z]*)") {
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
		got[row[1]] = n * unit
	}
	for name, value := range want {
		if got[name] != value {
			t.Errorf("%s is %d in the table, and %d in the code", name, got[name], value)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is in the table, and not in the code", name)
		}
	}
}

// Goal: the hash that the README shows is the right one.
func TestReadmeHash(t *testing.T) {
	sum := blake2s.Sum256([]byte("one.example"))
	hash := base64.RawURLEncoding.EncodeToString(sum[:])
	if !strings.Contains(readmeSection(t, "Hashed names"), "$ sniproxy-hostname one.example\n    "+hash+"\n") {
		t.Errorf("the README does not have the hash of one.example, %s", hash)
	}
}

// Goal: the Go program in the README can be built.
func TestReadmeGo(t *testing.T) {
	program(t, "go")
	programs := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(readme(t), -1)
	if len(programs) == 0 {
		t.Fatal("the README has no Go program")
	}
	for _, source := range programs {
		cmd := exec.Command("go", "build", "-o", "backend", "main.go")
		cmd.Dir = directory(t)
		if err := os.WriteFile(filepath.Join(cmd.Dir, "main.go"), []byte(source[1]), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}
