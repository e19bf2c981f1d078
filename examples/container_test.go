package examples_test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// An engine is Podman, with images and containers of its own, as root or as an ordinary user.
type engine struct {
	t      *testing.T
	dir    string
	script string // Podman, as it can be run here
	user   int
}

// engineUser is the ordinary user, whom the machine need not know, and engineSubordinate the first
// of the users that are subordinate to that one.
const engineUser, engineSubordinate = 4242, 300000

// newEngine returns an engine with the images of sniproxy and of the site.
func newEngine(t *testing.T, user int) *engine {
	t.Helper()
	if testing.Short() {
		t.Skip("the same without -short")
	}
	hostdirtest.NeedRoot(t)
	for _, program := range []string{"podman", "crun", "unshare", "setpriv", "systemd-socket-activate", "cc"} {
		hostdirtest.Need(t, program)
	}
	e := &engine{t: t, dir: hostdirtest.Dir(t), user: user}
	e.script = filepath.Join(e.dir, "podman")
	as, storage := "", "--root "+e.path("root")+" --runroot "+e.path("runroot")
	if user != 0 {
		hostdirtest.Need(t, "newuidmap")
		as, storage = e.asUser(), ""
	}
	// A confined machine may have a hierarchy of cgroups that crun takes for its own.
	script := fmt.Sprintf(`#!/bin/sh -e
[ "$1" = inside ] || exec unshare -m "$0" inside "$@"
shift
umount /sys/fs/cgroup/unified 2>/dev/null || :
export HOME=%[1]s/home XDG_RUNTIME_DIR=%[1]s/run
%[2]s
if [ "$withoutDefaultNetwork" ]; then
	for argument; do
		shift
		case $argument in
		--net | --network-alias) skip=1 ;;
		*) [ "$skip" ] || set -- "$@" "$argument"; skip= ;;
		esac
	done
fi
exec $as podman --runtime crun --cgroup-manager cgroupfs --events-backend none --storage-driver vfs %[3]s "$@"
`, e.dir, as, storage)
	hostdirtest.Must(t, os.WriteFile(e.script, []byte(script), 0o755))
	for _, dir := range []string{"home", "run", "bin", "site"} {
		hostdirtest.Must(t, os.Mkdir(e.path(dir), 0o700))
		hostdirtest.Must(t, os.Chown(e.path(dir), user, user))
	}
	t.Cleanup(func() {
		e.podman("rm", "--all", "--force", "--time=0")
		if pid, err := os.ReadFile(e.path("run/libpod/tmp/pause.pid")); err == nil { // what holds the user namespace
			if pid, err := strconv.Atoi(strings.TrimSpace(string(pid))); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	for _, program := range []string{"sniproxy", "sniproxy-listen", "sniproxy-tls"} {
		hostdirtest.CopyProgram(t, build(t, program), e.path("bin/"+program))
	}
	// OpenSSL says while linking that it needs glibc at run time as well, which this server does
	// not.
	command(t, "cc", "-static", "-o", e.path("site/server"), "backends/handed/server.c", "-lssl", "-lcrypto", "-pthread")
	hostdirtest.Must(t, os.Chmod(e.path("bin"), 0o755))
	hostdirtest.Must(t, os.Chmod(e.path("site"), 0o755))
	for name, args := range map[string][]string{
		"sniproxy": {"container/Containerfile", "bin"},
		"site":     {"container/Containerfile.site", "site"},
	} {
		e.podman("build", "--quiet", "--tag=localhost/"+name, "--file="+example(t, args[0], e.dir), e.path(args[1]))
	}
	return e
}

// asUser returns the part of the script that becomes the ordinary user, who has subordinate users.
func (e *engine) asUser() string {
	e.t.Helper()
	const name = "sniproxy-tester"
	for file, line := range map[string]string{
		"passwd": fmt.Sprintf("%s:x:%d:%d::/:/bin/sh\n", name, engineUser, engineUser),
		"group":  fmt.Sprintf("%s:x:%d:\n", name, engineUser),
		"subuid": fmt.Sprintf("%s:%d:65536\n", name, engineSubordinate),
		"subgid": fmt.Sprintf("%s:%d:65536\n", name, engineSubordinate),
	} {
		content, _ := os.ReadFile("/etc/" + file)
		hostdirtest.Must(e.t, os.WriteFile(e.path(file), append(content, line...), 0o644))
	}
	return fmt.Sprintf(`for f in passwd group subuid subgid; do
	mount --bind %s/$f /etc/$f
done
cd /
as="setpriv --reuid=%d --regid=%[2]d --clear-groups"`, e.dir, engineUser)
}

func (e *engine) path(name string) string { return filepath.Join(e.dir, name) }

// podman runs a command of the engine.
func (e *engine) podman(args ...string) string {
	e.t.Helper()
	return command(e.t, e.script, args...)
}

// confined are arguments to run a container where the machine allows little.
var confined = []string{"--ulimit=nofile=1024:20000", "--ulimit=nproc=32768:32768", "--cgroups=disabled"}

// arguments returns the arguments of `podman run` for a file of Quadlet, with each old string
// replaced by the new one that follows it, for a container with a name.
func (e *engine) arguments(file, name string, oldnew ...string) []string {
	e.t.Helper()
	text := fileText(e.t, example(e.t, file, hostdirtest.Dir(e.t), oldnew...))
	_, text, _ = strings.Cut(text, "\n[Container]\n")
	text, _, _ = strings.Cut(text, "\n[")
	args, image, command := append([]string{"run", "--rm", "--name=" + name}, confined...), "", []string(nil)
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch {
		case key == "" || key[0] == '#':
		case key == "Image":
			image = value
		case key == "Exec":
			command = strings.Fields(value)
		case key == "PodmanArgs":
			args = append(args, strings.Fields(value)...)
		case key == "NoNewPrivileges" && value == "true":
			args = append(args, "--security-opt=no-new-privileges")
		case key == "ReadOnly" && value == "true":
			args = append(args, "--read-only")
		case key == "Network" || key == "Volume":
			args = append(args, "--"+strings.ToLower(key)+"="+value)
		case key == "DropCapability":
			args = append(args, "--cap-drop="+value)
		default:
			e.t.Fatalf("%s: unknown line %q", file, line)
		}
	}
	return append(append(args, image), command...)
}

// run runs a container in the foreground.
func (e *engine) run(args ...string) *exec.Cmd {
	e.t.Helper()
	cmd := exec.Command(e.script, args...)
	start(e.t, cmd)
	return cmd
}

// expectNoNetwork fails the test if a container has a network.
func (e *engine) expectNoNetwork(name string) {
	e.t.Helper()
	table := fileText(e.t, "/proc/"+e.podman("inspect", "--format={{.State.Pid}}", name)+"/net/dev")
	if lines := strings.Split(strings.TrimSpace(table), "\n"); len(lines) != 3 || !strings.HasPrefix(strings.TrimSpace(lines[2]), "lo:") {
		e.t.Errorf("the container %s has the network\n%s", name, table)
	}
}

// testContainers tests the proxy and the site in containers. The directory of the site is made by
// makeDir, and volume is how it is mounted.
func (e *engine) testContainers(makeDir func(dir string), volume string) {
	t := e.t
	t.Helper()
	hosts, addr := hostdirtest.Dir(t), net.JoinHostPort("127.0.0.1", freePort(t))
	hostdirtest.Must(t, os.Chown(hosts, e.user, e.user))
	s := &backendSite{t: t, dir: filepath.Join(hosts, hostdirtest.Entry("one.example")), addr: addr}
	s.makeCertificate()
	makeDir(s.dir)

	// The proxy gets its socket from systemd, and serves a backend on the host.
	serve(t, hosts, "a.example")
	args := e.arguments("container/sniproxy.container", "sniproxy", "Volume=/srv/sniproxy:", "Volume="+hosts+":")
	proxy := exec.Command("systemd-socket-activate", append([]string{"--listen=" + addr, e.script}, args...)...)
	start(t, proxy)
	hello := snitest.Hello("a.example")
	hostdirtest.Await(t, "the proxy", func() bool { return exchange(addr, hello) == nil })
	e.expectNoNetwork("sniproxy")
	load := startLoad(t, addr, hello)
	load.more(500)
	load.end()

	// The site sees its clients' addresses, and may be replaced.
	const inside = "/srv/sniproxy/one.example"
	args = e.arguments("container/site.container", "site",
		"Volume="+inside+":"+inside, "Volume="+s.dir+":"+inside+volume,
		"Volume=/etc/ssl/one.example.crt", "Volume="+s.chain,
		"Volume=/etc/ssl/private/one.example.key", "Volume="+s.key)
	for range 2 {
		site := e.run(args...)
		hostdirtest.Await(t, "the site", func() bool { _, _, err := s.page(); return err == nil })
		s.expect(true)
		e.expectNoNetwork("site")
		e.podman("stop", "site")
		if err := site.Wait(); err != nil {
			t.Errorf("the site ended with: %v", err)
		}
	}
	expectRefused(t, addr, snitest.Hello("one.example"))
	e.testSidecar(hosts, addr, makeDir, volume)

	// A client that stays for the ten seconds of the stop does not make the engine kill the proxy.
	stays, err := connect(addr, hello)
	hostdirtest.Must(t, err)
	hostdirtest.Must(t, stays.back())
	e.podman("stop", "sniproxy")
	stays.Close()
	if err := proxy.Wait(); err != nil {
		t.Errorf("the proxy ended with: %v", err)
	}
}

// testSidecar tests a plain service in a container, and sniproxy-tls in another one with the same
// network, which tells it its clients' addresses.
func (e *engine) testSidecar(hosts, addr string, makeDir func(dir string), volume string) {
	t := e.t
	t.Helper()
	const name = "app.example"
	dir := filepath.Join(hosts, hostdirtest.Entry(name))
	makeDir(dir)
	source := e.path("app.go")
	hostdirtest.Must(t, os.WriteFile(source, []byte(`package main

import (
	"io"
	"log"
	"net/http"
)

func main() {
	log.Fatal(http.ListenAndServe("127.0.0.1:8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Host+" for "+r.Header.Get("X-Forwarded-For"))
	})))
}
`), 0o644))
	hostdirtest.Must(t, os.Mkdir(e.path("app"), 0o755))
	compile := exec.Command(hostdirtest.Need(t, "go"), "build", "-o", e.path("app/app"), source)
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	hostdirtest.Must(t, os.WriteFile(e.path("Containerfile.app"), []byte("FROM scratch\nCOPY app /\nUSER 65534:65534\nENTRYPOINT [\"/app\"]\n"), 0o644))
	e.podman("build", "--quiet", "--tag=localhost/app", "--file="+e.path("Containerfile.app"), e.path("app"))
	roots := installCertificate(t, dir, name)

	app := e.run(e.arguments("container/app.container", "systemd-app")...)
	hostdirtest.Await(t, "the service", func() bool {
		state, _ := exec.Command(e.script, "inspect", "--format={{.State.Running}}", "systemd-app").Output()
		return strings.TrimSpace(string(state)) == "true"
	})
	e.expectNoNetwork("systemd-app")
	tls := e.run(e.arguments("container/app-tls.container", "systemd-app-tls",
		"Volume=/srv/sniproxy/app.example:", "Volume="+dir+":", ":/app.example\n", ":/app.example"+volume+"\n")...)
	var page string
	var err error
	if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
		page, err = getHTTPS(addr, name, roots)
		return err == nil && page == name+" for 127.0.0.1"
	}) {
		t.Errorf("the page is %q, error %v", page, err)
	}
	for container, cmd := range map[string]*exec.Cmd{"systemd-app-tls": tls, "systemd-app": app} {
		e.podman("stop", "--time=1", container)
		cmd.Wait()
	}
}

// Goal: the image and the files for Podman do what they say: the proxy in a container without a
// network, with a socket of systemd, and a site in another one, which is handed its connections.
func TestContainers(t *testing.T) {
	t.Parallel()
	e := newEngine(t, 0)
	e.testContainers(func(dir string) {
		hostdirtest.Must(t, os.Mkdir(dir, 0o710))
		hostdirtest.Must(t, os.Chown(dir, 65533, 65532))
	}, "")
}

// Goal: the same for an ordinary user, whose directories the containers' users get by `:U`.
func TestContainersRootless(t *testing.T) {
	t.Parallel()
	e := newEngine(t, engineUser)
	e.testContainers(func(dir string) {
		hostdirtest.Must(t, os.Mkdir(dir, 0o711))
		hostdirtest.Must(t, os.Chmod(dir, 0o711))
		hostdirtest.Must(t, os.Chown(dir, engineUser, engineUser))
	}, ":U")
}

// Goal: compose.yaml starts the proxy and the site, and stops them gracefully. It builds their
// images.
func TestContainersCompose(t *testing.T) {
	t.Parallel()
	compose := hostdirtest.Need(t, "podman-compose")
	e := newEngine(t, 0)
	s := &backendSite{t: t, dir: e.path("hosts/one.example"), addr: net.JoinHostPort("127.0.0.1", freePort(t))}
	s.makeCertificate()
	hostdirtest.Must(t, os.MkdirAll(s.dir, 0o755))
	hostdirtest.Must(t, os.Chmod(s.dir, 0o710))
	hostdirtest.Must(t, os.Chown(s.dir, 65533, 65532))
	hostdirtest.Must(t, os.Mkdir(e.path("tls"), 0o755))
	hostdirtest.Must(t, os.Rename(s.chain, e.path("tls/one.example.crt")))
	hostdirtest.Must(t, os.Rename(s.key, e.path("tls/one.example.key")))
	// The machine may have no networks for containers.
	file := example(t, "container/compose.yaml", e.dir, `":8443"`, `"`+s.addr+`"`, `ports: ["443:8443"]`, "network_mode: host")
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command(compose, append([]string{
			"--podman-path=" + e.script, "--podman-run-args=" + strings.Join(confined, " "), "--file=" + file,
		}, args...)...)
		cmd.Dir = e.dir
		// Podman-compose before 1.1 joins a network of its own also where network_mode says
		// otherwise.
		cmd.Env = append(os.Environ(), "withoutDefaultNetwork=1")
		if out, err := cmd.CombinedOutput(); err != nil || slices.Contains(strings.Split(string(out), "\n"), "exit code: 125") {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
	}
	e.podman("rmi", "--all")
	run("up", "--detach", "--build")
	hostdirtest.Await(t, "the site", func() bool { _, _, err := s.page(); return err == nil })
	s.expect(true)
	run("down")
	if canConnect(s.addr) {
		t.Error("the proxy runs after the stop")
	}
}

// quadlets are the versions of Quadlet, which makes units of the files for Podman, that they are
// for: the first, and a later one. `.ci/run` fetches them, since Debian's Podman has none.
var quadlets = map[string]string{"v4.4.4": "github.com/containers/podman/v4", "v5.4.2": "github.com/containers/podman/v5"}

// quadlet builds a version of Quadlet, and returns its path.
func quadlet(t *testing.T, version string) string {
	t.Helper()
	tool, dir := hostdirtest.Need(t, "go"), hostdirtest.Dir(t)
	download := exec.Command(tool, "mod", "download", "-json", quadlets[version]+"@"+version)
	download.Dir = dir
	out, err := download.Output()
	var module struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &module)
	}
	path := filepath.Join(dir, "quadlet")
	if err == nil {
		build := exec.Command(tool, "build", "-mod=readonly", "-o", path, "./cmd/quadlet")
		build.Dir = module.Dir
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "PWD="+module.Dir)
		out, err = build.CombinedOutput()
	}
	if err != nil {
		t.Logf("%v\n%s", err, out)
		hostdirtest.Missing(t, "quadlet "+version)
	}
	return path
}

// Goal: Quadlet makes units of the files for Podman, for the system and for users, in which systemd
// finds no fault; and these run the containers as the other tests do.
func TestQuadlet(t *testing.T) {
	t.Parallel()
	hostdirtest.Need(t, "podman")
	hostdirtest.Need(t, "systemd-analyze")
	for version := range quadlets {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			program := quadlet(t, version)
			files, err := filepath.Glob("container/*.container")
			hostdirtest.Must(t, err)
			from := hostdirtest.Dir(t)
			for _, file := range files {
				example(t, file, from)
			}
			for _, manager := range []string{"--system", "--user"} {
				to := hostdirtest.Dir(t)
				example(t, "systemd/sniproxy.socket", to)
				args := []string{"-no-kmsg-log", "-v", to}
				if manager == "--user" {
					args = append([]string{"-user"}, args...)
				}
				cmd := exec.Command(program, args...)
				cmd.Env = append(os.Environ(), "QUADLET_UNIT_DIRS="+from)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", cmd, err, out)
				}
				verifyUnits(t, manager, to+"/")
				for _, file := range files {
					name := strings.TrimSuffix(filepath.Base(file), ".container")
					expectRun(t, fileText(t, filepath.Join(to, name+".service")), (&engine{t: t}).arguments(file, "systemd-%N"))
				}
			}
		})
	}
}

// expectRun fails the test unless the unit has Podman run a container with these arguments, and
// others that Quadlet always gives it.
func expectRun(t *testing.T, unit string, args []string) {
	t.Helper()
	run := firsts(t, `(?m)^ExecStart=/usr/bin/podman (run .*)$`, unit)[0]
	// Versions differ in how they write options.
	run = strings.NewReplacer(" --network ", " --network=", " --cap-drop ", " --cap-drop=", " --name ", " --name=", " -v ", " --volume=").Replace(run)
	got := strings.Fields(run)
	for _, arg := range args {
		if i := slices.Index(got, arg); i >= 0 {
			got = slices.Delete(got, i, i+1)
		} else if !slices.Contains(confined, arg) {
			t.Errorf("%s is not in %q", arg, run)
		}
	}
	always := []string{"--cidfile=%t/%N.cid", "--replace", "--log-driver", "passthrough", "--cgroups=split", "--sdnotify=conmon", "-d", "--read-only-tmpfs=false"}
	for _, arg := range got {
		if !slices.Contains(always, arg) {
			t.Errorf("%s in %q is in no test", arg, run)
		}
	}
}
