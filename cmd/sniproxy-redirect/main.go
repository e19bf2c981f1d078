// Command sniproxy-redirect sends those who come by HTTP to HTTPS. It answers every request with
// the status 308 and the same address with https, and does nothing else.
//
//	sniproxy-listen :80 sniproxy-redirect
//
// Its standard input is a bound and listening TCP socket, or one TCP connection, or systemd passes
// sockets (LISTEN_FDS), as for sniproxy. Location is https://HOST/PATH?QUERY. HOST is that of the
// request without its port, and as canonical as sniproxy's names; an IP address stays as it is. A
// request without a host, or with one that is neither, gets 400. PATH and QUERY are those of the
// request, to the byte.
//
// A request has ten seconds, and its head at most 8 KiB. SIGHUP, SIGTERM, SIGINT and SIGQUIT stop
// the program as they stop sniproxy.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/socket"
	"sniproxy/cmd/internal/usage"
)

const usageText = `usage: sniproxy-redirect < listening TCP socket

Answers every HTTP request with a redirect to the same address with https. It takes no
arguments. Standard input is a listening TCP socket or a TCP connection, unless systemd
has passed sockets (LISTEN_FDS). For example, as root:

    sniproxy-listen :80 sniproxy-redirect
`

// needed is how many descriptors the program needs besides those that it was given: two for Go's
// poller, without which the runtime ends the program, one to take over a socket, and two clients.
const needed = 5

func main() { os.Exit(run()) }

func run() int {
	// At once: descriptors 1 and 2 may be a dead pipe, or the listening socket, for which write(2)
	// is EPIPE.
	signal.Ignore(syscall.SIGPIPE)
	logline.Program = "sniproxy-redirect"
	// Before anything is printed: it must not get into the stream of a client.
	listeners, clients, err := inherit.Take()
	if few := descriptors.Enough(descriptors.InUse(1024) + needed); few != nil {
		return printLast(few)
	}
	defer logline.Flush()
	switch args := os.Args[1:]; {
	case usage.Asked(args):
		logline.Out("%s", strings.TrimSuffix(usage.Text(usageText), "\n"))
		return 0
	case len(args) > 0:
		logline.Text(usage.Text(usageText))
		return 2
	}
	if err != nil {
		logline.Err("%v", err)
		return 1
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	s, err := startServer(listeners, clients)
	if err != nil {
		logline.Err("%v", err)
		return 1
	}
	for _, l := range listeners {
		logline.Out("listening on %v", l.Addr)
	}

	status := 0
	select {
	case <-s.drained: // without a signal this comes only after a single connection
		return 0
	case sig := <-signals:
		logline.Out("got %s, shutting down", signalName(sig))
	case err := <-s.failed:
		logline.Err("%v; shutting down", err)
		status = 1
	}
	s.stop()
	for {
		select {
		case <-s.drained: // after ten seconds at the latest, as no request has more
			return status
		case sig := <-signals:
			if sig != syscall.SIGQUIT {
				logline.Err("got %s again, cut what was open: %s", signalName(sig), connections(s.cut()))
				return status
			}
		}
	}
}

// printLast prints why the program ends at once. It takes no descriptors, and prints nothing to a
// client. It returns the exit status.
func printLast(reason error) int {
	if sa, err := unix.Getsockname(2); err != nil || !socket.AddrPort(sa).IsValid() {
		logline.Write(2, fmt.Sprintf("%s: %v\n", logline.Program, reason))
	}
	return 1
}

func signalName(s os.Signal) string { return unix.SignalName(s.(syscall.Signal)) }

func connections(n int) string {
	if n != 1 {
		return fmt.Sprintf("%d connections", n)
	}
	return "1 connection"
}
