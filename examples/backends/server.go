// The host one.example, served by a Go program: go run server.go
//
// Change the path of the socket, the certificate and its key, and what the server answers.
//
// The server makes its socket with mode 0666, so let nobody but sniproxy in:
//
//	install -d -m 0710 -o alice -g sniproxy /srv/sniproxy/one.example
//
// and run the server as alice. Without more it reads no PROXY headers, so make no marker
// send-proxy-v1 or send-proxy-v2. To read them, put a listener of
// github.com/pires/go-proxyproto around l.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
)

func main() {
	const path = "/srv/sniproxy/one.example/tls-socket"
	// A socket that an earlier run has left is in the way.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		log.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		log.Fatal(err)
	}
	page := func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "This is %s.\n", r.Host) }
	log.Fatal(http.ServeTLS(l, http.HandlerFunc(page), "/etc/ssl/one.example.crt", "/etc/ssl/private/one.example.key"))
}
