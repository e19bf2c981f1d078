// The host one.example, served by a Go program: go run server.go
//
// Change the path of the socket, the certificate and its key, and what the server answers.
//
// The server makes its socket with mode 0666, so let nobody but sniproxy in:
//
//	mkdir -m 0710 /srv/sniproxy/one.example && chown alice:sniproxy /srv/sniproxy/one.example
//
// and run the server as alice. Under one.example.socket systemd makes the socket, and the server
// takes that. The server reads no PROXY headers, so make no marker send-proxy-v1 or send-proxy-v2.
// To read them, put a listener of github.com/pires/go-proxyproto around l.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	l, err := listen("/srv/sniproxy/one.example/tls-socket")
	if err != nil {
		log.Fatal(err)
	}
	page := func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "This is %s.\n", r.Host) }
	server := &http.Server{
		Handler: http.HandlerFunc(page),
		// Clients that send nothing must not stay for ever.
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
	}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ended := make(chan error)
	go func() {
		<-stop.Done()
		ended <- server.Shutdown(context.Background()) // lets open requests end
	}()
	err = server.ServeTLS(l, "/etc/ssl/one.example.crt", "/etc/ssl/private/one.example.key")
	if !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	if err := <-ended; err != nil {
		log.Fatal(err)
	}
}

func listen(path string) (net.Listener, error) {
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		return net.FileListener(os.NewFile(3, path))
	}
	// The socket is made under another name, and then replaces that of an earlier run in one step:
	// one that a crash has left, or one that still serves.
	made := path + ".new"
	if err := os.Remove(made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", made)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // a successor may have made one by then
	if err := os.Chmod(made, 0o666); err != nil {
		return nil, err
	}
	return l, os.Rename(made, path)
}
