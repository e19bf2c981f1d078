package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
)

// A service is the BACKEND: what plain bytes or requests are passed on to.
type service struct {
	url     string // as it was given
	network string // "tcp" or "unix"
	addr    string
	http    bool
	header  bool // it wants a PROXY header first
}

// connectTimeout is how long a service has to take a connection.
const connectTimeout = 10 * time.Second

// pathMost is the length of the longest path of a Unix socket: a zero follows it.
const pathMost = len(unix.RawSockaddrUnix{}.Path) - 1

// schemes are those of a BACKEND.
var schemes = map[string]service{
	"tcp":        {network: "tcp"},
	"tcp+proxy":  {network: "tcp", header: true},
	"unix":       {network: "unix"},
	"unix+proxy": {network: "unix", header: true},
	"http":       {network: "tcp", http: true},
	"http+unix":  {network: "unix", http: true},
}

// parseService parses a BACKEND. The error says what is wrong and what to write.
func parseService(backend string) (*service, error) {
	scheme, rest, ok := strings.Cut(backend, "://")
	if !ok {
		return nil, errors.New("it is not a URL such as http://127.0.0.1:8080, tcp://127.0.0.1:5432 or unix:///run/x.sock")
	}
	s, ok := schemes[scheme]
	switch {
	case scheme == "https":
		return nil, errors.New("the service must speak plain HTTP: write http:// and the port on which it does")
	case !ok:
		return nil, fmt.Errorf("unknown scheme %q: it must be http, http+unix, tcp, unix, tcp+proxy or unix+proxy", scheme)
	}
	s.url = backend
	if s.network == "unix" {
		switch {
		case !strings.HasPrefix(rest, "/"):
			return nil, fmt.Errorf("the path of the socket must be absolute, as in %s:///run/x.sock", scheme)
		case len(rest) > pathMost:
			return nil, fmt.Errorf("the path of the socket has %d bytes, and the system allows %d: make it shorter, or make a symlink", len(rest), pathMost)
		case strings.Contains(rest, "\x00"):
			return nil, errors.New("the path of the socket has a zero byte in it")
		}
		s.addr = rest
		return &s, nil
	}
	u, err := url.Parse(backend)
	if err != nil {
		return nil, fmt.Errorf("%w: write %s://HOST:PORT", errors.Unwrap(err), scheme)
	}
	if u.User != nil || u.Path != "" && u.Path != "/" || strings.ContainsAny(rest, "?#") {
		return nil, fmt.Errorf("it must end with the port, as in %s://127.0.0.1:8080: requests keep their own path", scheme)
	}
	host, port := u.Hostname(), u.Port()
	if port == "" && s.http {
		port = "80"
	}
	if n, err := strconv.ParseUint(port, 10, 16); host == "" || err != nil || n == 0 {
		return nil, fmt.Errorf("write %s://HOST:PORT, such as %[1]s://127.0.0.1:8080; a port is a number from 1 to 65535", scheme)
	}
	s.addr = net.JoinHostPort(host, port)
	return &s, nil
}

// dial connects to the service.
func (s *service) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, s.network, s.addr)
		// A Unix socket with a full backlog. There is nothing to wait for but time.
		if !errors.Is(err, unix.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(limits.Redial):
		}
	}
}

// advice says what to do about an error of dial.
func advice(err error) string {
	timeout, ok := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "nobody listens there: start the service"
	case errors.Is(err, unix.ENOENT):
		return "there is no such socket: start the service"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return "permission denied: let this user write to the socket, and search the directories that lead there"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return "no descriptors are left: raise the limit of open files (ulimit -n, LimitNOFILE=)"
	case errors.Is(err, unix.EAGAIN):
		return fmt.Sprintf("its backlog was full for %v: is the service stuck?", connectTimeout)
	case ok && timeout.Timeout():
		return fmt.Sprintf("no answer within %v: is the service stuck, or behind a firewall?", connectTimeout)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	return err.Error()
}
