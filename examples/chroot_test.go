package examples_test

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Goal: as an unprivileged user, in a chroot that holds the static binary, the hosts and nothing
// else, not even /dev, the daemon starts, serves and stops.
func TestChroot(t *testing.T) {
	t.Parallel()
	needRoot(t)
	root, hosts := chroot(t)
	uid, gid := nobody(t)
	serve(t, hosts, "a.example")

	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
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
	served := startLoad(t, addr, hello(t, "a.example"))
	served.more(500)
	served.end()

	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
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
	root = directory(t)
	hosts = filepath.Join(root, "hosts")
	for _, dir := range []string{hosts, filepath.Join(root, "bin")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A link: a copy could not be executed while another test's new process has it open for writing.
	if err := os.Link(daemon(t), filepath.Join(root, "bin/sniproxy")); err != nil {
		t.Fatal(err)
	}
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
