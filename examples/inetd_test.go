package examples_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: the line for inetd.conf serves, ends gracefully, and is started again for the next client.
// While clients come all the time it is ended five times, and loses none of them.
func TestInetd(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	inetd := hostdirtest.Need(t, "inetd")
	hostdirtest.Need(t, "env")
	dir, hosts, port := hostdirtest.Dir(t), hostdirtest.Dir(t), freePort(t)
	conf := example(t, "inetd/inetd.conf", dir,
		"\n443 stream", "\n127.0.0.1:"+port+" stream",
		"wait sniproxy /usr/bin/env", "wait nobody /usr/bin/env",
		"-C /srv/sniproxy /usr/local/bin/sniproxy\n", "-C "+hosts+" "+daemon(t)+"\n")
	testInetd(t, exec.Command(inetd, "-i", conf), hosts, "127.0.0.1:"+port)
}

// Goal: the same for the service file of xinetd.
func TestXinetd(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	xinetd := hostdirtest.Need(t, "xinetd")
	hostdirtest.Need(t, "env")
	dir, hosts, port := hostdirtest.Dir(t), hostdirtest.Dir(t), freePort(t)
	conf := example(t, "inetd/xinetd.conf", dir,
		"= 443\n", "= "+port+"\n\tbind = ::ffff:127.0.0.1\n",
		"= sniproxy\n", "= nobody\n",
		"-C /srv/sniproxy /usr/local/bin/sniproxy\n", "-C "+hosts+" "+daemon(t)+"\n")
	cmd := exec.Command(xinetd, "-dontfork", "-f", conf, "-filelog", dir+"/log", "-pidfile", dir+"/pid")
	testInetd(t, cmd, hosts, "127.0.0.1:"+port)
}

func testInetd(t *testing.T, cmd *exec.Cmd, hosts, addr string) {
	serve(t, hosts, "a.example")
	hello := snitest.Hello("a.example")
	start(t, cmd)
	hostdirtest.Await(t, "a listening socket", func() bool { return canConnect(addr) })
	first := onlyChild(t, cmd.Process.Pid) // that connection has started it
	serveHanded(t, hosts, "handed.example")
	for _, h := range [][]byte{hello, snitest.Hello("handed.example")} {
		served := startLoad(t, addr, h)
		served.more(500)
		served.end()
	}

	signalAndAwait(t, first, syscall.SIGHUP)
	hostdirtest.Must(t, exchange(addr, hello))
	second := onlyChild(t, cmd.Process.Pid)
	if second == first {
		t.Errorf("process %d serves after its end", first)
	}

	// Clients wait in the backlog until the next program serves them.
	served := startLoad(t, addr, hello)
	served.more(500)
	for range 5 {
		first = second
		signalAndAwait(t, first, syscall.SIGHUP)
		served.more(500)
		if second = onlyChild(t, cmd.Process.Pid); second == first {
			t.Errorf("process %d serves after its end", first)
		}
	}
	served.end()

	// While the old program has a client, it is not replaced, and new ones wait.
	stays, err := connect(addr, hello)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stays, make([]byte, 1)); err != nil { // it has reached its backend
		t.Fatal(err)
	}
	first = second
	hostdirtest.Must(t, syscall.Kill(first, syscall.SIGHUP))
	hostdirtest.Await(t, "the old program to let go of the socket", func() bool { return !listens(t, first) })
	waits, err := connect(addr, hello)
	if err != nil {
		t.Fatal(err)
	}
	if got := children(cmd.Process.Pid); !slices.Equal(got, []int{first}) {
		t.Errorf("processes %d run beside a program that has a client, %d", got, first)
	}
	stays.hello = stays.hello[1:]
	if err := stays.finish(); err != nil {
		t.Errorf("the client that stayed: %v", err)
	}
	if err := waits.finish(); err != nil {
		t.Errorf("the client that waited: %v", err)
	}
	second = onlyChild(t, cmd.Process.Pid)

	// The socket is on 0, 1 and 2 of sniproxy. With its supervisor gone it has the only copies, and
	// its stop must free the port.
	cmd.Process.Kill()
	cmd.Wait()
	if err := exchange(addr, hello); err != nil {
		t.Errorf("without its supervisor: %v", err)
	}
	hostdirtest.Must(t, syscall.Kill(second, syscall.SIGHUP))
	hostdirtest.Await(t, "a free port", func() bool { return canListen(addr) })
}

// Goal: the line for inetd.conf with nowait serves each client with a process of its own, which
// ends with the client. The client gets only what the backend says, or its alert.
func TestInetdNowait(t *testing.T) {
	t.Parallel()
	hostdirtest.NeedRoot(t)
	inetd := hostdirtest.Need(t, "inetd")
	hostdirtest.Need(t, "env")
	dir, hosts, port := hostdirtest.Dir(t), hostdirtest.Dir(t), freePort(t)
	conf := example(t, "inetd/nowait.conf", dir,
		"\n443 stream", "\n127.0.0.1:"+port+" stream",
		" sniproxy /usr/bin/env", " nobody /usr/bin/env",
		"-C /srv/sniproxy /usr/local/bin/sniproxy\n", "-C "+hosts+" "+daemon(t)+"\n")
	testSingle(t, exec.Command(inetd, "-i", conf), hosts, "127.0.0.1:"+port)
}

// Goal: the same under tcpserver of ucspi-tcp.
func TestTcpserver(t *testing.T) {
	t.Parallel()
	tcpserver := hostdirtest.Need(t, "tcpserver")
	hosts, port := hostdirtest.Dir(t), freePort(t)
	options := []string{"-RHl0", "-c", "1000"}
	if os.Getuid() == 0 {
		uid, gid := nobody(t)
		options = append(options, "-u", strconv.Itoa(uid), "-g", strconv.Itoa(gid))
	}
	cmd := exec.Command(tcpserver, append(options, "127.0.0.1", port, daemon(t))...)
	cmd.Dir = hosts
	testSingle(t, cmd, hosts, "127.0.0.1:"+port)
}

// Goal: the same under s6-tcpserver of s6-networking, which few systems have.
func TestS6Tcpserver(t *testing.T) {
	t.Parallel()
	tcpserver, err := exec.LookPath("s6-tcpserver")
	if err != nil {
		t.Skip("s6-tcpserver is not installed")
	}
	hosts, port := hostdirtest.Dir(t), freePort(t)
	cmd := exec.Command(tcpserver, "127.0.0.1", port, daemon(t))
	cmd.Dir = hosts
	testSingle(t, cmd, hosts, "127.0.0.1:"+port)
}

// testSingle tests a supervisor that accepts, and starts a daemon for each connection.
func testSingle(t *testing.T, cmd *exec.Cmd, hosts, addr string) {
	serve(t, hosts, "a.example")
	serveHanded(t, hosts, "handed.example")
	known, unknown := snitest.Hello("a.example"), snitest.Hello("unknown.example")
	start(t, cmd)
	hostdirtest.Await(t, "a listening socket", func() bool { return canConnect(addr) })
	for _, hello := range [][]byte{known, snitest.Hello("handed.example")} {
		served := startLoad(t, addr, hello)
		served.more(100)
		served.end()
	}

	// A daemon that has handed its client over ends, and the client stays.
	handed, err := connect(addr, snitest.Hello("handed.example"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(handed, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	hostdirtest.Await(t, "the end of all processes", func() bool { return len(children(cmd.Process.Pid)) == 0 })
	handed.hello = handed.hello[1:]
	if err := handed.finish(); err != nil {
		t.Errorf("a client that was handed over: %v", err)
	}

	refused, err := connect(addr, unknown)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(refused)
	refused.Close()
	if want := "\x15\x03\x03\x00\x02\x02\x70"; string(got) != want || err != nil { // unrecognized_name
		t.Errorf("a client that is refused got %q, error %v, want %q", got, err, want)
	}
	hostdirtest.Await(t, "the end of all processes", func() bool { return len(children(cmd.Process.Pid)) == 0 })

	var stay []client
	for range 3 {
		c, err := connect(addr, known)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // it has reached its backend
			t.Fatal(err)
		}
		stay = append(stay, c)
	}
	pids := children(cmd.Process.Pid)
	if len(pids) != len(stay) {
		t.Fatalf("%d processes for %d clients", len(pids), len(stay))
	}
	for _, pid := range pids {
		if !executes(pid, daemon(t)) {
			t.Errorf("process %d is not sniproxy", pid)
		}
		// A stop is graceful, so it harms no client.
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}
	for _, c := range stay {
		c.hello = c.hello[1:]
		if err := c.finish(); err != nil {
			t.Error(err)
		}
	}
	hostdirtest.Await(t, "the end of all processes", func() bool { return len(children(cmd.Process.Pid)) == 0 })
}

// listens tells whether a process has a listening TCP socket.
func listens(t *testing.T, pid int) bool {
	t.Helper()
	var listening []string
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(b)) {
			// proc_pid_net(5): the fourth field is the state, 0A for LISTEN, the tenth the inode.
			if fields := strings.Fields(line); len(fields) > 9 && fields[3] == "0A" {
				listening = append(listening, "socket:["+fields[9]+"]")
			}
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		to, _ := os.Readlink(dir + e.Name())
		return slices.Contains(listening, to)
	})
}
