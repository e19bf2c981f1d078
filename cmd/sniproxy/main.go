// Sniproxy puts many TLS services behind one port. It reads the server name in the ClientHello of
// each connection, connects to the Unix socket of the host with that name, and forwards the bytes,
// unchanged, both ways. It decrypts nothing but ClientHellos that are encrypted to a key of its
// own.
//
// There are no arguments but -h, which prints the usage, and no configuration file. The sockets are
// inherited, and the working directory is the hosts directory. The manual pages beside this file
// are its interface: sniproxy(8) has sockets, output, alerts, signals, counters and exit status,
// sniproxy-hosts(5) has the hosts directory and what each owner of hosts may use.
//
// # Packages
//
// A package imports only packages that stand below it here.
//
//	cmd/sniproxy                start, signals, stop
//	cmd/internal/epoll          the engine for Linux: event loops
//	cmd/internal/goroutines     the engine for other systems, and for the build tag portable
//	cmd/internal/shares         who tenants are, and what each gets: threads that may wait, descriptors
//	cmd/internal/report         refusals, access lines, counters
//	cmd/internal/inherit        the sockets that the program is given, and accepting from them
//	cmd/internal/logline        lines that never block
//	cmd/internal/socket         a socket's addresses, its PROXY header, and descriptors that it passes
//	cmd/internal/descriptors    how many are in use, and their limit
//	cmd/internal/limits         what a connection may take
//	cmd/internal/usage          the usage, with the version
//	hostdir                     from a name to its directory, its backend and its markers
//	sni/ech                     Encrypted Client Hello: keys, and hellos that are opened with them
//	sni                         the name in a ClientHello
//	proxyproto                  PROXY protocol headers
//
// A connection flows through an engine: accept, ClientHello, look-up, relay, end. Both engines do
// the same.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/socket"
	"sniproxy/cmd/internal/usage"
	"sniproxy/hostdir"
)

const usageText = `usage: sniproxy < listening TCP socket

It takes no arguments but -h, which prints this. Standard input is a listening
TCP socket or a TCP connection, unless systemd has passed sockets (LISTEN_FDS),
and the working directory holds a directory NAME, with the Unix socket
tls-socket in it, for each host.
`

// Keep the main thread for the main goroutine: the kernel prefers it for signals, and a thread
// stuck in a file system takes none.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run()) }

func run() int {
	// At once: descriptors 1 and 2 may be a dead pipe, or the listening socket,
	// for which write(2) is EPIPE.
	signal.Ignore(syscall.SIGPIPE)
	// Early: who asks before there is anything to count gets an answer later.
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	// Others than SIGHUP, and a second signal: sniproxy-rs knows SIGHUP alone, and is killed by
	// others.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	// Before anything is printed: it must not get into the stream of a client.
	listeners, clients, err := inherit.Take()
	own, reserve := ownDescriptors(len(listeners))-int64(len(clients)), int64(limits.ReserveLeast)
	switch {
	case errors.Is(err, unix.EMFILE):
		own = ownDescriptors(1) + 1 // for the socket that it could not have
	case len(clients) > 0:
		reserve = 0
	}
	if few := descriptors.Enough(own + reserve + 2); few != nil {
		return printLast(few)
	}
	defer logline.Flush()
	// sniproxy-rs ignores arguments.
	switch args := os.Args[1:]; {
	case usage.Asked(args):
		logline.Out("%s", strings.TrimSuffix(usage.Text(usageText), "\n"))
		return 0
	case len(args) > 0:
		logline.Text(usage.Text(usageText))
		return 2
	}
	if err != nil {
		return refuse(err)
	}
	hosts, err := openHosts()
	if err != nil {
		return refuse(err)
	}
	e, err := startEngine(hosts, listeners, clients, own)
	if err != nil {
		return refuse(err)
	}
	go printCounters(e, asked)
	for _, l := range listeners {
		logline.Out("listening on %v", l.Addr)
	}
	stop := func() { go e.Stop() } // if stopping takes time, the program ends all the same
	single := len(listeners) == 0
	if single {
		stop() // there is nothing to accept: it ends with the one connection
	}

	status := 0
	var cut <-chan time.Time
	select {
	case <-e.Drained: // without a signal this comes only after a single connection
		return 0
	case s := <-signals:
		logline.Out("got %s, shutting down", signalName(s))
		cut = drainTime(s)
	case err := <-e.Failed:
		logline.Err("%v; shutting down", err)
		cut = time.After(limits.Drain)
		status = 1
	}
	if !single {
		stop()
	}
	for {
		select {
		case <-e.Drained:
			return status
		case s := <-signals:
			switch {
			case s == syscall.SIGQUIT: // it is stopping already
				continue
			case cut == nil:
				logline.Out("got %s, shutting down", signalName(s))
				cut = drainTime(s)
				continue
			}
			logline.Err("got %s again, cut what was open: %s", signalName(s), openConnections(e))
		case <-cut:
			// With the exit status of sniproxy-rs, 1, systemd would take it for a failure.
			logline.Err("cut what was still open after %v: %s", limits.Drain, openConnections(e))
		}
		e.Cut()
		select {
		case <-e.Drained:
		case <-time.After(limits.Cut):
		}
		return status
	}
}

// drainTime returns when to cut what is open after a signal to stop: nil, which is never, for
// SIGQUIT.
func drainTime(s os.Signal) <-chan time.Time {
	if s == syscall.SIGQUIT {
		return nil
	}
	return time.After(limits.Drain)
}

// refuse says why the program cannot start. It returns the exit status.
func refuse(reason error) int {
	logline.Err("%v", reason)
	return 1
}

// ownDescriptors returns how many descriptors the program will have besides those of connections:
// what is open now, one for the hosts directory, and those of the engine.
func ownDescriptors(listeners int) int64 {
	own := 1 + engineDescriptors(listeners)
	if !descriptors.OpenPoller() {
		own += 2
	}
	return own + descriptors.InUse(1024)
}

// printLast prints why the program ends at once. It takes no descriptors, and prints nothing to a
// client. It returns the exit status.
func printLast(reason error) int {
	if sa, err := unix.Getsockname(2); err != nil || !socket.AddrPort(sa).IsValid() {
		logline.Write(2, fmt.Sprintf("sniproxy: %v\n", reason))
	}
	return 1
}

// openHosts opens the hosts directory, and says what is unusual about it.
func openHosts() (*hostdir.Hosts, error) {
	hosts, err := hostdir.Open()
	if err != nil {
		return nil, fmt.Errorf("cannot open the hosts directory, which is the working directory: %w", err)
	}
	for _, remark := range hosts.Remarks() {
		logline.Err("%s", remark)
	}
	return hosts, nil
}

// printCounters prints a line of counters whenever it is asked to.
func printCounters(e *engine, asked <-chan os.Signal) {
	for range asked {
		logline.Err("%v, descriptors %d of %d, handed %d, empty %d", e.Counters, descriptors.InUse(1<<16), descriptors.Limit(), e.Counters.Handed(), e.Counters.Empty())
	}
}

func signalName(s os.Signal) string { return unix.SignalName(s.(syscall.Signal)) }

func openConnections(e *engine) string {
	if n := e.Counters.Open(); n != 1 {
		return fmt.Sprintf("%d connections", n)
	}
	return "1 connection"
}
