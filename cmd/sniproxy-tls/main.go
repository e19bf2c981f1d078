// Command sniproxy-tls ends TLS for a service that has none.
//
//	sniproxy-tls BACKEND [NAME…]
//
// It is run in a host's directory, takes the connections that sniproxy hands over there (package
// hostdir/backend), and passes the plain bytes on to BACKEND, which is one of
//
//	tcp://HOST:PORT  unix://PATH                 bytes, both ways
//	tcp+proxy://HOST:PORT  unix+proxy://PATH     the same behind a PROXY header of version 2
//	http://HOST[:PORT]  http+unix://PATH         requests: HTTP/1.1 and HTTP/2 from clients, HTTP/1.1
//	                                             to the service, WebSocket
//
// NAME are the names that it serves; the default is that of the directory. Clients that name none
// are served as the first; others get the alert unrecognized_name, or 421 for a request.
//
// The certificate is that in cert.pem, with the key in key.pem, in the working directory, or else
// comes from an ACME server, for each NAME, with the challenge tls-alpn-01. If client-ca.pem is
// there, clients must have a certificate from one in it. Certificates and keys are read again when
// they change.
//
// The account with the ACME server and its certificates are in STATE_DIRECTORY, or else in
// XDG_STATE_HOME/sniproxy-tls, or else in ~/.local/state/sniproxy-tls. The server is
// ACME_DIRECTORY, or else Let's Encrypt's. ACME_EMAIL is the address of the account.
//
// It prints "serving NAME…" on standard output once the socket is in place, and what its owner can
// do something about on standard error. SIGTERM, SIGHUP and SIGINT stop it: it takes the socket
// away at once and leaves ten seconds to what is open. A second signal ends it at once. SIGQUIT
// leaves to what is open as long as it takes, or until ten seconds after one of the others.
//
// A datagram socket that systemd passes (LISTEN_FDS) takes the place of the one that it would make.
// That stays when the program ends, and clients wait in it for the next.
//
// With -h in place of BACKEND it prints its usage on standard output.
//
// The exit status is 0 after a stop; 1 when it could not start; 2 for wrong usage.
//
// # Parts
//
//	main.go          start and stop
//	names.go         the NAMEs
//	service.go       the BACKEND
//	clients.go       the connections of clients, and their number
//	terminator.go    TLS: which certificate for whom
//	files.go         certificates from files
//	orders.go        certificates from an ACME server
//	state.go         where those are kept
//	relay.go         bytes
//	proxy.go         requests
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/inherit"
	"sniproxy/cmd/internal/limits"
	"sniproxy/cmd/internal/logline"
	"sniproxy/cmd/internal/usage"
	"sniproxy/hostdir/backend"
)

const usageText = `usage: sniproxy-tls BACKEND [NAME...]

Run in the directory of a host, sniproxy-tls serves it: it ends TLS and passes
what clients send on to BACKEND, which is one of

    http://127.0.0.1:8080     http+unix:///run/x.sock      HTTP requests
    tcp://127.0.0.1:5432      unix:///run/x.sock           bytes
    tcp+proxy://HOST:PORT     unix+proxy:///run/x.sock     bytes, with the PROXY
                                                           protocol

NAME are the names of the host, by default the name of the directory. The certificate
is in cert.pem and key.pem there, or else comes from Let's Encrypt.
`

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	// At once: descriptors 1 and 2 may be a dead pipe.
	signal.Ignore(syscall.SIGPIPE)
	logline.Program = "sniproxy-tls"
	if few := descriptors.Enough(2 + ownDescriptors); few != nil {
		logline.Write(2, fmt.Sprintf("%s: %v\n", logline.Program, few))
		return 1
	}
	defer logline.Flush()
	if usage.Asked(args) {
		if _, err := io.WriteString(os.Stdout, usage.Text(usageText)); err != nil {
			logline.Err("%v", err)
			return 1
		}
		return 0
	}
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		logline.Text(usage.Text(usageText))
		return 2
	}
	// Go's Getwd keeps the symlink through which the shell has come, so that is the name of the
	// host.
	dir, err := os.Getwd()
	if err != nil {
		logline.Err("cannot tell the working directory: %v", err)
		return 1
	}
	service, err := parseService(args[0])
	if err != nil {
		logline.Err("BACKEND %q: %v", args[0], err)
		return 2
	}
	n, err := parseNames(args[1:], dir)
	if err != nil {
		logline.Err("%v", err)
		return 2
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	s, err := start(service, n)
	if err != nil {
		logline.Err("%v", err)
		return 1
	}
	logline.Out("serving %s", strings.Join(n, " "))

	drained := (<-chan struct{})(nil)
	var cut <-chan time.Time // after SIGQUIT there is no end
	for {
		select {
		case <-drained:
			return 0
		case sig := <-signals:
			switch {
			case drained == nil || cut == nil && sig != syscall.SIGQUIT:
				if drained == nil {
					drained = s.stop()
				}
				logline.Out("got %s, shutting down", signalName(sig))
				if sig != syscall.SIGQUIT {
					cut = time.After(limits.Drain)
				}
			case sig != syscall.SIGQUIT:
				logline.Err("got %s again, cut what was open: %s", signalName(sig), connections(s.clients.cut()))
				return 0
			}
		case <-cut:
			if n := s.clients.cut(); n > 0 {
				logline.Err("cut what was still open after %v: %s", limits.Drain, connections(n))
			}
			return 0
		}
	}
}

// A server serves the host.
type server struct {
	socket  *backend.Listener
	clients *clients
	proxy   *proxy // nil where bytes are passed on

	accepted chan struct{} // closed when there is nobody left to accept
}

// start serves the host from now on. The socket comes last: if anything is wrong, whoever served
// the host before goes on.
func start(service *service, n names) (*server, error) {
	f, err := openFiles(n)
	if err != nil {
		return nil, err
	}
	o, err := newOrdersFor(f)
	if err != nil {
		return nil, err
	}
	s := &server{clients: newClients()}
	t := newTerminator(n, service.http, f, o)
	if s.socket, err = takeSocket(); err != nil {
		return nil, err
	}
	l := &listener{s.socket, s.clients, t}
	s.accepted = make(chan struct{})
	if service.http {
		s.proxy = newProxy(n, service, s.clients)
	}
	go func() {
		defer close(s.accepted)
		if s.proxy != nil {
			s.proxy.server.Serve(l)
		} else {
			(&relay{service}).serve(l)
		}
	}()
	go f.follow(t.renew)
	if o != nil {
		o.start()
	}
	return s, nil
}

// takeSocket takes the socket that systemd has passed, or makes one in the working directory.
func takeSocket() (*backend.Listener, error) {
	fd, err := inherit.Datagram()
	if err != nil {
		return nil, err
	}
	if fd >= 0 {
		f := os.NewFile(uintptr(fd), "tls-socket")
		defer f.Close()
		return backend.FileListener(f)
	}
	l, err := backend.Listen(".")
	if err != nil {
		hint := ""
		if errors.Is(err, fs.ErrPermission) {
			hint = ": run it as the owner of the directory"
		}
		return nil, fmt.Errorf("cannot serve the host in the working directory: %w%s", err, hint)
	}
	return l, nil
}

// newOrdersFor prepares to order certificates where there are none in files. It returns nil if
// there are.
func newOrdersFor(f *files) (*orders, error) {
	if f.pair.Load() != nil {
		return nil, nil
	}
	if name := f.names.wildcard(); name != "" {
		return nil, fmt.Errorf("there is no %s with a %s, and an ACME server gives no certificate for %s: the challenge tls-alpn-01 knows no wildcards", certFile, keyFile, name)
	}
	server := os.Getenv("ACME_DIRECTORY")
	if server == "" {
		server = acme.LetsEncryptURL
	}
	if u, err := url.Parse(server); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("ACME_DIRECTORY is %q: it must be the URL of an ACME server's directory, with https", server)
	}
	dir, err := stateDirectory()
	if err != nil {
		return nil, err
	}
	kept, err := openState(dir, server)
	if err != nil {
		return nil, err
	}
	return newOrders(server, os.Getenv("ACME_EMAIL"), kept, f), nil
}

// stop takes the socket away. The channel that it returns is closed when nothing is open any more.
func (s *server) stop() <-chan struct{} {
	if err := s.socket.Stop(); err != nil {
		logline.Err("cannot remove the socket: %v", err)
	}
	if s.proxy != nil {
		s.proxy.stopping.Store(true)
	}
	drained := make(chan struct{})
	go func() {
		<-s.accepted // those whom the proxy had handed over before
		if s.proxy != nil {
			s.proxy.stop(context.Background())
		}
		// Connections with another protocol, such as WebSocket, are no longer the server's.
		for s.clients.len() > 0 {
			time.Sleep(10 * time.Millisecond)
		}
		close(drained)
	}()
	return drained
}

func signalName(s os.Signal) string { return unix.SignalName(s.(syscall.Signal)) }

func connections(n int) string {
	if n != 1 {
		return fmt.Sprintf("%d connections", n)
	}
	return "1 connection"
}
