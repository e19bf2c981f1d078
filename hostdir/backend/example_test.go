package backend_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"

	"golang.org/x/crypto/acme/autocert"

	"sniproxy/hostdir/backend"
)

// A web server.
func Example() {
	l, err := backend.Listen(exampleDir) // such as /srv/sniproxy/one.example
	if err != nil {
		log.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		addr, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "hello %s", addr)
	})
	go http.ServeTLS(l, handler, certFile, keyFile)

	fmt.Println(visit("GET / HTTP/1.0\r\n\r\n"))
	// Output: hello 127.0.0.1
}

// Any other service over TLS: this one sends back what it is sent.
func Example_tls() {
	l, err := backend.Listen(exampleDir)
	if err != nil {
		log.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		log.Fatal(err)
	}
	service := tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})
	go func() {
		for {
			c, err := service.Accept()
			if err != nil {
				log.Fatal(err) // the listener was closed
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()

	fmt.Println(visit("hello"))
	// Output: hello
}

// A web server that gets its certificate from Let's Encrypt, as soon as the first client comes. The
// challenge, tls-alpn-01, comes through the proxy as any client does.
func Example_autocert() {
	l, err := backend.Listen(exampleDir)
	if err != nil {
		log.Fatal(err)
	}
	certificates := &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		HostPolicy: autocert.HostWhitelist("one.example"),
		Cache:      autocert.DirCache(cacheDir), // such as /var/lib/one.example
	}
	server := &http.Server{
		TLSConfig: certificates.TLSConfig(),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "hello")
		}),
	}
	go server.ServeTLS(l, "", "")

	fmt.Println(visit("GET / HTTP/1.0\r\n\r\n"))
	// Output: hello
}
