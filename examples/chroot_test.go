package examples_test

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: as an unprivileged user, in a chroot that holds the static binary, the hosts and nothing
// else, not even /dev, the daemon starts, serves and stops.
func TestChroot(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	root, hosts := chroot(t)
	uid, gid := nobody(t)
	serve(t, hosts, "a.example")
	serveHanded(t, hosts, "handed.example")

	l := hostdirtest.ListenTCP(t, "tcp", "127.0.0.1:0")
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	addr := l.Addr().String()

	cmd := exec.Command("/bin/sniproxy")
	cmd.Dir = "/hosts"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:     root,
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
	}
	cmd.Stdin = socket
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start(t, cmd)
	socket.Close()
	l.Close()
	lines := bufio.NewScanner(stdout)
	expect := func(want string) {
		t.Helper()
		lines.Scan()
		if got := lines.Text(); got != want {
			t.Fatalf("on standard output: %q, want %q", got, want)
		}
	}
	expect("listening on " + addr)
	for _, name := range []string{"a.example", "handed.example"} {
		served := startLoad(t, addr, snitest.Hello(name))
		served.more(500)
		served.end()
	}

	hostdirtest.Must(t, cmd.Process.Signal(syscall.SIGHUP))
	expect("got SIGHUP, shutting down")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !canListen(addr) {
		t.Error("the port is not free after the stop")
	}
}

// chroot makes a chroot as examples/s6/run wants it.
func chroot(t *testing.T) (root, hosts string) {
	t.Helper()
	root = hostdirtest.Dir(t)
	hosts = filepath.Join(root, "hosts")
	for _, dir := range []string{hosts, filepath.Join(root, "bin")} {
		hostdirtest.Must(t, os.Mkdir(dir, 0o755))
	}
	// A link: a copy could not be executed while another test's new process has it open for
	// writing.
	hostdirtest.Must(t, os.Link(daemon(t), filepath.Join(root, "bin/sniproxy")))
	return root, hosts
}

// visible lists what a process finds in its root, but not what is in the hosts directory, and not
// everything if there is much.
func visible(t *testing.T, pid int, hosts string) string {
	t.Helper()
	root := fmt.Sprintf("/proc/%d/root", pid)
	var found []string
	err := filepath.WalkDir(root+"/", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = strings.TrimPrefix(path, root)
		if path != "/" {
			found = append(found, path)
		}
		switch {
		case path == hosts:
			return fs.SkipDir
		case len(found) == 20:
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(found, " ")
}
