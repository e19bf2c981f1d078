package examples_test

import (
	"os/exec"
	"syscall"
	"testing"
)

// Goal: the line for inetd.conf serves, ends gracefully, and is started again for the next client.
func TestInetd(t *testing.T) {
	t.Parallel()
	needRoot(t)
	inetd := program(t, "inetd")
	program(t, "env")
	dir, hosts, port := directory(t), directory(t), freePort(t)
	conf := example(t, "inetd/inetd.conf", dir,
		"\n443 stream", "\n127.0.0.1:"+port+" stream",
		"wait sniproxy /usr/bin/env", "wait nobody /usr/bin/env",
		"-C /srv/sniproxy /usr/bin/sniproxy\n", "-C "+hosts+" "+daemon(t)+"\n")
	testInetd(t, exec.Command(inetd, "-i", conf), hosts, "127.0.0.1:"+port)
}

// Goal: the same for the service file of xinetd.
func TestXinetd(t *testing.T) {
	t.Parallel()
	needRoot(t)
	xinetd := program(t, "xinetd")
	program(t, "env")
	dir, hosts, port := directory(t), directory(t), freePort(t)
	conf := example(t, "inetd/xinetd.conf", dir,
		"= 443\n", "= "+port+"\n\tbind = ::ffff:127.0.0.1\n",
		"= sniproxy\n", "= nobody\n",
		"-C /srv/sniproxy /usr/bin/sniproxy\n", "-C "+hosts+" "+daemon(t)+"\n")
	cmd := exec.Command(xinetd, "-dontfork", "-f", conf, "-filelog", dir+"/log", "-pidfile", dir+"/pid")
	testInetd(t, cmd, hosts, "127.0.0.1:"+port)
}

func testInetd(t *testing.T, cmd *exec.Cmd, hosts, addr string) {
	serve(t, hosts, "a.example")
	hello := hello(t, "a.example")
	start(t, cmd)
	await(t, "a listening socket", func() bool { return canConnect(addr) })
	first := onlyChild(t, cmd.Process.Pid) // that connection has started it
	served := startLoad(t, addr, hello)
	served.more(500)
	served.end()

	signalAndAwait(t, first, syscall.SIGHUP)
	if err := exchange(addr, hello); err != nil {
		t.Fatal(err)
	}
	second := onlyChild(t, cmd.Process.Pid)
	if second == first {
		t.Errorf("process %d serves after its end", first)
	}

	// The socket is on 0, 1 and 2 of sniproxy. With its supervisor gone it has the only copies, and
	// its stop must free the port.
	cmd.Process.Kill()
	cmd.Wait()
	if err := exchange(addr, hello); err != nil {
		t.Errorf("without its supervisor: %v", err)
	}
	if err := syscall.Kill(second, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	await(t, "a free port", func() bool { return canListen(addr) })
}
