package examples_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// inside is set in the environment of the test binary that runs beside the real systemd.
const inside = "SNIPROXY_TEST_INSIDE"

// Goal: under a real systemd the units, as they are, serve; restart, upgrade and stop without
// losing a client; and recover from kill -9. The script systemd-run.sh starts that systemd, and
// this test again inside. It is looked for beside this project, and is no part of it.
func TestSystemd(t *testing.T) {
	if os.Getenv(inside) != "" {
		t.Run("verify", testUnitsVerify)
		t.Run("start and stop", testUnitsStartAndStop)
		t.Run("restart", testUnitsRestart)
		t.Run("upgrade", testUnitsUpgrade)
		t.Run("upgrades", testUnitsUpgrades)
		t.Run("kill", testUnitsKill)
		t.Run("several sockets", testUnitsSeveral)
		t.Run("check", testUnitsCheck)
		return
	}
	t.Parallel()
	hostdirtest.InSystemd(t, "..", inside+"=1", installed(t)...)
}

// installed returns the arguments with which systemd-run.sh installs the programs and the units.
func installed(t *testing.T) (args []string) {
	t.Helper()
	units, err := filepath.Abs("systemd")
	hostdirtest.Must(t, err)
	for from, to := range map[string]string{
		daemon(t):                             binary + ":755",
		build(t, "sniproxy-check"):            binary + "-check:755",
		build(t, "sniproxy-ech"):              binary + "-ech:755",
		build(t, "sniproxy-tls"):              binary + "-tls:755",
		build(t, "sniproxy-redirect"):         binary + "-redirect:755",
		units + "/several/socket.conf":        severalDir + "socket.conf:644",
		units + "/several/service.conf":       severalDir + "service.conf:644",
		units + "/user/sniproxy-tls@.service": userUnits + "sniproxy-tls@.service:644",
		units + "/user/sniproxy-tls@.socket":  userUnits + "sniproxy-tls@.socket:644",
	} {
		args = append(args, "-f", from+":"+to)
	}
	// The units of users are not for the system.
	for _, pattern := range []string{"*.socket", "*.service", "*.timer", "*.d/*.conf"} {
		files, err := filepath.Glob(filepath.Join(units, pattern))
		hostdirtest.Must(t, err)
		args = append(args, files...)
	}
	return args
}

const (
	binary   = "/usr/local/bin/sniproxy"
	unitAddr = "127.0.0.1:443" // of the tests' own network
	unitHost = "a.example"

	unitHanded = "handed.example" // a host whose connections are handed over

	severalDir = "/usr/share/doc/sniproxy/several/" // the drop-ins, which one test installs

	nextUnit = "/etc/systemd/system/sniproxy-next.service"

	userUnits = "/usr/share/doc/sniproxy/user/" // which one test installs for a user
)

// drain is how long open connections have at a stop, unless that is by SIGQUIT.
const drain = 10 * time.Second

func mainPID(t *testing.T, unit string) int {
	t.Helper()
	pid, err := strconv.Atoi(property(t, unit, "MainPID"))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// property returns a property of a unit.
func property(t *testing.T, unit, name string) string {
	t.Helper()
	return command(t, "systemctl", "show", "--value", "--property="+name, unit)
}

// awaitProperty waits until a unit has the value for the property.
func awaitProperty(t *testing.T, unit, name, value string) {
	t.Helper()
	hostdirtest.Await(t, unit+" with "+name+"="+value, func() bool { return property(t, unit, name) == value })
}

// verifyUnits has systemd find fault with the unit files whose paths begin so, for --system or
// --user.
func verifyUnits(t *testing.T, manager, prefix string) {
	t.Helper()
	var units []string
	for _, kind := range []string{"service", "socket", "timer"} {
		found, err := filepath.Glob(prefix + "*." + kind)
		hostdirtest.Must(t, err)
		units = append(units, found...)
	}
	if len(units) == 0 {
		t.Errorf("there are no units %s*", prefix)
	}
	for _, unit := range units {
		cmd := exec.Command("systemd-analyze", manager, "verify", "--man=no", unit)
		// Units beside it come before those of the system.
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR=/run", "HOME=/root", "SYSTEMD_UNIT_PATH="+filepath.Dir(unit)+":")
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), filepath.Base(unit)) {
			t.Errorf("%s: %v\n%s", cmd, err, out)
		}
	}
}

// Goal: systemd finds no fault with any unit file, also those for users.
func testUnitsVerify(t *testing.T) {
	verifyUnits(t, "--system", "/etc/systemd/system/sniproxy")
	verifyUnits(t, "--user", userUnits)
}

// startUnits makes a host and starts the socket. It returns the host's hello.
func startUnits(t *testing.T) []byte {
	t.Helper()
	serve(t, "/srv/sniproxy", unitHost)
	serveHanded(t, "/srv/sniproxy", unitHanded)
	command(t, "systemctl", "start", "sniproxy.socket")
	t.Cleanup(func() {
		command(t, "systemctl", "stop", "sniproxy.socket", "sniproxy.service", "sniproxy-next.service")
		if t.Failed() {
			out, _ := exec.Command("journalctl", "--no-pager", "-u", "sniproxy*").CombinedOutput()
			t.Logf("%s", out)
		}
	})
	return snitest.Hello(unitHost)
}

// checkStopped checks that a service has ended as it should.
func checkStopped(t *testing.T, unit string) {
	t.Helper()
	for name, want := range map[string]string{"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"} {
		if got := property(t, unit, name); got != want {
			t.Errorf("%s has %s=%s, want %s", unit, name, got, want)
		}
	}
}

// Goal: the first client, of either family, starts the service; it sees nothing but itself and the
// hosts; its lines are in the journal; a key made as sniproxy-ech(7) has it done is in use; the
// stop frees the port and is a success.
func testUnitsStartAndStop(t *testing.T) {
	t.Cleanup(func() { os.RemoveAll("/srv/sniproxy/.ech") })
	command(t, "sh", "-e", "-c", "cd /srv/sniproxy; mkdir -m 0750 .ech; chgrp sniproxy .ech; "+
		binary+"-ech public.example >.ech/.new; mv .ech/.new .ech/key.pem")
	hello := startUnits(t)
	if got := property(t, "sniproxy.service", "ActiveState"); got != "inactive" {
		t.Errorf("the service is %s before the first client", got)
	}
	for _, addr := range []string{"[::1]:443", unitAddr} {
		hostdirtest.Must(t, exchange(addr, hello))
		hostdirtest.Must(t, exchange(addr, snitest.Hello(unitHanded)))
	}
	pid := mainPID(t, "sniproxy.service")
	// systemd leaves the empty directory incoming in every root that it makes.
	const want = "/run /run/systemd /run/systemd/incoming /srv /srv/sniproxy /usr /usr/local /usr/local/bin /usr/local/bin/sniproxy"
	if got := visible(t, pid, "/srv/sniproxy"); got != want {
		t.Errorf("the service sees %s, want %s", got, want)
	}
	command(t, "systemctl", "stop", "sniproxy.socket") // and with it, the service
	checkStopped(t, "sniproxy.service")
	for _, addr := range []string{"[::]:443", unitAddr} {
		if !canListen(addr) {
			t.Errorf("%s is not free after the stop", addr)
		}
	}
	for _, line := range []string{"listening on [::]:443\n", "keys for Encrypted Client Hello in use: key.pem (", "got SIGHUP, shutting down\n"} {
		hostdirtest.Await(t, line+" in the journal", func() bool {
			out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "--unit=sniproxy.service").Output()
			return err == nil && strings.Contains(string(out), line)
		})
	}
}

// Goal: a restart under load loses no client.
func testUnitsRestart(t *testing.T) {
	l := startLoad(t, unitAddr, startUnits(t))
	l.more(500)
	for range 3 {
		before := mainPID(t, "sniproxy.service")
		command(t, "systemctl", "restart", "sniproxy.service")
		l.more(500)
		if after := mainPID(t, "sniproxy.service"); after == before {
			t.Errorf("process %d serves after the restart", before)
		}
	}
	l.end()
}

// upgradeCommands are those of sniproxy-next.service for an upgrade: up to the moment at which the
// old program accepts nobody more, and what comes when sniproxy.service runs the new one.
func upgradeCommands(t *testing.T, file string) (begin, end string) {
	t.Helper()
	commands := firsts(t, `(?m)^#     (.*?)(?: +#.*)?$`, fileText(t, file))
	if len(commands) != 4 || !strings.HasPrefix(commands[0], "install new/sniproxy ") {
		t.Fatalf("the commands for an upgrade are %q", commands)
	}
	return strings.Join(commands[:3], "\n"), commands[3]
}

// serveDownload makes a host that sends bytes, slowly, until end is called, which returns how many
// there were.
func serveDownload(t *testing.T, dir string) (end func() int64) {
	t.Helper()
	over, sent := make(chan struct{}), new(atomic.Int64)
	stop := sync.OnceFunc(func() { close(over) })
	served := make(chan struct{})
	hostdirtest.Serve(t, dir, func(c *net.UnixConn) {
		defer close(served)
		go io.Copy(io.Discard, c) // what is not read becomes a reset
		for {
			n, err := c.Write(make([]byte, 1000))
			sent.Add(int64(n))
			if err != nil {
				return
			}
			select {
			case <-over:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	t.Cleanup(func() {
		stop()
		os.RemoveAll(dir)
	})
	return func() int64 {
		stop()
		<-served
		return sent.Load()
	}
}

// Goal: an upgrade as sniproxy-next.service describes it, under load, loses no client, lets none
// wait, and cuts no download, although one takes longer than the ten seconds that a restart leaves
// to it.
func testUnitsUpgrade(t *testing.T) {
	hello := startUnits(t)
	end := serveDownload(t, "/srv/sniproxy/download.example")
	begin, after := upgradeCommands(t, nextUnit)
	l := startLoad(t, unitAddr, hello)
	l.more(1000)
	download, err := connect(unitAddr, snitest.Hello("download.example"))
	hostdirtest.Must(t, err)
	received := make(chan int64, 1)
	go func() {
		defer download.Close()
		n, err := io.Copy(io.Discard, download)
		if err != nil {
			t.Errorf("the download: %v", err)
		}
		received <- n
	}()
	old := mainPID(t, "sniproxy.service")
	dir := hostdirtest.Dir(t)
	command(t, "install", "-D", binary, dir+"/new/sniproxy")
	shell(t, dir, begin)
	ten := time.After(drain + time.Second)
	if executes(old, binary) {
		t.Error("the program was not replaced")
	}
	journal := func(line string) {
		t.Helper()
		hostdirtest.Await(t, line+" in the journal", func() bool {
			out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "_PID="+strconv.Itoa(old)).Output()
			return err == nil && slices.Contains(strings.Split(string(out), "\n"), line)
		})
	}
	journal("got SIGQUIT, shutting down")
	l.more(500) // served by the new program alone
	l.end()
	clients := time.NewTicker(50 * time.Millisecond)
	defer clients.Stop()
	for waits := true; waits; {
		select {
		case <-ten:
			waits = false
		case <-clients.C:
			hostdirtest.Must(t, exchange(unitAddr, hello))
		}
	}
	if pid := mainPID(t, "sniproxy.service"); pid != old || !executes(mainPID(t, "sniproxy-next.service"), binary) {
		t.Errorf("process %d is sniproxy.service during the download, and %d was before", pid, old)
	}
	sent := end()
	if n := <-received; n != sent {
		t.Errorf("%d bytes of the download have arrived, of %d", n, sent)
	}
	hostdirtest.Await(t, "the new program", func() bool {
		pid := mainPID(t, "sniproxy.service")
		return pid != old && executes(pid, binary)
	})
	l = startLoad(t, unitAddr, hello)
	l.more(500)
	shell(t, "/", after)
	awaitProperty(t, "sniproxy-next.service", "ActiveState", "inactive")
	l.more(500)
	l.end()
	checkStopped(t, "sniproxy-next.service")
	if got := property(t, "sniproxy.service", "NRestarts"); got != "1" {
		t.Errorf("systemd has started the service again %s times, want once", got)
	}
}

// Goal: three upgrades under load, one after the other, lose no client.
func testUnitsUpgrades(t *testing.T) {
	l := startLoad(t, unitAddr, startUnits(t))
	l.more(500)
	begin, end := upgradeCommands(t, nextUnit)
	_, begin, _ = strings.Cut(begin, "\n") // the program stays
	for range 3 {
		before := mainPID(t, "sniproxy.service")
		shell(t, "/", begin)
		hostdirtest.Await(t, "another process", func() bool {
			pid := mainPID(t, "sniproxy.service")
			return pid != 0 && pid != before
		})
		l.more(500)
		shell(t, "/", end)
		awaitProperty(t, "sniproxy-next.service", "ActiveState", "inactive")
		checkStopped(t, "sniproxy-next.service")
		l.more(500)
	}
	l.end()
}

// Goal: after kill -9 systemd starts the service again, and does so however often it happens: the
// default limit is five starts in ten seconds. A client that was handed over stays through all
// that, and through the stop.
func testUnitsKill(t *testing.T) {
	hello := startUnits(t)
	handed, err := connect(unitAddr, snitest.Hello(unitHanded))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(handed, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 7 {
		hostdirtest.Must(t, exchange(unitAddr, hello))
		killed := mainPID(t, "sniproxy.service")
		command(t, "systemctl", "kill", "--signal=SIGKILL", "sniproxy.service")
		hostdirtest.Await(t, "the end of the killed process", func() bool { return mainPID(t, "sniproxy.service") != killed })
	}
	hostdirtest.Must(t, exchange(unitAddr, hello))
	command(t, "systemctl", "stop", "sniproxy.socket")
	checkStopped(t, "sniproxy.service")
	handed.hello = handed.hello[1:]
	if err := handed.finish(); err != nil {
		t.Errorf("a client that was handed over: %v", err)
	}
}

// Goal: the drop-ins for several sockets can be added while the service runs; then one process
// serves them all; a restart and an upgrade under load lose no client of any; the stop frees all
// ports.
func testUnitsSeveral(t *testing.T) {
	hello := startUnits(t)
	hostdirtest.Must(t, exchange(unitAddr, hello))
	for dir, file := range map[string]string{
		"sniproxy.socket.d":       "socket.conf",
		"sniproxy.service.d":      "service.conf",
		"sniproxy-next.service.d": "service.conf",
	} {
		path := "/etc/systemd/system/" + dir
		command(t, "install", "-D", "-m", "644", severalDir+file, path+"/several.conf")
		t.Cleanup(func() {
			os.RemoveAll(path)
			command(t, "systemctl", "daemon-reload")
		})
	}
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "restart", "sniproxy.socket")
	addrs := []string{"127.0.0.1:443", "[::1]:443", "127.0.0.1:8443"}
	var loads []*load
	for _, addr := range addrs {
		loads = append(loads, startLoad(t, addr, hello))
	}
	more := func() {
		t.Helper()
		for _, l := range loads {
			l.more(200)
		}
	}
	more()
	pid := mainPID(t, "sniproxy.service")
	command(t, "systemctl", "restart", "sniproxy.service")
	more()
	if after := mainPID(t, "sniproxy.service"); after == pid {
		t.Errorf("process %d serves after the restart", pid)
	}
	command(t, "systemctl", "start", "sniproxy-next.service")
	command(t, "systemctl", "restart", "sniproxy.service")
	more()
	command(t, "systemctl", "stop", "sniproxy-next.service")
	more()
	for _, l := range loads {
		l.end()
	}
	command(t, "systemctl", "stop", "sniproxy.socket")
	checkStopped(t, "sniproxy.service")
	for _, addr := range addrs {
		if !canListen(addr) {
			t.Errorf("%s is not free after the stop", addr)
		}
	}
	for _, addr := range []string{"0.0.0.0:443", "[::]:443", "127.0.0.1:8443"} {
		hostdirtest.Await(t, addr+" in the journal", func() bool {
			out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "--unit=sniproxy.service").Output()
			return err == nil && slices.Contains(strings.Split(string(out), "\n"), "listening on "+addr)
		})
	}
}

// Goal: with the units for Accept=yes systemd starts a service for each connection, in a sandbox;
// it serves, and ends with the client, as a success. More clients than systemd serves by default,
// of several addresses, are served at once, after more in a short time than it takes by default;
// one address has the connections that the socket grants it.
func testUnitsAccept(t *testing.T) {
	const socket = "sniproxy-accept.socket"
	serve(t, "/srv/sniproxy", unitHost)
	serveHanded(t, "/srv/sniproxy", unitHanded)
	command(t, "systemctl", "start", socket)
	t.Cleanup(func() { command(t, "systemctl", "stop", socket) })
	const rounds = 5
	for range rounds {
		for _, host := range []string{unitHost, unitHanded} {
			if err := exchange(unitAddr, snitest.Hello(host)); err != nil {
				t.Errorf("%s: %v", host, err)
			}
		}
	}
	awaitProperty(t, socket, "NConnections", "0")
	if got := property(t, socket, "NAccepted"); got != strconv.Itoa(2*rounds) {
		t.Errorf("systemd has accepted %s connections", got)
	}

	const addresses, each = 5, 50
	hello := snitest.Hello(unitHost)
	from := func(i int) (client, error) {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%addresses))}}
		c, err := dialer.Dial("tcp", unitAddr)
		if err != nil {
			return client{}, err
		}
		c.SetDeadline(time.Now().Add(3 * hostdirtest.Patience))
		_, err = c.Write(hello)
		return client{c.(*net.TCPConn), hello}, err
	}
	clients := make([]client, addresses*each)
	failed := inParallel(len(clients), func(i int) (err error) {
		if clients[i], err = from(i); err == nil {
			err = clients[i].back()
		}
		return err
	})
	if len(failed) > 0 {
		t.Fatalf("%d of %d clients at once failed: %v", len(failed), len(clients), failed[0])
	}
	// An address that has all its connections goes on: that many in two seconds would close the
	// port.
	const burst = 500
	inParallel(burst, func(int) error {
		c, err := from(0)
		if err != nil {
			return err // turned away while it sent its hello
		}
		defer c.Close()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("one address has more than %d connections", each)
		}
		return nil
	})
	for _, c := range clients {
		c.Close()
	}
	awaitProperty(t, socket, "NConnections", "0")
	hostdirtest.Must(t, exchange(unitAddr, hello))
	awaitProperty(t, socket, "NConnections", "0")
	// What fails stays in the list, unless the unit says otherwise.
	out, err := exec.Command("journalctl", "--no-pager", "--output=cat", "--unit=sniproxy-accept@*").Output()
	if err != nil || strings.Contains(string(out), "Failed with result") {
		t.Errorf("a service has failed: %v\n%.2000s", err, out)
	}
}

// Goal: sniproxy-check.service tells of each host what sniproxy does in its sandbox, also with a
// drop-in, which is made once for both; makes handshakes, also with backends that are handed their
// connections; and leaves a report that everybody may read and only root may exchange. A host that
// cannot be served is no failure of the service.
func testUnitsCheck(t *testing.T) {
	const hosts, units = "/srv/sniproxy/", "/etc/systemd/system/"
	hello := startUnits(t)
	const dropIns = units + "sniproxy.service.d"
	t.Cleanup(func() {
		os.RemoveAll(dropIns)
		os.RemoveAll(units + "sniproxy-.service.d")
		command(t, "systemctl", "daemon-reload")
	})
	// As sniproxy.socket says.
	command(t, "mkdir", "-p", units+"sniproxy-.service.d")
	command(t, "ln", "-sf", "../sniproxy.service.d/override.conf", units+"sniproxy-.service.d/")
	command(t, "systemctl", "daemon-reload")

	cert := certificate(t, "tls.example", "taken.example", "outside.example")
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	for _, dir := range []string{hosts + "tls.example", hosts + "closed.example", "/run/backends/outside"} {
		hostdirtest.Serve(t, dir, func(c *net.UnixConn) { tls.Server(c, config).Handshake() })
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	hostdirtest.Must(t, os.Chmod(hosts+"closed.example", 0o700))
	hostdirtest.Must(t, os.Symlink("/run/backends/outside", hosts+"outside.example"))
	t.Cleanup(func() { os.Remove(hosts + "outside.example") })
	hostdirtest.Must(t, os.Mkdir(hosts+"taken.example", 0o755))
	t.Cleanup(func() { os.RemoveAll(hosts + "taken.example") })
	l, err := backend.Listen(hosts + "taken.example")
	hostdirtest.Must(t, err)
	go http.Serve(tls.NewListener(l, config), http.NotFoundHandler())
	t.Cleanup(func() { l.Close() })

	uid := strings.TrimSpace(command(t, "id", "-u", "sniproxy"))
	report := func(want map[string]string) {
		t.Helper()
		command(t, "systemctl", "start", "sniproxy-check.service")
		for name, value := range map[string]string{"ActiveState": "inactive", "Result": "success"} {
			if got := property(t, "sniproxy-check.service", name); got != value {
				t.Errorf("sniproxy-check.service has %s=%s, want %s", name, got, value)
			}
		}
		text := command(t, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", "/run/sniproxy/check")
		for name, begins := range want {
			if !strings.Contains("\n"+text, "\n"+name+": "+begins) {
				t.Errorf("the report has no line %s: %s, but\n%s", name, begins, text)
			}
		}
		if n := strings.Count(text, "\n") + 1; n != len(want) {
			t.Errorf("the report has %d lines, want %d:\n%s", n, len(want), text)
		}
		if got := command(t, "stat", "-c", "%U %a", "/run/sniproxy", "/run/sniproxy/check"); got != "root 755\nroot 644" {
			t.Errorf("owners and modes of the report: %q", got)
		}
	}
	const certified = "TLS 1.3, with a certificate for tls.example, taken.example, outside.example until "
	want := map[string]string{
		unitHost:          "no handshake can be made: ", // the backend sends back what it gets
		unitHanded:        "no handshake can be made: ",
		"tls.example":     "ok; " + certified,
		"taken.example":   "ok, handed over; " + certified,
		"closed.example":  "permission denied for uid " + uid + ": x is missing on the directory closed.example (mode 0700, uid 0): ",
		"outside.example": "no directory: the symlink leads nowhere, there is no /run/backends",
	}
	report(want)
	outside := snitest.Hello("outside.example")
	if err := exchange(unitAddr, outside); err == nil {
		t.Error("sniproxy serves what its sandbox does not show")
	}
	command(t, "mkdir", "-p", dropIns)
	hostdirtest.Must(t, os.WriteFile(dropIns+"/override.conf", []byte("[Service]\nBindReadOnlyPaths=/run/backends\n"), 0o644))
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "restart", "sniproxy.service")
	hostdirtest.Must(t, exchange(unitAddr, hello))
	want["outside.example"] = "ok; " + certified
	report(want)
	for _, unit := range []string{"sniproxy.service", "sniproxy-next.service", "sniproxy-check.service"} {
		if got := property(t, unit, "BindReadOnlyPaths"); !strings.Contains(got, "/run/backends") {
			t.Errorf("%s shows %s", unit, got)
		}
	}
	command(t, "systemctl", "start", "sniproxy-check.timer")
	t.Cleanup(func() { command(t, "systemctl", "stop", "sniproxy-check.timer") })
	if got := property(t, "sniproxy-check.timer", "Triggers"); got != "sniproxy-check.service" {
		t.Errorf("the timer triggers %s", got)
	}
	for _, name := range []string{"NextElapseUSecRealtime", "NextElapseUSecMonotonic"} {
		if got := property(t, "sniproxy-check.timer", name); got == "" || got == "0" || got == "infinity" {
			t.Errorf("the timer has %s=%s", name, got)
		}
	}
}

// Goal: sniproxy-check.service has the sandbox of sniproxy.service, but for what it needs besides.
func TestCheckService(t *testing.T) {
	sandbox := func(file string) []string {
		_, text, ok := strings.Cut(fileText(t, file), "\nTemporaryFileSystem=")
		if !ok {
			t.Fatalf("%s has no sandbox", file)
		}
		text = strings.NewReplacer("/usr/local/bin/sniproxy-check /srv/sniproxy /etc/passwd /etc/group\n", "/usr/local/bin/sniproxy /srv/sniproxy\n",
			"AF_UNIX AF_INET\n", "AF_UNIX\n", "UMask=0022", "UMask=0077").Replace(text)
		return slices.DeleteFunc(strings.Split(text, "\n"), func(line string) bool { return line == "" || line[0] == '#' })
	}
	if proxy, check := sandbox("systemd/sniproxy.service"), sandbox("systemd/sniproxy-check.service"); !slices.Equal(proxy, check) {
		t.Errorf("sniproxy.service:\n%q\nsniproxy-check.service:\n%q", proxy, check)
	}
}

// Goal: sniproxy-next.service has the settings of sniproxy.service, but for the socket and the
// restart.
func TestNextService(t *testing.T) {
	settings := func(file string) []string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return slices.DeleteFunc(strings.Split(string(b), "\n"), func(line string) bool {
			key, _, _ := strings.Cut(line, "=")
			return line == "" || line[0] == '#' || slices.Contains([]string{"Description", "Sockets", "Restart"}, key)
		})
	}
	this, next := settings("systemd/sniproxy.service"), settings("systemd/sniproxy-next.service")
	if !slices.Equal(this, next) {
		t.Errorf("sniproxy.service:\n%q\nsniproxy-next.service:\n%q", this, next)
	}
}

// Goal: systemd-socket-activate passes several sockets as systemd does, in LISTEN_FDS. The daemon
// serves them all, and its stop frees them all.
func TestSocketActivateSeveral(t *testing.T) {
	t.Parallel()
	activate := hostdirtest.Need(t, "systemd-socket-activate")
	hosts := hostdirtest.Dir(t)
	serve(t, hosts, "a.example")
	hello := snitest.Hello("a.example")
	args := []string{}
	var addrs []string
	for range 3 {
		addr := net.JoinHostPort("127.0.0.1", freePort(t))
		addrs = append(addrs, addr)
		args = append(args, "--listen="+addr)
	}
	cmd := exec.Command(activate, append(args, daemon(t))...)
	cmd.Dir = hosts
	start(t, cmd)
	for _, addr := range addrs {
		hostdirtest.Await(t, "a listening socket", func() bool { return canConnect(addr) })
		served := startLoad(t, addr, hello)
		served.more(200)
		served.end()
	}
	hostdirtest.Must(t, cmd.Process.Signal(syscall.SIGHUP))
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	for _, addr := range addrs {
		if !canListen(addr) {
			t.Errorf("%s is not free after the stop", addr)
		}
	}
}

// Goal: systemd-socket-activate --accept starts a daemon for each connection, on standard input
// and output, or without --inetd as the one socket in LISTEN_FDS.
func TestSocketActivateAccept(t *testing.T) {
	activate := hostdirtest.Need(t, "systemd-socket-activate")
	for _, args := range [][]string{{"--accept", "--inetd"}, {"--accept"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			t.Parallel()
			hosts, addr := hostdirtest.Dir(t), net.JoinHostPort("127.0.0.1", freePort(t))
			cmd := exec.Command(activate, append(args, "--listen="+addr, daemon(t))...)
			cmd.Dir = hosts
			testSingle(t, cmd, hosts, addr)
		})
	}
}

// Goal: systemd-socket-activate hands over the listening socket as inetd does; the daemon serves
// and stops.
func TestSocketActivate(t *testing.T) {
	t.Parallel()
	activate := hostdirtest.Need(t, "systemd-socket-activate")
	hosts, addr := hostdirtest.Dir(t), net.JoinHostPort("127.0.0.1", freePort(t))
	serve(t, hosts, "a.example")
	hello := snitest.Hello("a.example")
	cmd := exec.Command(activate, "--inetd", "--listen="+addr, daemon(t))
	cmd.Dir = hosts
	start(t, cmd)
	hostdirtest.Await(t, "a listening socket", func() bool { return canConnect(addr) })
	served := startLoad(t, addr, hello)
	served.more(500)
	served.end()
	hostdirtest.Must(t, cmd.Process.Signal(syscall.SIGHUP))
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !canListen(addr) {
		t.Error("the port is not free after the stop")
	}
}
