package examples_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: a hosts directory as the README says serves the clients of a HAProxy and an nginx that are
// set up with its words for them, except that a wildcard is for one label only.
func TestComingFrom(t *testing.T) {
	t.Parallel()
	haproxy, nginx := hostdirtest.Need(t, "haproxy"), hostdirtest.Need(t, "nginx")
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		hostdirtest.Missing(t, "the stream module of nginx")
	}
	hosts := hostdirtest.Dir(t)
	socket := func(name string) string { return filepath.Join(hosts, hostdirtest.Entry(name), "tls-socket") }
	for _, name := range []string{"one.example", "*.one.example", "*"} {
		hostdirtest.Serve(t, filepath.Dir(socket(name)), func(c *net.UnixConn) {
			hostdirtest.ReadHello(c)
			io.WriteString(c, name)
		})
	}
	ours := startProxy(t, hosts)

	// The words of the README, of which it has no more than these.
	words := func(text string, oldnew ...string) string {
		t.Helper()
		if !strings.Contains(readmeSection(t, "Which of these do I want?"), text) {
			t.Errorf("the README does not have %q", text)
		}
		return strings.NewReplacer(oldnew...).Replace(text)
	}
	dir := hostdirtest.Dir(t)
	theirs := map[string]string{}
	listen := func(program string) string {
		theirs[program] = "127.0.0.1:" + freePort(t)
		return theirs[program]
	}
	hostdirtest.Must(t, os.WriteFile(dir+"/haproxy.cfg", fmt.Appendf(nil, `
frontend all
	mode tcp
	bind %s
	%s
	tcp-request content accept if { req.ssl_hello_type 1 }
	%s
	use_backend below if { %s }
	default_backend other
backend one
	mode tcp
	%s
backend below
	mode tcp
	server below %s
backend other
	mode tcp
	server other %s
`, listen(haproxy), words("tcp-request inspect-delay 5s"),
		words("use_backend one if { req.ssl_sni one.example }"), words("req.ssl_sni -m end .one.example"),
		words("server one /run/one.sock", "/run/one.sock", socket("one.example")), socket("*.one.example"), socket("*")), 0o644))
	start(t, exec.Command(haproxy, "-db", "-f", haproxyDefaults(t), "-f", dir+"/haproxy.cfg"))
	hostdirtest.Must(t, os.WriteFile(dir+"/nginx.conf", fmt.Appendf(nil, `
daemon off;
master_process off;
load_module %s;
error_log stderr;
pid %s/pid;
events {}
stream {
	%s
	server {
		listen %s;
		ssl_preread on;
		proxy_pass $backend;
	}
}
`, module, dir, words("map $ssl_preread_server_name $backend { one.example unix:/run/one.sock; }",
		"unix:/run/one.sock;", "unix:"+socket("one.example")+";\n"+words("default unix:/run/other.sock", "/run/other.sock", socket("*"))+";"),
		listen(nginx)), 0o644))
	start(t, exec.Command(nginx, "-e", "stderr", "-c", dir+"/nginx.conf"))

	for program, addr := range theirs {
		hostdirtest.Await(t, program, func() bool { return canConnect(addr) })
		for name, same := range map[string]bool{
			"one.example": true, "other.example": true, "": true, "a.one.example": program == haproxy, "a.b.one.example": program == nginx,
		} {
			hello := snitest.Hello(name)
			if name == "" {
				hello = snitest.HelloConfig(&tls.Config{InsecureSkipVerify: true})
			}
			was, is := servedBy(t, addr, hello), servedBy(t, ours, hello)
			if (was == is) != same {
				t.Errorf("%q is served by %s at %s, and by %s here", name, was, program, is)
			}
		}
	}
}

// servedBy returns what the backend of a client says.
func servedBy(t *testing.T, addr string, hello []byte) string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	hostdirtest.Must(t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	_, err = c.Write(hello)
	hostdirtest.Must(t, err)
	answer, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	return string(answer)
}
