package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
)

// benchClients is how many clients make requests at the same time.
const benchClients = 8

// With this in its environment the test binary is the least that a Go program can do with the
// connections that it is handed: package httputil with its defaults. The value is the path of the
// service's socket.
const runPlain = "SNIPROXY_TLS_RUN_PLAIN"

func plain(service string) {
	l, err := backend.Listen(".")
	if err != nil {
		panic(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "service"})
	proxy.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", service)
		},
		MaxIdleConnsPerHost: serviceIdleMost,
	}
	fmt.Println("serving")
	panic(http.ServeTLS(l, proxy, certFile, keyFile))
}

// BenchmarkTLS compares sniproxy-tls with nginx, and with the least that Go can do: the same
// certificate, client and service, each behind a sniproxy of its own. One operation is a request by
// HTTP/1.1 on a connection that is kept or that is new, or a download of 1 GiB. Besides the time it
// reports the processor time of the program that ends TLS, and that of sniproxy, which passes on
// the bytes of nginx and hands the connections of the others over.
//
//	go test -run '^$' -bench TLS ./cmd/sniproxy-tls
func BenchmarkTLS(b *testing.B) {
	service := handler(b, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/page" {
			w.Header().Set("Content-Length", strconv.Itoa(len(benchPage)))
			w.Write(benchPage)
			return
		}
		const size = 1 << 30
		w.Header().Set("Content-Length", strconv.Itoa(size))
		chunk := make([]byte, 128<<10)
		for sent := 0; sent < size; sent += len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	for _, terminator := range []string{"sniproxy-tls", "plain", "nginx"} {
		b.Run(terminator, func(b *testing.B) {
			s := newSite(b)
			s.install(b, "one.example", "one.example")
			var p *process
			switch terminator {
			case "nginx":
				p = s.serveNginx(b, "one.example", strings.TrimPrefix(service, "http+"))
			case "plain":
				cmd := hostdirtest.Command(b, runPlain+"="+strings.TrimPrefix(service, "http+unix://"))
				cmd.Dir = s.dir(b, "one.example")
				p = launch(b, cmd)
				p.lines.Await(b, "serving")
			default:
				p = s.serve(b, "one.example", service)
			}
			for _, kept := range []bool{true, false} {
				b.Run(map[bool]string{true: "kept", false: "new"}[kept], func(b *testing.B) {
					s.benchRequests(b, p, kept)
				})
			}
			b.Run("download", func(b *testing.B) {
				b.SetBytes(1 << 30)
				report := s.processorTimes(b, p, 1e3, "ms")
				client := s.client(b, false)
				client.Timeout = 0
				for b.Loop() {
					answer, err := client.Get("https://one.example/download")
					hostdirtest.Must(b, err)
					n, err := io.Copy(io.Discard, answer.Body)
					hostdirtest.Must(b, err)
					answer.Body.Close()
					if n != 1<<30 {
						b.Fatalf("%d bytes", n)
					}
				}
				report()
			})
		})
	}
}

var benchPage = bytes.Repeat([]byte("page"), 256)

func (s *site) benchRequests(b *testing.B, p *process, kept bool) {
	client := s.client(b, false)
	transport := client.Transport.(*http.Transport)
	transport.DisableKeepAlives = !kept
	transport.MaxIdleConnsPerHost = benchClients
	report := s.processorTimes(b, p, 1e6, "µs")
	work := make(chan struct{})
	var clients sync.WaitGroup
	for range benchClients {
		clients.Go(func() {
			for range work {
				answer, err := client.Get("https://one.example/page")
				if err != nil {
					b.Error(err)
					continue
				}
				if n, err := io.Copy(io.Discard, answer.Body); err != nil || n != int64(len(benchPage)) {
					b.Errorf("%d bytes, %v", n, err)
				}
				answer.Body.Close()
			}
		})
	}
	for b.Loop() {
		work <- struct{}{}
	}
	close(work)
	clients.Wait()
	report()
}

// serveNginx serves a host by nginx, in one process.
func (s *site) serveNginx(b *testing.B, host, service string) *process {
	b.Helper()
	dir := s.dir(b, host)
	put(b, filepath.Join(dir, "config"), fmt.Appendf(nil, `
daemon off;
master_process off;
error_log stderr;
pid pid;
worker_rlimit_nofile 4096;
events { worker_connections 2048; }
http {
	access_log off;
	client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
	keepalive_requests 1000000000;
	upstream service { server %s; keepalive 64; keepalive_requests 1000000000; }
	server {
		listen unix:%s/tls-socket ssl;
		ssl_certificate cert.pem;
		ssl_certificate_key key.pem;
		ssl_protocols TLSv1.2 TLSv1.3;
		location / {
			proxy_pass http://service;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host $http_host;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_max_temp_file_size 0;
		}
	}
}
`, service, dir))
	p := launch(b, exec.Command(hostdirtest.Need(b, "nginx"), "-p", dir, "-e", "stderr", "-c", "config"))
	awaitListener(b, "unix", filepath.Join(dir, "tls-socket"))
	hostdirtest.Must(b, os.Chmod(filepath.Join(dir, "tls-socket"), 0o666))
	return p
}

// processorTimes returns a function that reports the processor times since now, for an operation.
func (s *site) processorTimes(b *testing.B, p *process, scale float64, unit string) (report func()) {
	b.Helper()
	tls, proxy := processorTime(b, p.Process.Pid), processorTime(b, s.proxy.Process.Pid)
	return func() {
		b.ReportMetric((processorTime(b, p.Process.Pid)-tls)/float64(b.N)*scale, "tls-"+unit+"/op")
		b.ReportMetric((processorTime(b, s.proxy.Process.Pid)-proxy)/float64(b.N)*scale, "sniproxy-"+unit+"/op")
	}
}

// processorTime returns how many seconds of processor time a process has used.
func processorTime(b *testing.B, pid int) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip(err) // it is for Linux
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	const ticks = 100 // a second, on every machine that Go runs on
	return (user + system) / ticks
}
