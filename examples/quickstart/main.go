// Command quickstart shows sniproxy at work on a machine that has nothing but Go.
//
//	go run ./examples/quickstart [-check]
//
// It builds sniproxy and sniproxy-tls. It starts sniproxy with a listening socket on its standard
// input and a new hosts directory as its working directory, and serves three HTTPS sites there: one
// is handed its connections, one is told who the client is by a PROXY line, and one is a plain HTTP
// service behind sniproxy-tls. It reaches all three through sniproxy to check them, and prints how
// to see them and how to add a name. At Ctrl-C it stops the programs and removes what it made. With
// -check it exits after the check.
//
// The exit status is 0; 1 when something failed; 2 for wrong usage.
package main

import (
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
	checkOnly := flag.Bool("check", false, "exit after the check")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	// The thread that starts the programs must not end before we do: see dieWithUs.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // so a second Ctrl-C ends us at once
	if err := run(ctx, *checkOnly); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, checkOnly bool) (err error) {
	dir, err := os.MkdirTemp("", "sniproxy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	fmt.Println("building sniproxy and sniproxy-tls")
	// Without the version stamp, which needs git, and needs it to trust the owner of the source.
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", dir+"/", "sniproxy/cmd/sniproxy", "sniproxy/cmd/sniproxy-tls")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		return fmt.Errorf("go build: %w", err)
	}

	// The address of a Unix socket holds only about a hundred bytes. From here the path of each is
	// NAME/tls-socket, however long the name of the temporary directory is.
	hosts := filepath.Join(dir, "hosts")
	if err := os.Mkdir(hosts, 0o755); err != nil {
		return err
	}
	if err := os.Chdir(hosts); err != nil {
		return err
	}
	ca, err := newAuthority(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return err
	}
	sites := []*site{
		{name: "one.localhost", alias: "four.localhost", kind: handed},
		{name: "two.localhost", kind: proxyLine},
		{name: "three.localhost", kind: plain},
	}
	for _, s := range sites {
		if err := s.start(ca); err != nil {
			return fmt.Errorf("site %s: %w", s.name, err)
		}
		defer s.server.Close()
	}

	plainSite := sites[2]
	terminator := exec.Command(filepath.Join(dir, "sniproxy-tls"), "http://"+plainSite.addr)
	terminator.Dir = filepath.Join(hosts, plainSite.name)
	behind, err := startProgram("sniproxy-tls", terminator, "serving ")
	if err != nil {
		return err
	}
	defer behind.stop(&err)

	listener, err := listen(ctx)
	if err != nil {
		return err
	}
	proxy, err := startProxy(filepath.Join(dir, "sniproxy"), hosts, listener)
	if err != nil {
		return err
	}
	// After a SIGHUP it waits for its connections, and the sites may keep some open for a next
	// request.
	defer proxy.stop(&err)
	defer func() {
		for _, s := range sites {
			s.server.Close()
		}
	}()

	for _, p := range []*program{proxy, behind} {
		if err := p.await(ctx); err != nil {
			return err
		}
	}
	addr := listener.Addr().(*net.TCPAddr)
	if err := check(ctx, addr, ca, sites); err != nil || checkOnly {
		return err
	}
	show(addr.Port, ca, hosts, sites)
	select {
	case <-ctx.Done():
		return nil
	case <-proxy.exited:
		return fmt.Errorf("sniproxy has ended: %v", proxy.ProcessState)
	case <-behind.exited:
		return fmt.Errorf("sniproxy-tls has ended: %v", behind.ProcessState)
	}
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

// startProxy starts sniproxy on the listening socket, which is its own from then on.
func startProxy(path, hosts string, listener *net.TCPListener) (*program, error) {
	defer listener.Close()
	stdin, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	cmd := exec.Command(path)
	cmd.Stdin, cmd.Dir = stdin, hosts
	return startProgram("sniproxy", cmd, "listening on ")
}

// check checks the sites, and prints what they say.
func check(ctx context.Context, addr *net.TCPAddr, ca *authority, sites []*site) error {
	for _, s := range sites {
		page, err := s.check(ctx, addr.String(), ca)
		if err != nil {
			return fmt.Errorf("site %s: %w", s.name, err)
		}
		fmt.Println(paint(green, "checked") + " " + s.name)
		fmt.Print(indent(page))
	}
	return nil
}

// show tells how to use the sites.
func show(port int, ca *authority, hosts string, sites []*site) {
	const way = `
         curl, a browser
                |  TLS
         127.0.0.1:%d
                |
            sniproxy    reads the name, and decrypts nothing
                |
      +---------+-----------+------------------------+
      |                     |                        |
one.localhost         two.localhost           three.localhost
is handed the         gets a PROXY line,      sniproxy-tls ends TLS
connection itself     then the bytes                 |
                                              plain HTTP service
`
	fmt.Printf(way, port)
	line := func(name string) string {
		return paint(bold, fmt.Sprintf("curl --cacert %s https://%s:%d/", ca.path, name, port))
	}
	fmt.Print("\nThree sites share one port. To see them:\n\n")
	for _, s := range sites {
		fmt.Printf("  %s\n", line(s.name))
	}
	fmt.Printf(`
A browser shows them too. It warns, since it does not know who made the
certificates.

A host is a directory, here in %[1]s.
Give the first one another name. Nothing needs a restart:

  %[2]s
  %[3]s

Ctrl-C stops all this and removes it.
`, hosts, paint(bold, fmt.Sprintf("ln -s %s %s", sites[0].name, filepath.Join(hosts, sites[0].alias))), line(sites[0].alias))
}

// Colours, as terminals understand them.
const (
	bold  = "1"
	green = "32"
)

// paint returns s in a colour, if the standard output is a terminal whose user wants colours
// (https://no-color.org).
func paint(colour, s string) string {
	if info, err := os.Stdout.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 || os.Getenv("NO_COLOR") != "" {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

// indent puts two spaces before each line.
func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(s, "\n"), "\n", "\n  ") + "\n"
}
