// Command quickstart shows sniproxy at work on a machine that has nothing but Go.
//
//	go run ./examples/quickstart [-check]
//
// It builds the daemon and starts it with a listening socket on its standard input and a new hosts directory as its
// working directory. It serves two HTTPS sites behind Unix sockets, reaches both through the daemon to check them, and
// prints how to reach them with curl and how to add a host. At Ctrl-C it stops the daemon and removes what it made.
// With -check it leaves after the check.
//
// The exit status is 0; 1 when something failed; 2 for wrong usage.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	checkOnly := flag.Bool("check", false, "leave after the check")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	// The thread that starts the daemon must not end before we do: see dieWithUs.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // so a second Ctrl-C ends us at once
	if err := run(ctx, *checkOnly); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, checkOnly bool) error {
	dir, err := os.MkdirTemp("", "sniproxy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	fmt.Println("building sniproxy")
	program := filepath.Join(dir, "sniproxy")
	// Without the version stamp, which needs git, and needs it to trust the owner of the source.
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", program, "sniproxy/cmd/sniproxy")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go build sniproxy/cmd/sniproxy: %w", err)
	}

	// The address of a Unix socket holds only about a hundred bytes. From here the path of each is NAME/tls-socket,
	// however long the name of the temporary directory is.
	hosts := filepath.Join(dir, "hosts")
	if err := os.Mkdir(hosts, 0o755); err != nil {
		return err
	}
	if err := os.Chdir(hosts); err != nil {
		return err
	}
	sites := []*site{
		{name: "one.example", ca: filepath.Join(dir, "one.example.pem")},
		{name: "two.example", ca: filepath.Join(dir, "two.example.pem"), proxyV1: true},
	}
	for _, s := range sites {
		if err := s.start(); err != nil {
			return fmt.Errorf("site %s: %w", s.name, err)
		}
	}

	listener, err := listen(ctx)
	if err != nil {
		return err
	}
	proxy, err := startDaemon(program, hosts, listener)
	if err != nil {
		return err
	}
	showErr := show(ctx, proxy, hosts, sites, checkOnly)

	// After a SIGHUP the daemon waits for its connections, and the sites may keep some open for a next request.
	proxy.Process.Signal(syscall.SIGHUP) // fails if it has ended, which show then tells
	for _, s := range sites {
		s.server.Close()
	}
	<-proxy.exited
	if showErr != nil {
		return showErr
	}
	if !proxy.ProcessState.Success() {
		return fmt.Errorf("sniproxy: %v", proxy.ProcessState)
	}
	return nil
}

// listen binds port 8443 of 127.0.0.1 or, if that is taken, the next one that is free.
func listen(ctx context.Context) (*net.TCPListener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // as every supervisor does; Go would choose MPTCP
	for port := 8443; ; port++ {
		l, err := config.Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return l.(*net.TCPListener), nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, err
		}
		fmt.Printf("port %d is taken, trying the next\n", port)
	}
}

// A daemon is a running sniproxy.
type daemon struct {
	*exec.Cmd
	addr   string
	ready  chan struct{} // closed when it accepts connections
	exited chan struct{} // closed when ProcessState is set
}

// startDaemon starts sniproxy on the listening socket, which is its own from then on.
func startDaemon(program, hosts string, listener *net.TCPListener) (*daemon, error) {
	defer listener.Close()
	stdin, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer stdin.Close()

	d := &daemon{
		Cmd:    exec.Command(program),
		addr:   listener.Addr().String(),
		ready:  make(chan struct{}),
		exited: make(chan struct{}),
	}
	d.Stdin = stdin
	d.Dir = hosts
	d.Stderr = os.Stderr
	// A process group of its own keeps a Ctrl-C at the terminal from it: it is ours to stop.
	d.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithUs(d.SysProcAttr)
	stdout, err := d.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.Start(); err != nil {
		return nil, err
	}
	go func() {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			fmt.Printf("sniproxy (process %d): %s\n", d.Process.Pid, lines.Text())
			if strings.HasPrefix(lines.Text(), "listening on ") {
				close(d.ready)
			}
		}
		d.Wait() // its outcome is in ProcessState
		close(d.exited)
	}()
	return d, nil
}

// show checks the sites, tells how to use them, and stays until ctx is done.
func show(ctx context.Context, proxy *daemon, hosts string, sites []*site, checkOnly bool) error {
	select {
	case <-proxy.ready:
	case <-proxy.exited:
		return fmt.Errorf("sniproxy did not start: %v", proxy.ProcessState)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for _, s := range sites {
		page, err := s.check(ctx, proxy.addr)
		if err != nil {
			return fmt.Errorf("site %s: %w", s.name, err)
		}
		fmt.Printf("checked https://%s: %s", s.name, page)
	}
	if checkOnly {
		return nil
	}

	_, port, err := net.SplitHostPort(proxy.addr)
	if err != nil {
		return err
	}
	fmt.Print("\nTwo sites share one port. The first is handed its connections, the second is told who the\nclient is by a PROXY line. To see them:\n\n")
	for _, s := range sites {
		fmt.Printf("  curl --cacert %s --resolve %s:%s:127.0.0.1 https://%[2]s:%[3]s/\n", s.ca, s.name, port)
	}
	fmt.Printf(`
The hosts directory is %[1]s.
To add a host, make its directory, and let a TLS server listen on the socket in it. The proxy needs no restart:

  mkdir %[1]s/three.example
  (listen on the Unix socket %[1]s/three.example/tls-socket)

Ctrl-C stops the proxy and removes all this.
`, hosts)
	select {
	case <-ctx.Done():
		return nil
	case <-proxy.exited:
		return fmt.Errorf("sniproxy has ended: %v", proxy.ProcessState)
	}
}
