package examples_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"debug/buildinfo"
	"debug/elf"
	"debug/macho"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// packageName is the name of the Debian package.
const packageName = "sniproxy-unix"

// snapshot copies the project to a directory, as a repository of one commit, which is the same in
// every copy.
func snapshot(t *testing.T) (dir string) {
	t.Helper()
	git := hostdirtest.Need(t, "git")
	dir = hostdirtest.Dir(t)
	entries, err := os.ReadDir("..")
	hostdirtest.Must(t, err)
	for _, entry := range entries {
		if name := entry.Name(); name != ".git" && name != "bin" {
			command(t, "cp", "-R", "../"+name, dir)
		}
	}
	for _, args := range [][]string{{"init", "--quiet"}, {"add", "--all"}, {"commit", "--quiet", "--message=x"}} {
		cmd := exec.Command(git, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null",
			"GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x", "GIT_AUTHOR_DATE=2026-01-02T03:04:05Z",
			"GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
	}
	return dir
}

// makePackages makes the packages for this system of a copy of the project, in a new directory.
func makePackages(t *testing.T, source string, environ ...string) (dir string) {
	t.Helper()
	if testing.Short() || hostdir.Hashed {
		t.Skip("packages are the same in all builds, and take time")
	}
	if runtime.GOOS != "linux" {
		t.Skip("packages are made on Linux")
	}
	hostdirtest.Need(t, "go")
	// What packs a Debian package is fetched, when it has not been.
	tool := firsts(t, `(?m)^nfpm=(.*)$`, fileText(t, "../.ci/package"))[0]
	if err := exec.Command("go", "run", tool, "--version").Run(); err != nil {
		hostdirtest.Missing(t, tool)
	}
	processor := runtime.GOARCH
	if processor == "arm" {
		processor = "armv7"
	}
	dir = filepath.Join(hostdirtest.Dir(t), "packages")
	cmd := exec.Command(filepath.Join(source, ".ci/package"), dir, "linux/"+processor)
	cmd.Env = append(os.Environ(), environ...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return dir
}

// packages returns the directory with the packages for this system, which the tests share.
func packages(t *testing.T) string {
	t.Helper()
	packagesMu.Lock()
	defer packagesMu.Unlock()
	if packagesDir == "" {
		made := makePackages(t, snapshot(t))
		command(t, "cp", "-R", made, workspace)
		packagesDir = filepath.Join(workspace, filepath.Base(made))
	}
	return packagesDir
}

var (
	packagesMu  sync.Mutex
	packagesDir string
)

// only returns the one file that matches a pattern.
func only(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	hostdirtest.Must(t, err)
	if len(files) != 1 {
		t.Fatalf("%s: %q", pattern, files)
	}
	return files[0]
}

// An archived is a file in an archive.
type archived struct {
	header  *tar.Header
	content []byte
}

// readTar returns the files in an archive, by their names without prefix.
func readTar(t *testing.T, r io.Reader, prefix string) map[string]archived {
	t.Helper()
	files := map[string]archived{}
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return files
		}
		hostdirtest.Must(t, err)
		name, ok := strings.CutPrefix(header.Name, prefix)
		if !ok {
			t.Errorf("%s is not in %s", header.Name, prefix)
		}
		content, err := io.ReadAll(archive)
		hostdirtest.Must(t, err)
		if header.Typeflag != tar.TypeDir {
			files[name] = archived{header, content}
		}
	}
}

// debian returns what a Debian package installs.
func debian(t *testing.T, file string) map[string]archived {
	t.Helper()
	out, err := exec.Command(hostdirtest.Need(t, "dpkg-deb"), "--fsys-tarfile", file).Output()
	hostdirtest.Must(t, err)
	return readTar(t, bytes.NewReader(out), "./")
}

// programs returns the names of the programs of the project.
func programs(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("../cmd/*/main.go")
	hostdirtest.Must(t, err)
	for _, file := range files {
		names = append(names, filepath.Base(filepath.Dir(file)))
	}
	if !slices.Contains(names, "sniproxy") {
		t.Fatalf("the programs are %q", names)
	}
	return names
}

// machines are the processors, as ELF files name them. armv7 is 32 bits wide.
var machines = map[string]elf.Machine{
	"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "armv7": elf.EM_ARM, "riscv64": elf.EM_RISCV,
}

// checkProgram checks that a program is for a system and a processor, and static where the README
// says so.
func checkProgram(t *testing.T, program []byte, system, processor string) {
	t.Helper()
	if system == "darwin" {
		file, err := macho.NewFile(bytes.NewReader(program))
		hostdirtest.Must(t, err)
		if want := map[string]macho.Cpu{"amd64": macho.CpuAmd64, "arm64": macho.CpuArm64}[processor]; file.Cpu != want {
			t.Errorf("the program is for %v", file.Cpu)
		}
		return
	}
	file, err := elf.NewFile(bytes.NewReader(program))
	hostdirtest.Must(t, err)
	if file.Machine != machines[processor] {
		t.Errorf("the program is for %v", file.Machine)
	}
	if system == "openbsd" { // it allows only libc to make system calls
		return
	}
	libraries, err := file.ImportedLibraries()
	if err != nil || len(libraries) != 0 {
		t.Errorf("the program needs %q: %v", libraries, err)
	}
	for _, part := range file.Progs {
		if part.Type == elf.PT_INTERP {
			t.Error("the program needs a dynamic linker")
		}
	}
}

// checkVersion checks that a program tells the version of the package that it is in.
func checkVersion(t *testing.T, program []byte, version string) {
	t.Helper()
	info, err := buildinfo.Read(bytes.NewReader(program))
	hostdirtest.Must(t, err)
	if info.Main.Version != "v"+version {
		t.Errorf("the program has version %s, the package %s", info.Main.Version, version)
	}
	if strings.Contains(version, "dirty") {
		t.Errorf("version %s", version)
	}
}

// goVersion returns what Go calls the version of a Debian package of a commit without a tag.
func goVersion(t *testing.T, version string) string {
	t.Helper()
	parts := regexp.MustCompile(`^([0-9.]+)~([0-9]{14})\.([0-9a-f]{12})(?:\.1)?$`).FindStringSubmatch(version)
	if parts == nil {
		t.Fatalf("version %s", version)
	}
	return strings.Join(parts[1:], "-")
}

// Goal: the sums are those of all files; every archive has all programs, for its system and
// processor, static and with the version in its name, all manual pages, and the examples as they
// are in the source.
func TestPackages(t *testing.T) {
	if testing.Short() || hostdir.Hashed {
		t.Skip("packages are the same in all builds, and take time")
	}
	t.Parallel()
	// Those for all systems, of which there may be too many for a test.
	dir, targets := os.Getenv("SNIPROXY_TEST_PACKAGES"), len(strings.Fields(os.Getenv("SNIPROXY_TEST_TARGETS")))
	if dir == "" {
		dir, targets = packages(t), 1
	}
	sums := fileText(t, filepath.Join(dir, "SHA256SUMS"))
	files, err := os.ReadDir(dir)
	hostdirtest.Must(t, err)
	if got := strings.Count(sums, "\n"); got != len(files)-1 {
		t.Errorf("%d sums of %d files", got, len(files)-1)
	}
	pattern := regexp.MustCompile(`^sniproxy-(.+)-([a-z]+)-([a-z0-9]+)\.tar\.gz$`)
	for _, file := range files {
		if file.Name() == "SHA256SUMS" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, file.Name()))
		hostdirtest.Must(t, err)
		if sum := fmt.Sprintf("%x  %s\n", sha256.Sum256(b), file.Name()); !strings.Contains(sums, sum) {
			t.Errorf("SHA256SUMS lacks %s", sum)
		}
		if match := pattern.FindStringSubmatch(file.Name()); match != nil {
			targets--
			t.Run(file.Name(), func(t *testing.T) { testArchive(t, b, match[1], match[2], match[3]) })
		}
	}
	if targets != 0 {
		t.Errorf("%d archives are missing", targets)
	}
}

func testArchive(t *testing.T, b []byte, version, system, processor string) {
	unpacked, err := gzip.NewReader(bytes.NewReader(b))
	hostdirtest.Must(t, err)
	if !unpacked.ModTime.IsZero() || unpacked.Name != "" {
		t.Errorf("compressed as %q at %v", unpacked.Name, unpacked.ModTime)
	}
	files := readTar(t, unpacked, fmt.Sprintf("sniproxy-%s-%s-%s/", version, system, processor))
	for _, name := range programs(t) {
		program, ok := files["bin/"+name]
		if !ok {
			t.Fatalf("there is no bin/%s", name)
		}
		if program.header.Mode != 0o755 {
			t.Errorf("bin/%s has mode %o", name, program.header.Mode)
		}
		checkProgram(t, program.content, system, processor)
		checkVersion(t, program.content, version)
		delete(files, "bin/"+name)
	}
	for _, page := range manuals(t) {
		if _, ok := files[strings.TrimPrefix(page, "../")]; !ok {
			t.Errorf("there is no %s", page)
		}
	}
	for _, name := range []string{"README.md", "LICENSE", "examples/systemd/sniproxy.socket", "examples/s6/run"} {
		if _, ok := files[name]; !ok {
			t.Errorf("there is no %s", name)
		}
	}
	for name, file := range files {
		if source, err := os.ReadFile(filepath.Join("..", name)); err != nil || !bytes.Equal(source, file.content) {
			t.Errorf("%s is not that of the source: %v", name, err)
		}
		if strings.HasSuffix(name, "_test.go") || strings.Contains(name, "quickstart") {
			t.Errorf("%s is of no use without the source", name)
		}
	}
}

// Goal: the Debian package has all programs in /usr/bin, with its own version; all manual pages;
// all units and no more, in the places of a package; everything else is documentation. Nothing
// names /usr/local, where programs are by hand.
func TestPackageContents(t *testing.T) {
	t.Parallel()
	path := only(t, filepath.Join(packages(t), packageName+"_*.deb"))
	files := debian(t, path)
	version := command(t, "dpkg-deb", "--field", path, "Version")
	if !strings.HasPrefix(version, "0.0.0~20260102030405.") {
		t.Errorf("version %s", version)
	}
	want := []string{"usr/lib/sysusers.d/sniproxy.conf", "usr/lib/tmpfiles.d/sniproxy.conf"}
	for _, unit := range []string{"sniproxy-next.service", "sniproxy-check.service"} {
		if _, err := os.Stat("systemd/" + unit); err == nil {
			want = append(want, "usr/lib/systemd/system/"+unit+".d/override.conf")
		}
	}
	for _, name := range programs(t) {
		want = append(want, "usr/bin/"+name)
		checkVersion(t, files["usr/bin/"+name].content, goVersion(t, version))
	}
	for _, page := range manuals(t) {
		want = append(want, fmt.Sprintf("usr/share/man/man%s/%s.gz", page[len(page)-1:], filepath.Base(page)))
	}
	for _, units := range []string{"system", "user"} {
		from := map[string]string{"system": "systemd/sniproxy*.*", "user": "systemd/user/*"}[units]
		found, err := filepath.Glob(from)
		hostdirtest.Must(t, err)
		for _, unit := range found {
			path := "usr/lib/systemd/" + units + "/" + filepath.Base(unit)
			want = append(want, path)
			if text := string(files[path].content); !strings.HasPrefix(text, "# /"+path+", of the package "+packageName+"\n") {
				t.Errorf("%s begins with %.80q", path, text)
			}
		}
	}
	got := slices.DeleteFunc(slices.Sorted(maps.Keys(files)), func(name string) bool {
		return strings.HasPrefix(name, "usr/share/doc/"+packageName+"/")
	})
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("it has\n%q, want\n%q", got, want)
	}
	for name, file := range files {
		content := file.content
		if strings.HasSuffix(name, ".gz") {
			unpacked, err := gzip.NewReader(bytes.NewReader(content))
			hostdirtest.Must(t, err)
			content, err = io.ReadAll(unpacked)
			hostdirtest.Must(t, err)
		}
		if bytes.Contains(content, []byte("/usr/local/bin/sniproxy")) {
			t.Errorf("%s names /usr/local/bin", name)
		}
		if file.header.Uid != 0 || file.header.Gid != 0 || file.header.Mode&0o022 != 0 {
			t.Errorf("%s belongs to %d:%d, with mode %o", name, file.header.Uid, file.header.Gid, file.header.Mode)
		}
	}
	for _, name := range []string{"README.md", "copyright", "examples/systemd/sniproxy.socket"} {
		if _, ok := files["usr/share/doc/"+packageName+"/"+name]; !ok {
			t.Errorf("the documentation lacks %s", name)
		}
	}
}

// Goal: all examples and manual pages agree on where the programs are, so that a package can have
// them elsewhere.
func TestExamplesNameLocalPrograms(t *testing.T) {
	files := append(manuals(t), "../README.md")
	err := filepath.WalkDir(".", func(file string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && !strings.HasSuffix(file, "_test.go") {
			files = append(files, file)
		}
		return err
	})
	hostdirtest.Must(t, err)
	named := 0
	for _, file := range files {
		text := fileText(t, file)
		named += strings.Count(text, "/usr/local/bin/sniproxy")
		if strings.Contains(text, "/usr/bin/sniproxy") {
			t.Errorf("%s has a program in /usr/bin, in place of /usr/local/bin", file)
		}
	}
	if named == 0 {
		t.Error("no file names a program")
	}
}

// Goal: the same commit in another directory makes the same bytes, whatever the environment is.
func TestPackagesAreReproducible(t *testing.T) {
	t.Parallel()
	first := packages(t)
	source := snapshot(t)
	hostdirtest.Must(t, os.WriteFile(filepath.Join(source, "examples/systemd/stray.service"), nil, 0o600)) // not committed
	second := makePackages(t, source, "TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "GOAMD64=v2", "GOFLAGS=-buildvcs=false", "SOURCE_DATE_EPOCH=1")
	want, got := fileText(t, filepath.Join(first, "SHA256SUMS")), fileText(t, filepath.Join(second, "SHA256SUMS"))
	if got != want {
		t.Errorf("first\n%s\nand then\n%s", want, got)
	}
}

const (
	firstPackage = "/var/tmp/first.deb"
	nextPackage  = "/var/tmp/next.deb"
	otherPackage = "/var/tmp/other.deb"

	packaged = "/usr/bin/sniproxy"

	pebble = "/var/tmp/pebble"
)

// Goal: beside a real systemd the package installs, where no other sniproxy is, and enables
// nothing. It serves two hosts; a plain service has HTTPS after three commands; an upgrade under
// load loses no client, and its removal leaves nothing but the hosts, also when it is purged.
func TestPackageInstalls(t *testing.T) {
	if os.Getenv(inside) != "" {
		testPackageInstalls(t)
		return
	}
	t.Parallel()
	first := only(t, filepath.Join(packages(t), packageName+"_*.deb"))
	dir := hostdirtest.Dir(t)
	// repack makes a package of the files in a directory.
	repack := func(name string) string {
		file := filepath.Join(dir, name+".deb")
		command(t, "dpkg-deb", "--root-owner-group", "--build", filepath.Join(dir, name), file)
		return file
	}
	control := func(name string, change func(string) string) {
		file := filepath.Join(dir, name, "DEBIAN/control")
		hostdirtest.Must(t, os.WriteFile(file, []byte(change(fileText(t, file))), 0o644))
	}
	command(t, "dpkg-deb", "--raw-extract", first, filepath.Join(dir, "next"))
	control("next", func(text string) string {
		return regexp.MustCompile(`(?m)^Version: .*$`).ReplaceAllString(text, "$0.1")
	})
	other := filepath.Join(dir, "other/DEBIAN")
	hostdirtest.Must(t, os.MkdirAll(other, 0o755))
	hostdirtest.Must(t, os.WriteFile(filepath.Join(other, "control"), []byte(
		"Package: sniproxy\nVersion: 0.6.0\nArchitecture: all\nMaintainer: x <x@x.invalid>\nDescription: another\n"), 0o644))
	hostdirtest.InSystemd(t, "..", inside+"=1", "-f", hostdirtest.Pebble(t, workspace)+":"+pebble,
		"-f", first+":"+firstPackage+":644", "-f", repack("next")+":"+nextPackage+":644", "-f", repack("other")+":"+otherPackage+":644")
}

// startAuthority starts a CA that all services take for Let's Encrypt. The function that it returns
// tells what clients must trust.
func startAuthority(t *testing.T) func() *x509.CertPool {
	t.Helper()
	const addr, management = "127.0.0.1:14000", "127.0.0.1:15000"
	dir := hostdirtest.Dir(t)
	own := certificatePEM(t, dir, "localhost")
	// The system trusts the certificate of the CA's own server, as it does Let's Encrypt's.
	const system = "/etc/ssl/certs/ca-certificates.crt"
	trusted, _ := os.ReadFile(system)
	hostdirtest.Must(t, os.MkdirAll(filepath.Dir(system), 0o755))
	hostdirtest.Must(t, os.WriteFile(system, append(trusted, own...), 0o644))
	command(t, "systemctl", "set-environment", "ACME_DIRECTORY=https://localhost:14000/dir")
	start(t, hostdirtest.PebbleCommand(t, pebble, dir, hostdirtest.NameServer(t, "127.0.0.1"), map[string]any{
		"listenAddress": addr, "managementListenAddress": management, "tlsPort": 443, "httpPort": 1,
	}))
	hostdirtest.Await(t, "the CA", func() bool { return canConnect(addr) && canConnect(management) })
	return func() *x509.CertPool {
		t.Helper()
		server := x509.NewCertPool()
		server.AppendCertsFromPEM(own)
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: server, ServerName: "localhost"}}}
		answer, err := client.Get("https://" + management + "/roots/0")
		hostdirtest.Must(t, err)
		defer answer.Body.Close()
		root, err := io.ReadAll(answer.Body)
		hostdirtest.Must(t, err)
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(root) {
			t.Fatalf("the root of the CA is %q", root)
		}
		return pool
	}
}

// dpkg runs dpkg, and returns what it printed.
func dpkg(args ...string) (string, error) {
	out, err := exec.Command("dpkg", args...).CombinedOutput()
	return string(out), err
}

func testPackageInstalls(t *testing.T) {
	os.Remove("/usr/sbin/policy-rc.d") // containers forbid packages to start anything
	command(t, "dpkg", "-i", otherPackage)
	if out, err := dpkg("-i", firstPackage); err == nil || !strings.Contains(out, "conflicting packages") {
		t.Fatalf("beside the other sniproxy: %v\n%s", err, out)
	}
	command(t, "dpkg", "-P", "sniproxy")
	t.Logf("%s", command(t, "dpkg", "-i", firstPackage))
	version := goVersion(t, command(t, "dpkg-query", "--show", "--showformat=${Version}", packageName))
	var files, units []string
	for file := range strings.SplitSeq(command(t, "dpkg", "-L", packageName), "\n") {
		if info, err := os.Lstat(file); err != nil || info.IsDir() {
			continue
		}
		files = append(files, file)
		if filepath.Dir(file) == "/usr/lib/systemd/system" {
			// Of a template, an instance.
			units = append(units, strings.Replace(filepath.Base(file), "@.", "@test.example.", 1))
		}
		if filepath.Dir(file) == filepath.Dir(packaged) {
			if out := command(t, file, "-h"); !strings.Contains(out, "This is version v"+version+",") {
				t.Errorf("%s -h prints\n%s", file, out)
			}
		}
	}
	for _, unit := range units {
		state := property(t, unit, "ActiveState") + " " + property(t, unit, "UnitFileState")
		enabled := "disabled"
		if strings.HasPrefix(unit, "sniproxy-tls@") {
			enabled = "static" // its service starts it
		}
		if filepath.Ext(unit) != ".service" && state != "inactive "+enabled {
			t.Errorf("%s is %s after the installation", unit, state)
		}
	}
	verifyUnits(t, "--system", "/usr/lib/systemd/system/sniproxy")
	verifyUnits(t, "--user", "/usr/lib/systemd/user/sniproxy")
	hosts := func(want string) {
		t.Helper()
		if got := command(t, "stat", "--format=%a %U %G", "/srv/sniproxy"); got != want {
			t.Errorf("/srv/sniproxy is %s, want %s", got, want)
		}
	}
	hosts("1775 root sniproxy-hosts")

	serve(t, "/srv/sniproxy", unitHost)
	serveHanded(t, "/srv/sniproxy", unitHanded)
	command(t, "systemctl", "enable", "--now", "sniproxy.socket")
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager").CombinedOutput()
			t.Logf("%s", out)
		}
	})
	exchanges := func() {
		t.Helper()
		for _, host := range []string{unitHost, unitHanded} {
			if err := exchange(unitAddr, snitest.Hello(host)); err != nil {
				t.Errorf("%s: %v", host, err)
			}
		}
	}
	exchanges()

	// A plain service has HTTPS, with a certificate from a CA, after three commands.
	const plain, plainUnit = "app.example", "sniproxy-tls@app.example.service"
	startServiceOn(t, "127.0.0.1:8080")
	authority := startAuthority(t)
	text, _, _ := strings.Cut(fileText(t, "/usr/share/doc/"+packageName+"/examples/systemd/sniproxy-tls@.service"), "\n[Unit]\n")
	commands := firsts(t, `(?m)^#     ([a-z].*)$`, text)
	if len(commands) != 4 || commands[0] != "mkdir -p /etc/sniproxy-tls" {
		t.Fatalf("the commands of sniproxy-tls@.service are %q", commands)
	}
	shell(t, "/", commands[1:]...) // the package has made that directory
	hostdirtest.Await(t, "a certificate in the journal", func() bool {
		out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "--unit="+plainUnit).Output()
		return err == nil && strings.Contains(string(out), plain+": ")
	})
	roots := authority()
	awaitPage(t, plain, roots)
	oldPlain := mainPID(t, plainUnit)

	// Who may add hosts is the administrator's choice.
	command(t, "chmod", "0755", "/srv/sniproxy")
	command(t, "chgrp", "adm", "/srv/sniproxy")
	l := startLoad(t, unitAddr, snitest.Hello(unitHost))
	l.more(500)
	old := mainPID(t, "sniproxy.service")
	command(t, "dpkg", "-i", nextPackage)
	hosts("755 root adm")
	l.more(500)
	if pid := mainPID(t, "sniproxy.service"); pid == old || !executes(pid, packaged) {
		t.Errorf("process %d serves after the upgrade, and %d did before", pid, old)
	}
	awaitPage(t, plain, roots)
	if pid := mainPID(t, plainUnit); pid == oldPlain || !executes(pid, packaged+"-tls") {
		t.Errorf("process %d ends TLS after the upgrade, and %d did before", pid, oldPlain)
	}
	// With a second copy beside it, the administrator exchanges both, and no connection is cut.
	command(t, "systemctl", "start", "sniproxy-next.service")
	old, next := mainPID(t, "sniproxy.service"), mainPID(t, "sniproxy-next.service")
	out := command(t, "dpkg", "-i", firstPackage)
	if !strings.Contains(out, "sniproxy.service still runs the old program") || mainPID(t, "sniproxy.service") != old || mainPID(t, "sniproxy-next.service") != next {
		t.Errorf("an upgrade beside sniproxy-next.service:\n%s", out)
	}
	begin, end := upgradeCommands(t, "/usr/share/doc/"+packageName+"/examples/systemd/sniproxy-next.service")
	_, begin, _ = strings.Cut(begin, "\n") // the package has brought the program
	shell(t, "/", begin)
	hostdirtest.Await(t, "the new program", func() bool { return executes(mainPID(t, "sniproxy.service"), packaged) })
	shell(t, "/", end)
	awaitProperty(t, "sniproxy-next.service", "ActiveState", "inactive")
	l.more(500)
	// A stop that may take for ever would leave dpkg waiting for as long.
	const dropIn = "/etc/systemd/system/sniproxy.service.d/override.conf" // where `systemctl edit` puts it
	hostdirtest.Must(t, os.Mkdir(filepath.Dir(dropIn), 0o755))
	hostdirtest.Must(t, os.WriteFile(dropIn, []byte("[Service]\nTimeoutStopSec=infinity\n"), 0o644))
	command(t, "systemctl", "daemon-reload")
	if got := property(t, "sniproxy-next.service", "TimeoutStopUSec"); got != "infinity" {
		t.Errorf("a drop-in of sniproxy.service does not hold for sniproxy-next.service, which has %s", got)
	}
	old = mainPID(t, "sniproxy.service")
	out = command(t, "dpkg", "-i", nextPackage)
	if !strings.Contains(out, "sniproxy.service still runs the old program") || mainPID(t, "sniproxy.service") != old {
		t.Errorf("an upgrade without a restart:\n%s", out)
	}
	hostdirtest.Must(t, os.RemoveAll(filepath.Dir(dropIn)))
	command(t, "systemctl", "daemon-reload")
	l.more(500)
	l.end()

	// What does not run stays so.
	command(t, "systemctl", "stop", "sniproxy.socket")
	command(t, "dpkg", "-i", firstPackage)
	for _, unit := range units {
		if got := property(t, unit, "ActiveState"); got != "inactive" {
			t.Errorf("%s is %s after an upgrade", unit, got)
		}
	}
	command(t, "systemctl", "start", "sniproxy.socket")
	exchanges()

	for _, remove := range []string{"--remove", "--purge"} {
		command(t, "dpkg", remove, packageName)
		if !canListen("[::]:443") {
			t.Errorf("port 443 is not free after %s", remove)
		}
		for _, file := range files {
			if _, err := os.Lstat(file); err == nil {
				t.Errorf("%s is left after %s", file, remove)
			}
		}
		if left := command(t, "find", "/etc/systemd", "-name", "sniproxy*"); left != "" {
			t.Errorf("left after %s: %s", remove, left)
		}
		if got := property(t, "sniproxy.socket", "LoadState"); got != "not-found" {
			t.Errorf("sniproxy.socket is %s after %s", got, remove)
		}
		if got := property(t, plainUnit, "ActiveState"); got != "inactive" {
			t.Errorf("%s is %s after %s", plainUnit, got, remove)
		}
		if _, err := os.Stat("/etc/sniproxy-tls/" + plain); err != nil {
			t.Errorf("after %s: %v", remove, err)
		}
		hosts("755 root adm")
		for _, host := range []string{unitHost, unitHanded} {
			if _, err := os.Stat(filepath.Join("/srv/sniproxy", host, "tls-socket")); err != nil {
				t.Errorf("after %s: %v", remove, err)
			}
		}
	}
}

// Goal: the commands of the README for an installation by hand, and then those of sniproxy.socket,
// are enough to serve under a real systemd, with the programs in /usr/local/bin. The manual pages
// are there too.
func TestByHand(t *testing.T) {
	if source := os.Getenv(inside); source != "" {
		testByHand(t, source)
		return
	}
	if testing.Short() || hostdir.Hashed {
		t.Skip("an installation is the same in all builds, and takes time")
	}
	t.Parallel()
	source := snapshot(t)
	shell(t, source, byHand(t)[0]) // as the user who has Go
	hostdirtest.InSystemd(t, "..", inside+"="+source, "-w", source)
}

// byHand returns the commands of the README for an installation by hand.
func byHand(t *testing.T) []string {
	t.Helper()
	_, text, _ := strings.Cut(readmeSection(t, "Install"), "\nBy hand")
	return firsts(t, `(?m)^    (.*)$`, text)
}

// shell runs commands in a directory.
func shell(t *testing.T, dir string, commands ...string) {
	t.Helper()
	cmd := exec.Command("sh", "-euc", strings.Join(commands, "\n"))
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

func testByHand(t *testing.T, source string) {
	t.Chdir(filepath.Join(source, "examples"))
	shell(t, source, byHand(t)[1:]...)
	head, _, _ := strings.Cut(fileText(t, "systemd/sniproxy.socket"), "\n\n")
	shell(t, source, firsts(t, `(?m)^#     (.*)$`, head)...)
	serve(t, "/srv/sniproxy", unitHost)
	t.Cleanup(func() { command(t, "systemctl", "stop", "sniproxy.socket") })
	hostdirtest.Must(t, exchange(unitAddr, snitest.Hello(unitHost)))
	if !executes(mainPID(t, "sniproxy.service"), "/usr/local/bin/sniproxy") {
		t.Error("sniproxy.service runs another program")
	}
	for _, name := range programs(t) {
		if got := command(t, "sh", "-c", "command -v "+name); got != "/usr/local/bin/"+name {
			t.Errorf("%s is %s", name, got)
		}
	}
	for _, page := range manuals(t) {
		installed := fmt.Sprintf("/usr/local/share/man/man%s/%s", page[len(page)-1:], filepath.Base(page))
		if fileText(t, installed) != fileText(t, page) {
			t.Errorf("%s is not the page of the source", installed)
		}
	}
}
