package hostdir_test

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// A failure is a Problem, or an Again as a negative number; 0 is none.
type failure int

const (
	noDirectory   = failure(hostdir.NoDirectory)
	noSocket      = failure(hostdir.NoSocket)
	dangling      = failure(hostdir.Dangling)
	notPermitted  = failure(hostdir.NotPermitted)
	nobodyListens = failure(hostdir.NobodyListens)
	notSocket     = failure(hostdir.NotSocket)
	notStream     = failure(hostdir.NotStream)
	pathTooLong   = failure(hostdir.PathTooLong)

	mayWait     = -failure(hostdir.MayWait)
	withoutRoom = -failure(hostdir.NoRoom)
	backlogFull = -failure(hostdir.BacklogFull)
	exchanged   = -failure(hostdir.Exchanged)
)

// problem returns the failure in an error.
func problem(err error) failure {
	var again hostdir.Again
	if errors.As(err, &again) {
		return -failure(again)
	}
	var e *hostdir.Error
	if errors.As(err, &e) {
		return failure(e.Problem)
	}
	return 0
}

// chdir makes a hosts directory the working directory of the test.
func chdir(t *testing.T) {
	t.Helper()
	t.Chdir(hostdirtest.Dir(t))
}

// dirName returns the path of the directory of a host.
func dirName(name string) string { return hostdirtest.Entry(name) }

// bind makes a host with a socket that does not listen.
func bind(t *testing.T, name string, kind int) (fd int) {
	t.Helper()
	return hostdirtest.Bind(t, dirName(name), kind)
}

// listen makes a host with a socket that listens.
func listen(t *testing.T, name string, backlog int) (fd int) {
	t.Helper()
	fd = bind(t, name, unix.SOCK_STREAM)
	must(t, unix.Listen(fd, backlog))
	return fd
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// descriptors returns how many descriptors this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skipf("no /proc: %v", err)
	}
	return len(entries)
}

// Goal: dialing a host gives a descriptor that is non-blocking and closed on exec. A marker counts
// whatever kind of file it is.
func TestDial(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		for name, mark := range map[string]func(path string) error{
			"none":      func(string) error { return nil },
			"file":      func(path string) error { return os.WriteFile(path, nil, 0) },
			"directory": func(path string) error { return os.Mkdir(path, 0) },
			"dangling":  func(path string) error { return os.Symlink("nowhere", path) },
			"loop":      func(path string) error { return os.Symlink("send-proxy-v1", path) },
		} {
			backend := listen(t, name, 1)
			must(t, mark(dirName(name)+"/send-proxy-v1"))
			b, err := dial(name)
			must(t, err)
			defer unix.Close(b.FD)
			want := hostdir.Backend{Proxy: 1}
			if name == "none" {
				want.Proxy = 0
			}
			if marks(b) != want {
				t.Errorf("%s: the markers say %+v, want %+v", name, b, want)
			}
			flags, err := unix.FcntlInt(uintptr(b.FD), unix.F_GETFL, 0)
			if err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("%s: flags %x, error %v: want O_NONBLOCK", name, flags, err)
			}
			flags, err = unix.FcntlInt(uintptr(b.FD), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("%s: flags %x, error %v: want FD_CLOEXEC", name, flags, err)
			}
			peer, _, err := unix.Accept(backend)
			must(t, err)
			defer unix.Close(peer)
			_, err = unix.Write(b.FD, []byte(name))
			must(t, err)
			got := make([]byte, 100)
			if n, err := unix.Read(peer, got); err != nil || string(got[:n]) != name {
				t.Errorf("%s: the backend got %q, error %v", name, got[:max(n, 0)], err)
			}
		}
	})
}

// Goal: symlinks are followed, to directories and to sockets. Markers are those of the target
// directory.
func TestDialSymlinks(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		listen(t, "target", 8)
		must(t, os.WriteFile(dirName("target")+"/send-proxy-v1", nil, 0))
		must(t, os.Symlink(dirName("target"), dirName("directory")))
		must(t, os.Mkdir(dirName("socket"), 0o755))
		must(t, os.Symlink("../"+dirName("target")+"/tls-socket", dirName("socket")+"/tls-socket"))
		for name, want := range map[string]uint8{"target": 1, "directory": 1, "socket": 0} {
			b, err := dial(name)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			unix.Close(b.FD)
			if marks(b) != (hostdir.Backend{Proxy: want}) {
				t.Errorf("%s: the markers say %+v, want version %d", name, b, want)
			}
		}
	})
}

// Goal: each way to fail has its own problem and message, keeps the error of the system, and leaves
// no descriptor behind.
func TestDialProblems(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, dial func(string) (hostdir.Backend, error)) {
		in := func(name string, do func(path string) error) {
			must(t, os.Mkdir(dirName(name), 0o755))
			must(t, do(dirName(name)+"/tls-socket"))
		}
		must(t, os.WriteFile(dirName("file"), nil, 0o644))
		must(t, os.Symlink("nowhere", dirName("dangling")))
		must(t, os.Symlink(dirName("loop"), dirName("loop")))
		in("empty", func(string) error { return nil })
		in("socket-dangling", func(path string) error { return os.Symlink("nowhere", path) })
		in("socket-beyond", func(path string) error { return os.Symlink("../file/tls-socket", path) })
		in("socket-loop", func(path string) error { return os.Symlink("tls-socket", path) })
		in("regular", func(path string) error { return os.WriteFile(path, nil, 0o777) })
		in("fifo", func(path string) error { return unix.Mkfifo(path, 0o777) })
		in("directory", func(path string) error { return os.Mkdir(path, 0o777) })
		bind(t, "bound", unix.SOCK_STREAM)
		hostdirtest.Abandon(t, dirName("abandoned"))
		tests := map[string]failure{
			"absent":          noDirectory,
			"file":            noDirectory,
			"dangling":        noDirectory,
			"loop":            noDirectory,
			"empty":           noSocket,
			"socket-dangling": dangling,
			"socket-beyond":   dangling,
			"socket-loop":     dangling,
			"regular":         notSocket,
			"fifo":            notSocket,
			"directory":       notSocket,
			"bound":           nobodyListens,
			"abandoned":       nobodyListens,
		}
		if !hostdir.Hashed && w.paths {
			long := strings.Repeat("a", 254)
			must(t, os.Mkdir(dirName(long), 0o755))
			tests[long] = pathTooLong
		}
		base := descriptors(t)
		seen := map[string]failure{}
		for name, want := range tests {
			b, err := dial(name)
			if b != (hostdir.Backend{FD: -1}) {
				t.Errorf("%s: %+v", name, b)
			}
			if got := problem(err); got != want {
				t.Errorf("%s: problem %d, want %d: %v", name, got, want, err)
				continue
			}
			var errno unix.Errno
			if !errors.As(err, &errno) || errno == 0 {
				t.Errorf("%s: no number of a system error in %v", name, err)
			}
			// The message has the problem and the error of the system. Each problem has its own.
			text := strings.TrimSuffix(err.Error(), ": "+errno.Error())
			if other, ok := seen[text]; text == "" || ok && other != want {
				t.Errorf("%s: the message %q does not tell problem %d", name, err, want)
			}
			seen[text] = want
		}
		if got := descriptors(t); got != base {
			t.Errorf("%d descriptors, %d before", got, base)
		}
	})
}

// Goal: a full backlog is reported at once, loses no descriptor, and is over when the backend
// accepts.
func TestDialBacklogFull(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("other systems do not tell a full backlog apart")
	}
	eachWay(t, func(t *testing.T, _ way, dial func(string) (hostdir.Backend, error)) {
		backend := listen(t, "busy", 0)
		err := error(nil)
		for err == nil {
			var b hostdir.Backend
			if b, err = dial("busy"); err == nil {
				t.Cleanup(func() { unix.Close(b.FD) })
			}
		}
		base := descriptors(t)
		for range 3 {
			if _, err := dial("busy"); problem(err) != backlogFull {
				t.Errorf("got %v", err)
			}
		}
		if got := descriptors(t); got != base {
			t.Errorf("%d descriptors, %d before", got, base)
		}
		peer, _, err := unix.Accept(backend)
		must(t, err)
		defer unix.Close(peer)
		b, err := dial("busy")
		must(t, err)
		unix.Close(b.FD)
	})
}

// Goal: a process without free descriptors learns so when it opens the hosts directory, or for each
// host that exists, of whatever kind. That a host does not exist needs no descriptor.
func TestDialNoRoom(t *testing.T) {
	chdir(t)
	listen(t, "good", 8)
	listen(t, "*.wild", 8)
	must(t, os.Symlink(dirName("good"), dirName("link")))
	must(t, os.Symlink(dirName("good"), dirName("*.link")))
	if r := elsewhere(t, "", with(noOpening, "1")); !r.NoOpening && runtime.GOOS == "linux" {
		t.Errorf("it opened the directory: %+v", r)
	}
	r := elsewhere(t, "good a.wild link a.link absent", with(noRoom, "1"))
	for name, entry := range map[string]string{"good": "good", "a.wild": "*.wild", "link": "link", "a.link": "*.link"} {
		got := r.Names[name]
		if got.Problem != withoutRoom || got.Entry != dirName(entry) || got.Owner != uint32(os.Geteuid()) || !got.Administrators {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := r.Names["absent"]; got.Problem != noDirectory {
		t.Errorf("absent: %+v", got)
	}
}

// Goal: directories and sockets without permission are told apart from those that do not exist, and
// once there is permission the host is connected to. A file is no socket, whoever may write to it.
func TestDialNotPermitted(t *testing.T) {
	chdir(t)
	for _, name := range []string{"good", "directory", "socket"} {
		listen(t, name, 8)
	}
	must(t, os.Mkdir(dirName("empty"), 0o755))
	must(t, os.Mkdir(dirName("file"), 0o755))
	must(t, os.WriteFile(dirName("file")+"/tls-socket", nil, 0o444))
	closed := []string{dirName("directory"), dirName("socket") + "/tls-socket", dirName("empty")}
	for _, path := range closed {
		must(t, os.Chmod(path, 0))
	}

	// Root may do everything, so another user asks.
	change := func(*exec.Cmd) {}
	if os.Geteuid() == 0 {
		change = func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
	}
	check := func(when string, want map[string]failure) {
		r := elsewhere(t, strings.Join(slices.Collect(maps.Keys(want)), " "), change)
		for name, want := range want {
			if got := r.Names[name]; got.Problem != want {
				t.Errorf("%s%s: %+v, want problem %d", name, when, got, want)
			}
		}
	}
	check("", map[string]failure{
		"good":      0,
		"directory": notPermitted,
		"socket":    notPermitted,
		"empty":     notPermitted,
		"file":      notSocket,
		"absent":    noDirectory,
	})
	for _, path := range closed {
		must(t, os.Chmod(path, 0o777))
	}
	check(", with permission", map[string]failure{"directory": 0, "socket": 0, "empty": noSocket})
}

// Goal: AppendName appends to what is there, and the directory name has at most MaxName bytes.
func TestAppendName(t *testing.T) {
	for _, name := range []string{"a", "a.example", strings.Repeat("a", 254)} {
		dir := string(hostdir.AppendName(nil, []byte(name)))
		if got := string(hostdir.AppendName([]byte("hosts/"), []byte(name))); got != "hosts/"+dir {
			t.Errorf("%s: got %q, want %q", name, got, "hosts/"+dir)
		}
		if len(dir) > hostdir.MaxName {
			t.Errorf("%s: %d bytes", name, len(dir))
		}
		if !hostdir.Hashed && dir != name {
			t.Errorf("%s: got %q", name, dir)
		}
	}
}
