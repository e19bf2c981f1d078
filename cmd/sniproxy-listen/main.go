// Command sniproxy-listen binds a TCP port, makes the listening socket standard input, and becomes
// another program, such as sniproxy.
//
//	sniproxy-listen ADDR PROGRAM [ARG…]
//
// ADDR is HOST:PORT. Without HOST, as in :443, one socket serves IPv6 and IPv4, or only IPv4 where
// a socket cannot serve both. 0.0.0.0:443 is every IPv4 address and [::]:443 every IPv6 address,
// without IPv4. HOST may be a name; if it has addresses of both families, the socket is for IPv4.
// PORT may be the name of a service; 0 is any free port.
//
// PROGRAM is found as by execvp(3). It runs in the same process, so it has the pid of
// sniproxy-listen and gets its signals. The socket is plain TCP, blocking, with SO_REUSEADDR and
// the longest backlog that the system grants. PROGRAM inherits the descriptors that sniproxy-listen
// was given and no others. SIGHUP and SIGINT stay ignored if they were; the Go runtime sets all
// other signals to their defaults.
//
// With -h in place of ADDR it prints its usage on standard output.
//
// The exit status is that of PROGRAM; 1 when there is no socket; 2 for wrong usage; and as from
// env(1) 127 when PROGRAM is not found, and 126 when it cannot be run for another reason.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/usage"
)

const usageText = `usage: sniproxy-listen ADDR PROGRAM [ARG...]

Listens on the TCP address ADDR, such as :443, 192.0.2.1:443 or [2001:db8::1]:443,
and runs PROGRAM with the listening socket as its standard input.
`

// backlog is more than any system grants: they use their own limit then. Linux before 4.1 looks
// only at the lower 16 bits.
const backlog = 1<<16 - 1

// defaultPath is what the C library searches if there is no PATH.
const defaultPath = "/usr/bin:/bin"

// Linux keeps some settings for each thread, such as the signal at the death of the parent (setpriv
// --pdeathsig). Only the first thread of the process inherits them, so it must execute PROGRAM.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if usage.Asked(args) {
		if _, err := io.WriteString(os.Stdout, usage.Text(usageText)); err != nil {
			complain("sniproxy-listen: %v\n", err)
			return 1
		}
		return 0
	}
	if len(args) < 2 || strings.HasPrefix(args[0], "-") {
		complain("%s", usage.Text(usageText))
		return 2
	}
	addr, program := args[0], args[1:]
	if err := listen(addr); err != nil {
		complain("sniproxy-listen: cannot listen on %q: %v\n", addr, err)
		return 1
	}
	err := execute(program)
	complain("sniproxy-listen: cannot run %q: %v\n", program[0], err)
	if err == unix.ENOENT {
		return 127
	}
	return 126
}

func complain(format string, args ...any) {
	// If the reader has gone, SIGPIPE would change the exit status. Ignore it only here: PROGRAM
	// would inherit that.
	signal.Ignore(syscall.SIGPIPE)
	fmt.Fprintf(os.Stderr, format, args...)
}

// listen listens on addr and makes the socket standard input.
func listen(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return explain(err)
	}
	if port == "" {
		return explain(&net.AddrError{Err: "missing port in address"}) // package net takes 0
	}
	// For package net, 0.0.0.0 and :: mean both families too.
	network := "tcp"
	if ip, err := netip.ParseAddr(host); err == nil {
		network = "tcp6"
		if ip.Unmap().Is4() {
			network = "tcp4"
		}
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // the default is MPTCP
	l, err := lc.Listen(context.Background(), network, addr)
	if err != nil {
		return explain(err)
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer socket.Close()
	return makeStdin(int(socket.Fd()))
}

// makeStdin moves the listening socket fd to descriptor 0, in the state in which a shell would hand
// it over. execve(2) closes all other descriptors that were opened here.
func makeStdin(fd int) error {
	// Newer ports of Linux do not have dup2(2). The runtime makes sure that 0 is open, so it is the
	// lowest free descriptor once it is closed.
	if err := unix.Close(0); err != nil {
		return fmt.Errorf("cannot close standard input: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD, 0); err != nil {
		return fmt.Errorf("cannot make the socket standard input: %w", err)
	}
	if err := unix.SetNonblock(0, false); err != nil {
		return fmt.Errorf("cannot make the socket blocking: %w", err)
	}
	// Once more: without /proc, package net does not know the longest backlog.
	if err := unix.Listen(0, backlog); err != nil {
		return fmt.Errorf("cannot set the backlog: %w", err)
	}
	return nil
}

// explain says what an error of package net means, and what to do.
func explain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // the user knows the rest
	}
	// Take only the reason of these: their text repeats the argument unquoted.
	reason := ""
	if bad, ok := errors.AsType[*net.AddrError](err); ok {
		reason = bad.Err
	} else if unknown, ok := errors.AsType[*net.DNSError](err); ok {
		reason = unknown.Err
	}
	if reason != "" {
		return fmt.Errorf("%s; it must be HOST:PORT, such as :443, 192.0.2.1:443 or [2001:db8::1]:443", reason)
	}
	hint := ""
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		hint = "; `ss -ltnp`, `sockstat -l` or `lsof -i` tells who has the port"
	case errors.Is(err, unix.EACCES):
		hint = "; a port below 1024 needs root, or on Linux the capability CAP_NET_BIND_SERVICE" +
			" or a lower sysctl net.ipv4.ip_unprivileged_port_start"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		hint = "; this machine does not have the address: `ip address` or `ifconfig` lists those that it has"
	case errors.Is(err, unix.EINVAL):
		hint = "; a link-local address needs the name of its interface behind it, as in [fe80::1%eth0]:443"
	case errors.Is(err, unix.EAFNOSUPPORT):
		hint = "; this machine has no IPv6, or none for this program"
	}
	return fmt.Errorf("%w%s", err, hint)
}

// execute becomes the program argv, as execvp(3) does, and returns only if that fails.
func execute(argv []string) error {
	name := argv[0]
	if name == "" || strings.Contains(name, "/") {
		return executeFile(name, argv)
	}
	path, ok := os.LookupEnv("PATH")
	if !ok {
		path = defaultPath
	}
	var failure error = unix.ENOENT
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		switch err := executeFile(dir+"/"+name, argv); err {
		case unix.ENOENT, unix.ENOTDIR:
		case unix.EACCES:
			failure = err // unless a later directory has a file that can be executed
		default:
			return err
		}
	}
	return failure
}

func executeFile(file string, argv []string) error {
	// This also restores the limit of descriptors, which the runtime has raised.
	err := unix.Exec(file, argv, os.Environ())
	if err == unix.ENOEXEC {
		// A script without #!
		err = unix.Exec("/bin/sh", append([]string{"sh", file}, argv[1:]...), os.Environ())
	}
	return err
}
