package examples_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// A server listens on a TCP address, for a forwarder. It sends every byte back, at once, and when
// its client has ended, it says goodbye, later.
type server struct {
	*net.TCPListener
	served atomic.Int64
	mu     sync.Mutex
	open   map[net.Conn]bool
}

const (
	goodbye = "goodbye"

	// later is longer than the half second that socat gives the other side by default.
	later = 700 * time.Millisecond
)

// startServer starts a server on an address of its own, or on the one given. With header, each
// connection must begin with a PROXY header of version 2 for TCP; others are closed.
func startServer(t *testing.T, addr string, header bool) *server {
	t.Helper()
	s := &server{TCPListener: hostdirtest.ListenTCP(t, "tcp", addr), open: map[net.Conn]bool{}}
	go func() {
		for {
			c, err := s.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				s.mu.Lock()
				s.open[c] = true
				s.mu.Unlock()
				defer func() {
					s.mu.Lock()
					delete(s.open, c)
					s.mu.Unlock()
					c.Close()
				}()
				s.serve(c, header)
			}()
		}
	}()
	t.Cleanup(s.stop)
	return s
}

func (s *server) serve(c *net.TCPConn, header bool) {
	c.SetDeadline(time.Now().Add(4 * hostdirtest.Patience))
	if header && !readHeader(c) {
		return
	}
	s.served.Add(1)
	io.Copy(c, c)
	<-time.After(later)
	io.WriteString(c, goodbye)
}

// readHeader reads a PROXY header of version 2 that has addresses.
func readHeader(r io.Reader) bool {
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return false
	}
	_, err := io.CopyN(io.Discard, r, int64(head[14])<<8+int64(head[15]))
	const version2, proxy, tcp4 = 0x20, 0x01, 0x11
	return err == nil && bytes.HasPrefix(head, []byte("\r\n\r\n\x00\r\nQUIT\n")) && head[12] == version2|proxy && head[13] == tcp4
}

// stop ends the server with its connections, as its restart does.
func (s *server) stop() {
	s.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		c.Close()
	}
}

// exchangeOpen is one client that does not end its side before it has got back all that it has
// sent.
func exchangeOpen(addr string, hello []byte) error {
	c, err := connect(addr, hello)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.back()
}

// back reads back the hello of a client.
func (c client) back() error {
	got := make([]byte, len(c.hello))
	n, err := io.ReadFull(c, got)
	if err == nil && !bytes.Equal(got, c.hello) || n < len(got) {
		err = fmt.Errorf("sent %d bytes, got back %d: %.20x, error %v", len(c.hello), n, got[:n], err)
	}
	return err
}

// exchangeHalf is one client that ends its side at once, and waits for all that the server sends.
func exchangeHalf(addr string, hello []byte) error {
	c, err := connect(addr, hello)
	if err != nil {
		return err
	}
	c.hello = append(bytes.Clone(hello), goodbye...)
	return c.finish()
}

// expectClients expects that n clients are served at once.
func expectClients(t *testing.T, addr string, hello []byte, n int) {
	t.Helper()
	clients := make([]client, n)
	failed := inParallel(n, func(i int) error {
		var err error
		if clients[i], err = connect(addr, hello); err == nil {
			err = clients[i].back()
		}
		return err
	})
	for _, c := range clients {
		if c.TCPConn != nil {
			c.Close()
		}
	}
	if len(failed) > 0 {
		t.Errorf("%d of %d clients at once failed: %v", len(failed), n, failed[0])
	}
}

// expectRefused expects that a client is told that there is no such host, or that its backend is
// down.
func expectRefused(t *testing.T, addr string, hello []byte) {
	t.Helper()
	c, err := connect(addr, hello)
	hostdirtest.Must(t, err)
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "\x15\x03\x03\x00\x02\x02\x70" { // unrecognized_name
		t.Errorf("a client got %q, error %v, want alert 112", got, err)
	}
}

// Goal: socat.sh forwards many clients at once; one that ends its side gets its answer; a socket
// that an earlier run has left is no obstacle, nor is any umask; a successor replaces it without a
// gap, and the end of the old one takes nothing away.
func TestForwardSocat(t *testing.T) {
	t.Parallel()
	hostdirtest.Need(t, "socat")
	hosts := hostdirtest.Dir(t)
	addr := startProxy(t, hosts)
	dir := filepath.Join(hosts, hostdirtest.Entry("two.example"))
	hostdirtest.Must(t, os.Mkdir(dir, 0o755))
	to := startServer(t, "127.0.0.1:0", false)
	script := example(t, "forward/socat.sh", hostdirtest.Dir(t),
		"cd /srv/sniproxy/two.example\n", "umask 077\ncd "+dir+"\n",
		"TCP:192.0.2.7:443", "TCP:"+to.Addr().String())
	hello := snitest.Hello("two.example")
	run := func() *exec.Cmd {
		t.Helper()
		cmd := exec.Command(script)
		start(t, cmd)
		hostdirtest.Await(t, "socat", func() bool {
			c, err := net.Dial("unix", filepath.Join(dir, "tls-socket"))
			if err == nil {
				c.Close()
			}
			return err == nil && executes(cmd.Process.Pid, hostdirtest.Need(t, "socat"))
		})
		return cmd
	}
	first := run()
	hostdirtest.Must(t, exchangeHalf(addr, hello))
	if info, err := os.Stat(filepath.Join(dir, "tls-socket")); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("the socket has mode %v, error %v, want 0666", info.Mode(), err)
	}
	first.Process.Kill()
	first.Wait()
	expectRefused(t, addr, hello)
	first = run()
	expectClients(t, addr, hello, many()*9/10)

	socket := filepath.Join(dir, "tls-socket")
	before, err := os.Stat(socket)
	hostdirtest.Must(t, err)
	start(t, exec.Command(script))
	hostdirtest.Await(t, "the successor", func() bool {
		after, err := os.Stat(socket)
		return err == nil && !os.SameFile(before, after) && exchangeOpen(addr, hello) == nil
	})
	first.Process.Signal(syscall.SIGTERM)
	first.Wait()
	hostdirtest.Must(t, exchangeHalf(addr, hello))

	// The server restarts.
	to.stop()
	startServer(t, to.Addr().String(), false)
	hostdirtest.Must(t, exchangeHalf(addr, hello))

	hostdirtest.Must(t, os.RemoveAll(dir))
	expectRefused(t, addr, hello)
}

// Goal: HAProxy with the example forwards all names below kube.example to three servers, with the
// clients' addresses, and a client that ends its side gets its answer. Without two of the servers
// it serves on, at once, and does so when one of them is back.
func TestForwardKubernetes(t *testing.T) {
	t.Parallel()
	haproxy := hostdirtest.Need(t, "haproxy")
	hosts := hostdirtest.Dir(t)
	addr := startProxy(t, hosts)
	dir := filepath.Join(hosts, hostdirtest.Entry("*.kube.example"))
	hostdirtest.Must(t, os.Mkdir(dir, 0o755))
	hostdirtest.Touch(t, filepath.Join(dir, "send-proxy-v2"))
	servers := []*server{}
	replace := []string{"'/srv/sniproxy/*.kube.example/tls-socket'", "'" + filepath.Join(dir, "tls-socket") + "'"}
	for i := range 3 {
		s := startServer(t, "127.0.0.1:0", true)
		servers = append(servers, s)
		replace = append(replace, fmt.Sprintf("192.0.2.1%d:443", i+1), s.Addr().String())
	}
	config := example(t, "forward/kubernetes.cfg", hostdirtest.Dir(t), replace...)
	defaults := haproxyDefaults(t)
	start(t, exec.Command(haproxy, "-db", "-f", defaults, "-f", config))
	hello := snitest.Hello("app.kube.example")
	hostdirtest.Await(t, "HAProxy", func() bool { return exchangeOpen(addr, hello) == nil })
	expectRefused(t, addr, snitest.Hello("a.b.kube.example"))
	hostdirtest.Must(t, exchangeHalf(addr, snitest.Hello("other.kube.example")))
	expectClients(t, addr, hello, many())
	for i, s := range servers {
		if s.served.Load() == 0 {
			t.Errorf("server %d has served nobody", i)
		}
	}
	for _, s := range servers[1:] {
		s.stop()
	}
	clients := startLoadOf(t, func() error { return exchangeOpen(addr, hello) })
	clients.more(50)
	if len(clients.failed) > 0 {
		clients.end()
		return
	}
	back := startServer(t, servers[1].Addr().String(), true)
	served := back.served.Load()
	hostdirtest.Await(t, "a server that is back", func() bool { return back.served.Load() > served })
	clients.more(50)
	clients.end()
}

// unitForwarder makes the host two.example as sniproxy-to@.socket describes it, for a server, and
// returns its hello and the instance's name.
func unitForwarder(t *testing.T, to string) (hello []byte, instance string) {
	t.Helper()
	const name = "two.example"
	instance = hostdirtest.Entry(name)
	command(t, "install", "-d", "-m", "0710", "-g", "sniproxy", "/srv/sniproxy/"+instance)
	command(t, "install", "-d", "/etc/sniproxy-to")
	hostdirtest.Must(t, os.WriteFile("/etc/sniproxy-to/"+instance, []byte("TO="+to+"\n"), 0o644))
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "enable", "--now", "sniproxy-to@"+instance+".socket")
	t.Cleanup(func() {
		exec.Command("systemctl", "disable", "--now", "sniproxy-to@"+instance+".socket", "sniproxy-to@"+instance+".service").Run()
		os.RemoveAll("/srv/sniproxy/" + instance)
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "-u", "sniproxy-to*").CombinedOutput()
			t.Logf("%.5000s", out)
		}
	})
	return snitest.Hello(name), instance
}

// Goal: sniproxy-to@.socket and its service forward many clients at once, more than the program
// does by default; restarts of the server and of the service, and kill -9 with a socket left, do no
// harm; the host is removed as the comment says.
func testUnitsForward(t *testing.T) {
	startUnits(t)
	to := startServer(t, "127.0.0.1:0", false)
	hello, instance := unitForwarder(t, to.Addr().String())
	socket, service := "sniproxy-to@"+instance+".socket", "sniproxy-to@"+instance+".service"
	hostdirtest.Must(t, exchangeOpen(unitAddr, hello))
	expectClients(t, unitAddr, hello, many())

	to.stop()
	startServer(t, to.Addr().String(), false)
	hostdirtest.Must(t, exchangeOpen(unitAddr, hello))
	command(t, "systemctl", "restart", service)
	hostdirtest.Must(t, exchangeOpen(unitAddr, hello))
	for range 7 { // more than systemd's default limit
		killed := mainPID(t, service)
		command(t, "systemctl", "kill", "--signal=SIGKILL", service)
		hostdirtest.Await(t, "the end of the killed process", func() bool { return mainPID(t, service) != killed })
		hostdirtest.Must(t, exchangeOpen(unitAddr, hello))
	}
	expectStaleSocket(t, instance, socket, service)
	hostdirtest.Must(t, exchangeOpen(unitAddr, hello))

	command(t, "systemctl", "disable", "--now", socket, service)
	hostdirtest.Must(t, os.RemoveAll("/srv/sniproxy/"+instance))
	expectRefused(t, unitAddr, hello)
	hostdirtest.Must(t, exchange(unitAddr, snitest.Hello(unitHost)))
}

// expectStaleSocket stops the units of a host, and starts the socket again where a socket was left,
// as after a power loss.
func expectStaleSocket(t *testing.T, instance, socket, service string) {
	t.Helper()
	command(t, "systemctl", "stop", socket, service)
	path := "/srv/sniproxy/" + instance + "/tls-socket"
	os.Remove(path)
	hostdirtest.Abandon(t, filepath.Dir(path))
	command(t, "systemctl", "start", socket)
}

// Goal: with sniproxy-socat@.service a client that ends its side gets its answer, there may be many
// at once, a restart cuts none that is open, and a socket that was left is no obstacle.
func testUnitsSocat(t *testing.T) {
	startUnits(t)
	const name = "two.example"
	to := startServer(t, "127.0.0.1:0", false)
	instance, hello := hostdirtest.Entry(name), snitest.Hello(name)
	dir, service := "/srv/sniproxy/"+instance, "sniproxy-socat@"+instance+".service"
	command(t, "install", "-d", "-m", "0710", "-o", "sniproxy-to", "-g", "sniproxy", dir)
	command(t, "install", "-d", "/etc/sniproxy-to")
	hostdirtest.Must(t, os.WriteFile("/etc/sniproxy-to/"+instance, []byte("TO="+to.Addr().String()+"\n"), 0o644))
	command(t, "systemctl", "daemon-reload")
	serves := func() bool { return exchangeOpen(unitAddr, hello) == nil }
	command(t, "systemctl", "enable", "--now", service)
	t.Cleanup(func() {
		exec.Command("systemctl", "kill", "--signal=SIGKILL", service).Run()
		exec.Command("systemctl", "disable", "--now", service).Run()
		os.RemoveAll(dir)
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "-u", service).CombinedOutput()
			t.Logf("%.5000s", out)
		}
	})
	hostdirtest.Await(t, "socat", serves)
	hostdirtest.Must(t, exchangeHalf(unitAddr, hello))
	expectClients(t, unitAddr, hello, many())
	stays, err := connect(unitAddr, hello)
	hostdirtest.Must(t, err)
	hostdirtest.Must(t, stays.back())
	before := mainPID(t, service)
	command(t, "systemctl", "restart", service)
	if after := mainPID(t, service); after == before {
		t.Errorf("process %d serves after the restart", before)
	}
	hostdirtest.Await(t, "socat again", serves)
	stays.hello = []byte(goodbye)
	if err := stays.finish(); err != nil {
		t.Errorf("a client that stayed through a restart: %v", err)
	}
	killed := mainPID(t, service)
	command(t, "systemctl", "kill", "--signal=SIGKILL", service)
	hostdirtest.Await(t, "the end of the killed process", func() bool { return mainPID(t, service) != killed })
	hostdirtest.Await(t, "socat over its old socket", serves)
	command(t, "systemctl", "disable", "--now", service)
	hostdirtest.Must(t, os.RemoveAll(dir))
	expectRefused(t, unitAddr, hello)
}

// documents is where tests under systemd find example files that they install themselves.
const documents = "/usr/share/doc/sniproxy/"

// Goal: under a real systemd the recipes with units do what they say.
func TestSystemdRecipes(t *testing.T) {
	if os.Getenv(inside) != "" {
		t.Run("verify", func(t *testing.T) {
			for _, begin := range []string{"sniproxy-to", "sniproxy-socat", "sniproxy-accept", "one.example"} {
				verifyUnits(t, "--system", "/etc/systemd/system/"+begin)
			}
		})
		t.Run("accept", testUnitsAccept)
		t.Run("forward", testUnitsForward)
		t.Run("socat", testUnitsSocat)
		t.Run("activated", testUnitsActivated)
		t.Run("activated for a user", testUnitsActivatedUser)
		t.Run("nginx", testUnitsNginx)
		return
	}
	t.Parallel()
	if testing.Short() {
		t.Skip("the same without -short")
	}
	for _, program := range []string{"socat", "nginx", "python3", "/lib/systemd/systemd-socket-proxyd"} {
		hostdirtest.Need(t, program)
	}
	args := []string{"-u", "alice", "-u", "sniproxy-to", "-f", daemon(t) + ":" + binary, "-f", build(t, "sniproxy-check") + ":" + binary + "-check"}
	absolute := func(file string) string {
		path, err := filepath.Abs(file)
		hostdirtest.Must(t, err)
		return path
	}
	for _, file := range []string{"backends/nginx.conf", "backends/nginx.service.conf", "backends/server.py", "backends/one.example.socket", "backends/one.example.service"} {
		args = append(args, "-f", absolute(file)+":"+documents+filepath.Base(file)+":644")
	}
	for _, dir := range []string{"systemd", "forward", "backends"} {
		args = append(args, absolute(dir))
	}
	hostdirtest.InSystemd(t, "..", inside+"=1", args...)
}

// unitSite returns a site behind the proxy of the units, whose host has the directory that the
// examples say, in a systemd of the test's own.
func unitSite(t *testing.T) *backendSite {
	t.Helper()
	s := &backendSite{t: t, dir: "/srv/sniproxy/one.example", addr: unitAddr}
	command(t, "install", "-d", "-m", "0710", "-g", "sniproxy", s.dir)
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	s.makeCertificate()
	command(t, "install", "-D", "-m", "644", s.chain, "/etc/ssl/one.example.crt")
	command(t, "install", "-D", "-m", "644", s.key, "/etc/ssl/private/one.example.key")
	command(t, "chmod", "755", "/etc/ssl/private")
	return s
}

// Goal: a server with a socket of systemd serves as a user of its own; a restart under load loses
// no client; neither kill -9 nor a socket that was left ends the host.
func testUnitsActivated(t *testing.T) {
	startUnits(t)
	const socket, service = "one.example.socket", "one.example.service"
	s := unitSite(t)
	command(t, "install", "-D", "-m", "644", documents+"server.py", "/srv/one.example/server.py")
	command(t, "systemctl", "enable", "--now", socket)
	t.Cleanup(func() {
		exec.Command("systemctl", "disable", "--now", socket, service).Run()
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "-u", "one.example*").CombinedOutput()
			t.Logf("%.5000s", out)
		}
	})
	s.expect(false)
	var stat syscall.Stat_t
	hostdirtest.Must(t, syscall.Stat(fmt.Sprintf("/proc/%d", mainPID(t, service)), &stat))
	if got := strconv.Itoa(int(stat.Uid)); got != command(t, "id", "-u", "alice") {
		t.Errorf("the server runs as user %s", got)
	}
	pages := s.startPages()
	for range 3 {
		pages.more(20)
		command(t, "systemctl", "restart", service)
	}
	pages.more(20)
	pages.end()
	killed := mainPID(t, service)
	command(t, "systemctl", "kill", "--signal=SIGKILL", service)
	hostdirtest.Await(t, "the end of the killed process", func() bool { return mainPID(t, service) != killed })
	s.expect(false)
	expectStaleSocket(t, "one.example", socket, service)
	s.expect(false)
	command(t, "systemctl", "disable", "--now", socket, service)
	hostdirtest.Must(t, os.RemoveAll(s.dir))
	expectRefused(t, unitAddr, snitest.Hello("one.example"))
}

// Goal: a tenant has the same from its own systemd, also after the machine has started and nobody
// has logged in.
func testUnitsActivatedUser(t *testing.T) {
	const tenant = "bob"
	startUnits(t)
	command(t, "useradd", "--create-home", "--groups=sniproxy-hosts", tenant)
	uid := command(t, "id", "-u", tenant)
	as := func(line string) {
		t.Helper()
		command(t, "setpriv", "--reuid="+tenant, "--regid="+tenant, "--init-groups", "--reset-env", "env", "-C", "/home/"+tenant,
			"USER="+tenant, "XDG_RUNTIME_DIR=/run/user/"+uid, "sh", "-euc", line)
	}
	s := &backendSite{t: t, dir: "/srv/sniproxy/one.example", addr: unitAddr}
	s.makeCertificate()
	as("mkdir -m 0711 " + s.dir)
	manager := "user@" + uid + ".service"
	t.Cleanup(func() {
		command(t, "systemctl", "stop", manager)
		os.RemoveAll(s.dir)
	})
	as(`loginctl enable-linger "$USER"`)
	awaitProperty(t, manager, "ActiveState", "active")
	as("mkdir -p ~/.config/systemd/user; cp " + documents + "one.example.socket ~/.config/systemd/user/; " +
		"sed '/^# What systemd can do as root/,$d; s|/srv/one.example/|%h/|' " + documents + "one.example.service >~/.config/systemd/user/one.example.service; " +
		"sed 's|/etc/ssl/one.example.crt|" + s.chain + "|; s|/etc/ssl/private/one.example.key|" + s.key + "|' " + documents + "server.py >~/server.py; " +
		"systemctl --user daemon-reload; systemctl --user enable --now one.example.socket")
	s.expect(false)
	command(t, "systemctl", "restart", manager)
	s.expect(false)
}

// Goal: with the drop-in nginx starts although its sockets are still there, and without it does
// not. A host is removed as the example says.
func testUnitsNginx(t *testing.T) {
	startUnits(t)
	s := unitSite(t)
	s.mark("send-proxy-v1")
	const unit, config, dropIns = "nginx.service", "/etc/nginx/conf.d/one.example.conf", "/etc/systemd/system/nginx.service.d"
	content := strings.Replace(fileText(t, documents+"nginx.conf"), "proxy_pass http://127.0.0.1:8080;", `return 200 "This is $host for $remote_addr.\n";`, 1)
	hostdirtest.Must(t, os.WriteFile(config, []byte(content), 0o644))
	command(t, "cp", "/lib/systemd/system/nginx.service", "/etc/systemd/system/")
	t.Cleanup(func() {
		exec.Command("systemctl", "kill", "--signal=SIGKILL", unit).Run()
		os.Remove("/etc/systemd/system/" + unit)
		os.RemoveAll(dropIns)
		os.Remove(config)
		command(t, "systemctl", "daemon-reload")
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "-u", unit).CombinedOutput()
			t.Logf("%.5000s", out)
		}
	})
	kill := func() {
		t.Helper()
		command(t, "systemctl", "kill", "--signal=SIGKILL", unit)
		hostdirtest.Await(t, "the end of nginx", func() bool { return property(t, unit, "ActiveState") == "failed" })
		if _, err := os.Lstat(s.dir + "/tls-socket"); err != nil {
			t.Errorf("nginx has left no socket: %v", err)
		}
	}
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "start", unit)
	s.expect(true)
	kill()
	if err := exec.Command("systemctl", "start", unit).Run(); err == nil {
		t.Error("nginx starts over its old socket: the drop-in is not needed")
	}
	command(t, "install", "-D", "-m", "644", documents+"nginx.service.conf", dropIns+"/sniproxy.conf")
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "start", unit)
	s.expect(true)
	kill()
	command(t, "systemctl", "start", unit)
	s.expect(true)
	command(t, "systemctl", "restart", unit)
	s.expect(true)

	hostdirtest.Must(t, os.Remove(config))
	command(t, "systemctl", "reload", unit)
	hello := snitest.Hello("one.example")
	hostdirtest.Await(t, "nginx without the host", func() bool {
		c, err := net.Dial("unix", s.dir+"/tls-socket")
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	expectRefused(t, unitAddr, hello)
	hostdirtest.Must(t, os.RemoveAll(s.dir))
	command(t, "systemctl", "restart", unit)
	expectRefused(t, unitAddr, hello)
}
