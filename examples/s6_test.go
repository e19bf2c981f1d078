package examples_test

import (
	"os/exec"
	"testing"
)

// Goal: the s6 service directory serves from its chroot as an unprivileged user, is ready when it
// says so, survives kill -9, and stops gracefully.
func TestS6(t *testing.T) {
	t.Parallel()
	needRoot(t)
	supervise, svc, svwait, svstat := program(t, "s6-supervise"), program(t, "s6-svc"), program(t, "s6-svwait"), program(t, "s6-svstat")
	program(t, "perl")
	program(t, "unshare")
	root, hosts := chroot(t)
	service, port := directory(t), freePort(t)
	addr := "127.0.0.1:" + port
	example(t, "s6/run", service,
		"\nroot=/srv/sniproxy\n", "\nroot="+root+"\n",
		"\nuser=sniproxy\n", "\nuser=nobody\n",
		"\naddress=::\n", "\naddress=127.0.0.1\n",
		"\nport=443\n", "\nport="+port+"\n")
	example(t, "s6/notification-fd", service)
	serve(t, hosts, "a.example")
	hello := hello(t, "a.example")

	cmd := exec.Command(supervise, service)
	start(t, cmd)
	await(t, "s6-supervise", func() bool { return exec.Command(svstat, service).Run() == nil })
	const limit = "-t20000" // ms
	command(t, svwait, "-U", limit, service)
	if !canConnect(addr) {
		t.Error("the service is not ready when s6 says so")
	}
	first := onlyChild(t, cmd.Process.Pid)
	if got := visible(t, first, "/hosts"); got != "/bin /bin/sniproxy /hosts" {
		t.Errorf("sniproxy sees %s", got)
	}
	served := startLoad(t, addr, hello)
	served.more(500)
	served.end()

	command(t, svc, "-wR", "-T20000", "-k", service)
	if err := exchange(addr, hello); err != nil {
		t.Error(err)
	}
	if second := onlyChild(t, cmd.Process.Pid); second == first {
		t.Errorf("process %d serves after kill -9", first)
	}

	command(t, svc, "-wD", "-T20000", "-d", service)
	if got := command(t, svstat, "-o", "up,exitcode", service); got != "false 0" {
		t.Errorf("up and exit code after the stop: %s, want false 0", got)
	}
	if !canListen(addr) {
		t.Error("the port is not free after the stop")
	}
	command(t, svc, "-x", service)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
