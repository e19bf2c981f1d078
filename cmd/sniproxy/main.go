// Sniproxy puts many TLS services behind one port. It reads the server name in the
// ClientHello of each connection, connects to the Unix socket of the host with that
// name, and forwards the bytes, unchanged, both ways. It decrypts nothing.
//
// # Interface
//
// There are no arguments and no configuration file.
//
//   - Standard input is a bound and listening TCP socket: IPv4, IPv6 or both.
//     Supervisors such as systemd, inetd and s6 hand it over.
//   - If the environment has LISTEN_FDS, a number of sockets on descriptors from 3 on, and
//     LISTEN_PID is this process, as systemd has it for several sockets, these are
//     served, all of them, and standard input is left alone.
//   - If the one socket is a connection, as of inetd with nowait, systemd with Accept=yes and
//     tcpserver, that is served, and the program ends with it.
//   - The working directory is the hosts directory. NAME/tls-socket in it is the
//     socket of the backend for the host NAME. If NAME/send-proxy-v2 or, without
//     that, NAME/send-proxy-v1 exists, what the backend receives begins with a PROXY
//     protocol header; if NAME/log-connections exists, and is the administrator's,
//     connections are logged at their end. The directory *.REST serves names that
//     have none of their own, and * those and clients that send none. All of it is
//     looked up for each connection. See package hostdir.
//   - Standard output gets "listening on ADDR" once connections are accepted, for each socket
//     that listens, and "got SIGHUP, shutting down" at the stop.
//   - Standard error gets everything else, a line each, without time stamps. Above all a line
//     for each client that is refused: its address, the name if that is canonical, the reason
//     and the alert. They are limited to ten a second, in bursts of 50; a line counts the rest
//     within three seconds.
//
// A descriptor that cannot be written to, or not now, neither ends nor delays the
// program. Descriptors 0, 1 and 2 may all be the socket; nothing is ever printed to a client.
//
// # Signals
//
// SIGHUP and SIGTERM stop the program gracefully: it accepts nothing more, lets go of
// the listening sockets at once, and exits when the last connection has ended, at the
// latest after ten seconds. A second signal ends it at once.
//
// SIGUSR1, at any time, has it print a line of counters on standard error:
//
//	accepted N, open N, waiting N, refused N (ALERT: N, …), dropped N, bytes up N, bytes down N, descriptors N of N
//
// They are connections since the start, those open now, and of these those waiting for their
// hello or backend; clients refused, and how many with which alert; those dropped, or reset, to
// make room; bytes from clients to backends, and back; descriptors in use, and their limit.
//
// # Exit status
//
// 0 after a stop and after a single connection, however that went; 1 if the program could not
// start, for want of descriptors for instance, or go on since another process has shut a listening
// socket down; 2 for wrong usage.
//
// # Shares
//
// The owner of the entry that serves a name is a tenant; entries of root and of the owner of the
// hosts directory are tenants each for itself. Look-ups that may wait for a file system,
// descriptors and tries at a full backlog are shared out among tenants, whatever names clients ask
// for, so none of them can use up what others need.
//
// # Files of the program
//
// A connection flows through an engine: accept, hello, dial, relay, end. There are two, with
// one behaviour. That for Linux is a number of event loops: engine_linux.go, conn_linux.go,
// lookup_linux.go, watch_linux.go, waiting_linux.go, flow_linux.go and share_linux.go. The portable
// engine, for other systems and for the build tag portable, has a goroutine for each direction:
// engine_portable.go and relay_portable.go.
//
// What each tenant gets is the same in both: tenants.go knows who they are, threads.go does what
// may wait for a file system (lookup.go, closing.go), and room.go says who makes room when
// descriptors run out. What backends pass is found by passed.go, and logall.go knows whether the
// connections of all hosts are logged. What goes before and beside the engines is in main.go,
// listener.go, output.go, refusal.go, account.go and counters.go, and their limits are in limits.go.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

const usage = `usage: sniproxy < listening TCP socket

It takes no arguments. Standard input is a listening TCP socket or a TCP connection,
unless systemd has passed sockets (LISTEN_FDS), and the working directory holds a
directory NAME, with the Unix socket tls-socket in it, for each host.
`

// The main goroutine keeps the main thread. The system would rather give that the signals than
// any other, and while it waits for a file system that does not answer it takes none.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run()) }

func run() int {
	// Before anything is written: descriptors 1 and 2 may be a dead pipe, or the
	// listening socket, for which write(2) is EPIPE.
	signal.Ignore(syscall.SIGPIPE)
	// Early: who asks before there is anything to count gets an answer later.
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	// First of all: then nothing that is printed gets into the stream of a client.
	listeners, clients, err := inherit()
	own, kept := ownDescriptors(len(listeners)), int64(reserveLeast)
	switch {
	case errors.Is(err, unix.EMFILE):
		own = ownDescriptors(1) + 1 // for the socket that it could not have
	case len(clients) > 0:
		kept = 0
	}
	if few := checkOpenFiles(own, kept); few != nil {
		return printLast(few)
	}
	defer flushOutput()
	// sniproxy-rs ignores arguments.
	if len(os.Args) != 1 {
		stderr.print(usage)
		return 2
	}
	if err != nil {
		complain("%v", err)
		return 1
	}
	// SIGTERM too, and a second signal: sniproxy-rs knows SIGHUP alone, and is killed by others.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM)
	hosts, err := openHosts()
	if err != nil {
		complain("%v", err)
		return 1
	}
	e, err := startEngine(hosts, listeners, clients, own)
	if err != nil {
		complain("%v", err)
		return 1
	}
	go tellCounters(e, asked)
	for _, l := range listeners {
		stdout.print(fmt.Sprintf("listening on %v\n", l.addr))
	}
	stop := func() {
		// Nothing can keep the program from ending, also if stopping takes time.
		go e.stop()
	}
	single := len(listeners) == 0
	if single {
		stop() // there is nothing to accept: it ends with the one connection
	}

	status := 0
	select {
	case <-e.drained: // which comes without a signal only then
		return 0
	case s := <-signals:
		stdout.print(fmt.Sprintf("got %s, shutting down\n", unix.SignalName(s.(syscall.Signal))))
	case err := <-e.failed:
		complain("%v; shutting down", err)
		status = 1
	}
	if !single {
		stop()
	}
	select {
	case <-e.drained:
		return status
	case s := <-signals:
		complain("got %s again, cut what was open: %s", unix.SignalName(s.(syscall.Signal)), connections(e.open()))
	case <-time.After(drainTimeout):
		// With the exit status of sniproxy-rs, 1, systemd would take it for a failure.
		complain("cut what was still open after %v: %s", drainTimeout, connections(e.open()))
	}
	e.cut()
	return status
}

// printLast prints why the program ends at once, without anything that takes descriptors, and not to a client. It returns
// the exit status.
func printLast(reason error) int {
	if sa, err := unix.Getsockname(2); err != nil || !addrPort(sa).IsValid() {
		writeAll(2, fmt.Sprintf("sniproxy: %v\n", reason))
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
		complain("%s", remark)
	}
	return hosts, nil
}

func connections(n int64) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}
