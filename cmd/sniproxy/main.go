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
//     that listens, and "got SIGHUP, shutting down", or whichever signal it was, at the stop.
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
// SIGHUP, SIGTERM and SIGINT stop the program gracefully: it accepts nothing more, lets go of
// the listening sockets at once, and exits when the last connection has ended, at the
// latest after ten seconds. A second one of them ends it at once. As PID 1 it does the same.
//
// SIGQUIT stops it without the ten seconds: it exits when the last connection has ended, or
// ten seconds after one of the other three.
//
// SIGUSR1, at any time, has it print a line of counters on standard error:
//
//	accepted N, open N, waiting N, refused N (ALERT: N, …), dropped N, bytes up N, bytes down N, descriptors N of N, handed N, empty N
//
// They are connections since the start, those open now, and of these those waiting for their
// hello or backend; clients refused, and how many with which alert; those dropped, or reset, to
// make room; bytes from clients to backends, and back; descriptors in use, and their limit; connections handed
// over; clients that ended without having sent a byte.
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
// # Packages
//
// A package imports only packages that stand below it here.
//
//	cmd/sniproxy                start, signals, stop
//	cmd/internal/epoll          the engine for Linux: event loops
//	cmd/internal/goroutines     the engine for other systems, and for the build tag portable
//	cmd/internal/shares         who tenants are, and what each gets: threads that may wait, descriptors
//	cmd/internal/report         refusals, access lines, counters
//	cmd/internal/inherit        the sockets that the program is given
//	cmd/internal/logline        lines that never block
//	cmd/internal/socket         a socket's addresses, its PROXY header, and descriptors that it passes
//	cmd/internal/descriptors    how many are in use, and their limit
//	cmd/internal/limits         what a connection may take
//	hostdir                     from a name to its directory, its backend and its markers
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
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/socket"
	"sniproxy/hostdir"
)

const usage = `usage: sniproxy < listening TCP socket

It takes no arguments. Standard input is a listening TCP socket or a TCP connection,
unless systemd has passed sockets (LISTEN_FDS), and the working directory holds a
directory NAME, with the Unix socket tls-socket in it, for each host.
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
	if len(os.Args) != 1 {
		logline.Text(usage)
		return 2
	}
	if err != nil {
		logline.Err("%v", err)
		return 1
	}
	hosts, err := openHosts()
	if err != nil {
		logline.Err("%v", err)
		return 1
	}
	e, err := startEngine(hosts, listeners, clients, own)
	if err != nil {
		logline.Err("%v", err)
		return 1
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
	case <-e.Drained(): // without a signal this comes only after a single connection
		return 0
	case s := <-signals:
		logline.Out("got %s, shutting down", signalName(s))
		cut = drainTime(s)
	case err := <-e.Failed():
		logline.Err("%v; shutting down", err)
		cut = time.After(limits.Drain)
		status = 1
	}
	if !single {
		stop()
	}
	for {
		select {
		case <-e.Drained():
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
		all := e.Counters()
		logline.Err("%v, descriptors %d of %d, handed %d, empty %d", all, descriptors.InUse(1<<16), descriptors.Limit(), all.Handed(), all.Empty())
	}
}

func signalName(s os.Signal) string { return unix.SignalName(s.(syscall.Signal)) }

func openConnections(e *engine) string {
	if n := e.Counters().Open(); n != 1 {
		return fmt.Sprintf("%d connections", n)
	}
	return "1 connection"
}
