package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sniproxy/hostdir/hostdirtest"
)

// nodeServer answers each request with what it is, as JSON.
const nodeServer = `
const server = require('http').createServer((q, r) => {
	let n = 0
	q.on('data', d => n += d.length)
	q.on('end', () => r.end(JSON.stringify({method: q.method, uri: q.url, version: q.httpVersion, headers: q.headers, bytes: n, trailers: q.trailers})))
})
server.listen(process.argv[2], '127.0.0.1')
`

// A request is what the service in Node.js says it was.
type request struct {
	Method, URI, Version string
	Headers              map[string]string
	Bytes                int
	Trailers             map[string]string
}

// node starts the service in Node.js, and returns its address.
func node(t testing.TB) string {
	t.Helper()
	addr := freeAddr(t)
	launch(t, exec.Command(hostdirtest.Need(t, "node"), "-e", nodeServer, "-", portOf(addr)))
	awaitListener(t, "tcp", addr)
	return addr
}

func parseRequest(t testing.TB, text string) (r request) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatalf("%v: %q", err, text)
	}
	return r
}

// Goal: curl reaches a service in Node.js by HTTP/1.0, 1.1 and 2. The service gets the URI and the
// Host to the byte, who the client is, and nothing that a client says of that.
func TestCurl(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "http://"+node(t))
	for _, version := range []string{"--http1.0", "--http1.1", "--http2"} {
		for _, uri := range []string{"/", "/?", "//", "//a//b?", "/a%2fb%2F;c=d;e?x;y=1&z=%7e&&=", "/%7euser/./a/../b", "/?a?b=/../", "/a|b\"^`{}", "//x/a|b\"?{}"} {
			if strings.Contains(uri, "\"") && version == "--http2" {
				continue // curl 7.88 encodes it
			}
			cmd := s.curl(t, "one.example", version, "--path-as-is", "--globoff", "--request-target", uri,
				"-H", "X-Forwarded-For: 192.0.2.9", "-H", "X-Forwarded-Proto: http", "-H", "X-Forwarded-Host: evil.example", "-H", "X-Forwarded-Port: 1",
				"-H", "Forwarded: for=192.0.2.9", "-H", "X-Real-IP: 192.0.2.9", "-H", "X_Forwarded_For: 192.0.2.9", "-H", "X_Real_IP: 192.0.2.9", "-H", "x_any: 1", "-H", "X.Forwarded.For: 192.0.2.9", "-H", "X-Real~IP: 192.0.2.9",
				"-H", "Connection: X-Forwarded-For, x-hop", "-H", "X-Hop: 1", "-H", "X-Other: kept", "-H", "Host: One.Example:443", "https://one.example/")
			r := parseRequest(t, output(t, cmd))
			if r.URI != uri || r.Method != "GET" || r.Version != "1.1" {
				t.Errorf("%s %s: %+v", version, uri, r)
			}
			want := map[string]string{
				"host": "One.Example:443", "x-forwarded-host": "One.Example:443", "x-forwarded-proto": "https",
				"x-forwarded-for": "127.0.0.1", "x-other": "kept",
			}
			for name, value := range r.Headers {
				switch name {
				case "accept", "user-agent", "connection":
					continue
				case "x-hop":
					if version == "--http2" {
						continue // it knows no Connection, so curl does not send that
					}
				}
				if want[name] != value {
					t.Errorf("%s %s: header %s: %q", version, uri, name, value)
				}
				delete(want, name)
			}
			if len(want) > 0 {
				t.Errorf("%s %s: missing headers %v", version, uri, want)
			}
		}
	}
}

// Goal: bodies of any length, with a length or in chunks, also behind "Expect: 100-continue", and
// trailers, reach the service.
func TestBodies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "http://"+node(t))
	big := filepath.Join(t.TempDir(), "big")
	hostdirtest.Must(t, os.WriteFile(big, make([]byte, 20<<20), 0o644))
	for _, args := range [][]string{
		{"--http1.1", "-T", big},
		{"--http1.1", "-T", big, "-H", "Transfer-Encoding: chunked"},
		{"--http1.1", "--data-binary", "@" + big, "-H", "Expect: 100-continue"},
		{"--http2", "-T", big},
		{"--http2", "--data-binary", "@" + big},
	} {
		r := parseRequest(t, output(t, s.curl(t, "one.example", append(args, "https://one.example/")...)))
		if r.Bytes != 20<<20 {
			t.Errorf("%q: %d bytes", args, r.Bytes)
		}
	}
	for _, http2 := range []bool{false, true} {
		q, _ := http.NewRequest("POST", "https://one.example/", io.MultiReader(strings.NewReader("body")))
		q.Trailer = http.Header{"X-Sum": {"1"}, "X_Forwarded_for": {"2"}, "X-Forwarded-For": {"3"}}
		answer, err := s.client(t, http2).Do(q)
		hostdirtest.Must(t, err)
		text, err := io.ReadAll(answer.Body)
		hostdirtest.Must(t, err)
		r := parseRequest(t, string(text))
		if len(r.Trailers) != 1 || r.Trailers["x-sum"] != "1" || r.Bytes != 4 {
			t.Errorf("HTTP/2 %v: %+v", http2, r)
		}
	}
}

// Goal: a service that refuses what a client announces by "Expect: 100-continue" does so before the
// client has sent it.
func TestRefusedBody(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	body := make(chan int, 1)
	s.serve(t, "one.example", "http://"+listen(t, func(c net.Conn) {
		in := bufio.NewReader(c)
		if r, err := http.ReadRequest(in); err != nil || r.Header.Get("Expect") != "100-continue" {
			t.Errorf("%v, %v", r, err)
		}
		io.WriteString(c, "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		c.(*net.TCPConn).CloseWrite()
		rest, _ := io.ReadAll(in)
		body <- len(rest)
	}))
	c := s.dial(t, s.config("one.example"))
	io.WriteString(c, "PUT / HTTP/1.1\r\nHost: one.example\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || answer.StatusCode != 417 {
		t.Errorf("%v, %v", answer, err)
	}
	if n := <-body; n != 0 {
		t.Errorf("the service got %d bytes", n)
	}
}

// Goal: a client cannot change to another version of HTTP, in which it could send any header, but
// to WebSocket.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%q %q", r.Header.Get("Connection"), r.Header.Get("Upgrade"))
	}))
	for upgrade, want := range map[string]string{
		"websocket": `"Upgrade" "websocket"`, "h2c": `"" ""`, "websocket, H2C": `"" ""`, "HTTP/2.0": `"" ""`, "TLS/1.0": `"" ""`,
	} {
		q, _ := http.NewRequest("GET", "https://one.example/", nil)
		q.Header.Set("Connection", "Upgrade, HTTP2-Settings")
		q.Header.Set("Upgrade", upgrade)
		q.Header.Set("HTTP2-Settings", "AAMAAABkAAQAAP__")
		answer, err := s.client(t, false).Do(q)
		hostdirtest.Must(t, err)
		text, err := io.ReadAll(answer.Body)
		if string(text) != want || err != nil {
			t.Errorf("%s: %s, %v", upgrade, text, err)
		}
	}
}

// python serves a directory of files, by HTTP/1.0, and returns its address.
func python(t testing.TB, dir string) string {
	t.Helper()
	addr := freeAddr(t)
	cmd := exec.Command(hostdirtest.Need(t, "python3"), "-m", "http.server", "--bind", "127.0.0.1", portOf(addr))
	cmd.Dir = dir
	launch(t, cmd)
	awaitListener(t, "tcp", addr)
	return addr
}

// Goal: a service in Python, which closes each connection, is served, and by its files byte for
// byte.
func TestPython(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	dir := t.TempDir()
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	hostdirtest.Must(t, os.WriteFile(filepath.Join(dir, "file"), content, 0o644))
	s.serve(t, "one.example", "http://"+python(t, dir))
	for _, version := range []string{"--http1.1", "--http2"} {
		for range 3 {
			if got := output(t, s.curl(t, "one.example", version, "https://one.example/file")); got != string(content) {
				t.Errorf("%s: %d bytes", version, len(got))
			}
		}
		if got := output(t, s.curl(t, "one.example", version, "-o", "/dev/null", "-w", "%{http_code}", "https://one.example/none")); got != "404" {
			t.Errorf("%s: status %s", version, got)
		}
	}
}

// handler starts an HTTP service on a Unix socket, and returns its BACKEND.
func handler(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	path := filepath.Join(hostdirtest.Dir(t), "s")
	l, err := net.Listen("unix", path)
	hostdirtest.Must(t, err)
	server := &http.Server{Handler: h, DisableGeneralOptionsHandler: true}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return "http+unix://" + path
}

// Goal: what a service says reaches the client as it was: early, in pieces, compressed or without a
// type, with trailers and an interim answer.
func TestAnswers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	read := make(chan struct{})
	s.serve(t, "one.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stream":
			w.Header().Set("Content-Length", "10")
			for _, part := range []string{"first", "later"} {
				io.WriteString(w, part)
				w.(http.Flusher).Flush()
				<-read
			}
		case "/untyped":
			w.Header()["Content-Type"] = nil
			io.WriteString(w, "<html>")
		case "/gzip":
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("X-Asked", r.Header.Get("Accept-Encoding"))
			io.WriteString(w, "\x1f\x8bnot really")
		case "/hints":
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Del("Link")
			io.WriteString(w, "page")
		case "/trailers":
			w.Header().Set("Trailer", "X-Sum")
			io.WriteString(w, "page")
			w.Header().Set("X-Sum", "7")
			w.Header().Set(http.TrailerPrefix+"X-Late", "8")
		case "/early":
			w.WriteHeader(http.StatusRequestEntityTooLarge)
		}
	}))
	for _, http2 := range []bool{false, true} {
		client := s.client(t, http2)
		get := func(path string) (*http.Response, string) {
			answer, err := client.Get("https://one.example" + path)
			hostdirtest.Must(t, err)
			defer answer.Body.Close()
			if want := map[bool]int{false: 1, true: 2}[http2]; answer.ProtoMajor != want {
				t.Errorf("%s", answer.Proto)
			}
			if path == "/stream" {
				for _, want := range []string{"first", "later"} {
					b := make([]byte, 5)
					if _, err := io.ReadFull(answer.Body, b); err != nil || string(b) != want {
						t.Errorf("HTTP/2 %v: %q, %v", http2, b, err)
					}
					read <- struct{}{}
				}
			}
			text, err := io.ReadAll(answer.Body)
			hostdirtest.Must(t, err)
			return answer, string(text)
		}
		get("/stream")
		if answer, text := get("/untyped"); len(answer.Header["Content-Type"]) > 0 || text != "<html>" {
			t.Errorf("HTTP/2 %v: %v, %q", http2, answer.Header, text)
		}
		if answer, text := get("/gzip"); answer.Header.Get("X-Asked") != "" || text != "\x1f\x8bnot really" {
			t.Errorf("HTTP/2 %v: %v, %q", http2, answer.Header, text)
		}
		if answer, text := get("/hints"); answer.StatusCode != 200 || text != "page" || answer.Header.Get("Link") != "" {
			t.Errorf("HTTP/2 %v: %v, %q", http2, answer.Header, text)
		}
		if answer, _ := get("/trailers"); answer.Trailer.Get("X-Sum") != "7" || answer.Trailer.Get("X-Late") != "8" {
			t.Errorf("HTTP/2 %v: trailers %v", http2, answer.Trailer)
		}
		answer, err := client.Post("https://one.example/early", "", bytes.NewReader(make([]byte, 50<<20)))
		if err != nil || answer.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("HTTP/2 %v: %v, %v", http2, answer, err)
		}
	}
}

// Goal: a part of a body is sent at once, and its end, which is sent anyway, not by itself; this
// holds whether its length is known or not.
func TestAnswerFlush(t *testing.T) {
	for _, length := range []string{"10", ""} {
		r := httptest.NewRecorder()
		a := &answer{ResponseWriter: r}
		if length != "" {
			a.Header().Set("Content-Length", length)
		}
		a.WriteHeader(200)
		for i := range 2 {
			r.Flushed = false
			io.WriteString(a, "piece")
			if want := i == 0 || length == ""; r.Flushed != want {
				t.Errorf("length %q, piece %d: flushed %v", length, i, r.Flushed)
			}
		}
	}
}

// Goal: a request for another host gets 421, however it names that host; CONNECT gets 405, and what
// is malformed 400.
func TestMisdirected(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example", "www.one.example")
	p := s.serve(t, "one.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, r.Host, " ", r.RequestURI)
	}), "one.example", "www.one.example")
	for _, test := range []struct{ request, want string }{
		{"GET / HTTP/1.1\r\nHost: one.example\r\n\r\n", "200 one.example /"},
		{"GET / HTTP/1.1\r\nHost: WWW.one.example.:8443\r\n\r\n", "200 WWW.one.example.:8443 /"},
		{"GET https://www.one.example/a/b?c HTTP/1.1\r\nHost: other.example\r\n\r\n", "200 www.one.example /a/b?c"},
		{"GET https://www.one.example?c HTTP/1.1\r\nHost: other.example\r\n\r\n", "200 www.one.example /?c"},
		{"OPTIONS * HTTP/1.1\r\nHost: one.example\r\n\r\n", "200 one.example *"},
		{"GET / HTTP/1.0\r\n\r\n", "200 one.example /"},
		{"GET https://other.example/ HTTP/1.1\r\nHost: one.example\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: two.example\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: a.one.example\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: one.example..\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: [::1]:443\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost:\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\nHost: :80\r\n\r\n", "421 "},
		{"GET / HTTP/1.0\r\nHost: :80\r\n\r\n", "421 "},
		{"GET / HTTP/1.1\r\n\r\n", "400 "},
		{"POST / HTTP/1.1\r\nHost: one.example\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "400 "},
		{"CONNECT one.example:443 HTTP/1.1\r\nHost: one.example:443\r\n\r\n", "405 "},
	} {
		c := s.dial(t, s.config("one.example"))
		io.WriteString(c, test.request)
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%q: %v", test.request, err)
			continue
		}
		text, _ := io.ReadAll(io.LimitReader(answer.Body, max(answer.ContentLength, 0)))
		if got := strconv.Itoa(answer.StatusCode) + " " + string(text); !strings.HasPrefix(got, test.want) {
			t.Errorf("%q: %q, want %q", test.request, got, test.want)
		}
	}
	if p.lines.Find("no answer from") != "" {
		t.Error("the service is blamed for what a client did")
	}
	q, _ := http.NewRequest("GET", "https://one.example/", nil)
	q.Host = "two.example"
	answer, err := s.client(t, true).Do(q)
	if err != nil || answer.StatusCode != 421 || answer.ProtoMajor != 2 {
		t.Errorf("%v, %v", answer, err)
	}
}

// Goal: no client adds to the request line that the service gets. HTTP/2 allows a space in a path.
func TestSpaceInPath(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "http://"+listen(t, func(c net.Conn) {
		line, _ := bufio.NewReader(c).ReadString('\n')
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\nLine: %s\r\n\r\n", strings.TrimSpace(line))
	}))
	config := s.config("one.example")
	config.NextProtos = []string{"h2"}
	c := s.dial(t, config)
	io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	hostdirtest.Must(t, f.WriteSettings())
	for i, path := range []string{"/a", "/a HTTP/1.1", "/?a b", "/a%20b"} {
		var block bytes.Buffer
		e := hpack.NewEncoder(&block)
		for _, field := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "one.example"}, {":path", path}} {
			hostdirtest.Must(t, e.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}))
		}
		hostdirtest.Must(t, f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}))
		var answer *http2.MetaHeadersFrame
		for answer == nil {
			frame, err := f.ReadFrame()
			hostdirtest.Must(t, err)
			if m, ok := frame.(*http2.MetaHeadersFrame); ok && m.StreamID == uint32(2*i+1) {
				answer = m
			}
		}
		got := answer.PseudoValue("status")
		for _, field := range answer.RegularFields() {
			if field.Name == "line" {
				got += " " + field.Value
			}
		}
		want := "200 GET " + path + " HTTP/1.1"
		if strings.Contains(path, " ") {
			want = "400"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

// Goal: while the service is down clients get 502, and a line says why; once it is there it is
// served. Nothing needs a restart.
func TestServiceComesLater(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	addr := freeAddr(t)
	p := s.serve(t, "one.example", "http://"+addr)
	client := s.client(t, false)
	status := func() int {
		answer, err := client.Get("https://one.example/")
		hostdirtest.Must(t, err)
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		return answer.StatusCode
	}
	if got := status(); got != http.StatusBadGateway {
		t.Errorf("status %d", got)
	}
	p.lines.Await(t, "cannot connect to http://"+addr+": nobody listens there: start the service")
	server := &http.Server{Addr: addr, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go server.ListenAndServe()
	hostdirtest.Await(t, "the service", func() bool { return status() == 200 })
	server.Close()
	if got := status(); got != http.StatusBadGateway {
		t.Errorf("status %d", got)
	}
}

// Goal: no request is sent to the service twice, unless that does not matter; and no request is
// lost because the service ends a connection that it has kept, be it without a word.
func TestKeptConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	var mu sync.Mutex
	got := map[string]int{}
	connections := 0
	addr := listen(t, func(c net.Conn) {
		mu.Lock()
		connections++
		mu.Unlock()
		in := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			io.Copy(io.Discard, r.Body)
			mu.Lock()
			got[r.Method+r.URL.Path]++
			mu.Unlock()
			if r.URL.Path == "/dies" {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if r.URL.Path == "/last" {
				return
			}
		}
	})
	s.serve(t, "one.example", "http://"+addr)
	client := s.client(t, false)
	do := func(method, path string) int {
		var body io.Reader
		if method == "POST" {
			body = strings.NewReader("x")
		}
		q, _ := http.NewRequest(method, "https://one.example"+path, body)
		answer, err := client.Do(q)
		hostdirtest.Must(t, err)
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		return answer.StatusCode
	}
	for range 20 {
		if status := do("GET", "/"); status != 200 {
			t.Errorf("status %d", status)
		}
	}
	mu.Lock()
	if connections > 10 {
		t.Errorf("%d connections for 20 requests", connections)
	}
	mu.Unlock()
	if status := do("POST", "/dies"); status != http.StatusBadGateway {
		t.Errorf("status %d", status)
	}
	for range 20 {
		if status := do("GET", "/last"); status != 200 {
			t.Errorf("status %d", status)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if got["POST/dies"] != 1 {
		t.Errorf("a POST was sent %d times", got["POST/dies"])
	}
}

// Goal: a client that sends nothing, or the head of a request too slowly, has ten seconds, and
// others are served meanwhile.
func TestSlowClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	t.Parallel()
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", handler(t, func(http.ResponseWriter, *http.Request) {}))
	begin := time.Now()
	slow := s.dial(t, s.config("one.example"))
	stop := make(chan struct{})
	go func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		io.WriteString(slow, "GET / HTTP/1.1\r\nHost: one.example\r\n")
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				io.WriteString(slow, "X: 1\r\n")
			}
		}
	}()
	if answer, err := s.client(t, false).Get("https://one.example/"); err != nil || answer.StatusCode != 200 {
		t.Errorf("%v, %v", answer, err)
	}
	answer, err := io.ReadAll(slow)
	close(stop)
	if took := time.Since(begin); took < 9*time.Second || bytes.Contains(answer, []byte(" 200 ")) {
		t.Errorf("it ended after %v: %q, %v", took, answer, err)
	}
}
