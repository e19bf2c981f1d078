package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
)

// webSocketServer is a service in Python that sends back each message.
const webSocketServer = `
import asyncio, sys, websockets
async def echo(ws, *rest):
    async for message in ws:
        await ws.send(message)
async def main():
    async with websockets.serve(echo, "127.0.0.1", int(sys.argv[1]), subprotocols=["echo"], max_size=None):
        await asyncio.Future()
asyncio.run(main())
`

// webSocketClient sends messages, short and long, and a pause in between, and checks what comes
// back.
const webSocketClient = `
import asyncio, ssl, sys, websockets
async def main():
    context = ssl.create_default_context(cafile=sys.argv[2])
    async with websockets.connect("wss://one.example/chat?x", host="127.0.0.1", port=int(sys.argv[1]), ssl=context,
                                  server_hostname="one.example", subprotocols=["echo"], max_size=None) as ws:
        assert ws.subprotocol == "echo"
        for message in ["text", b"bytes" * 1000000, "more"]:
            await ws.send(message)
            assert await ws.recv() == message
        await ws.ping()
    print("ok")
asyncio.run(main())
`

// webSocket starts the service, and returns its address, and the Python that has what it takes:
// that of the system, which need not be the first in PATH.
func webSocket(t testing.TB) (addr, python string) {
	t.Helper()
	for _, python := range []string{hostdirtest.Need(t, "python3"), "/usr/bin/python3"} {
		if exec.Command(python, "-c", "import websockets").Run() == nil {
			addr := freeAddr(t)
			launch(t, exec.Command(python, "-c", webSocketServer, portOf(addr)))
			awaitListener(t, "tcp", addr)
			return addr, python
		}
	}
	hostdirtest.Missing(t, "python3-websockets")
	return "", ""
}

// Goal: a client in Python talks to a service in Python by WebSocket.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	addr, python := webSocket(t)
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	s.serve(t, "one.example", "http://"+addr)
	if got := output(t, exec.Command(python, "-c", webSocketClient, portOf(s.addr), s.caPEM)); got != "ok\n" {
		t.Errorf("%q", got)
	}
}

// page is run by a browser. It tells what it has found by a last request.
const page = `<!DOCTYPE html><title>test</title><script>
async function main() {
	const found = []
	const big = await (await fetch('/big')).arrayBuffer()
	found.push(big.byteLength, (await fetch('/protocol')).headers.get('X-Protocol'))
	const answers = await Promise.all([...Array(50).keys()].map(i => fetch('/echo', {method: 'POST', body: 'body ' + i}).then(r => r.text())))
	found.push(answers.every((a, i) => a === 'body ' + i))
	found.push(performance.getEntriesByName(location.origin + '/big')[0].nextHopProtocol)
	const socket = new WebSocket('wss://' + location.host + '/chat', 'echo')
	found.push(await new Promise((resolve, reject) => {
		socket.onopen = () => socket.send('a message')
		socket.onmessage = e => { resolve(e.data); socket.close() }
		socket.onerror = () => reject('WebSocket failed')
	}))
	const events = new EventSource('/events')
	found.push(await new Promise((resolve, reject) => {
		events.onmessage = e => { resolve(e.data); events.close() }
		events.onerror = () => reject('EventSource failed')
	}))
	return found.join(' ')
}
main().catch(e => 'failed: ' + e).then(found => fetch('/found?' + encodeURIComponent(found)))
</script>`

// Goal: Chromium uses HTTP/2 for a page and what it loads, a WebSocket beside it, and gets events
// as they come.
func TestChromium(t *testing.T) {
	t.Parallel()
	chromium := hostdirtest.Need(t, "chromium")
	chat, _ := webSocket(t)
	s := newSite(t)
	s.install(t, "one.example", "one.example")
	found := make(chan string, 1)
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	s.serve(t, "one.example", handler(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			io.WriteString(w, page)
		case "/big":
			w.Write(make([]byte, 3<<20))
		case "/protocol":
			w.Header().Set("X-Protocol", r.Proto)
		case "/echo":
			io.Copy(w, r.Body)
		case "/chat":
			httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: chat}).ServeHTTP(w, r)
		case "/events":
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, "data: an event\n\n")
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-done:
			}
		case "/found":
			text, _ := url.QueryUnescape(r.URL.RawQuery)
			found <- text
		}
	}))
	text, err := os.ReadFile(filepath.Join(s.dir(t, "one.example"), certFile))
	hostdirtest.Must(t, err)
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	hostdirtest.Must(t, err)
	pin := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	launch(t, exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+hostdirtest.Dir(t), "--ignore-certificate-errors-spki-list="+base64.StdEncoding.EncodeToString(pin[:]),
		"--host-resolver-rules=MAP one.example:443 "+s.addr, "--remote-debugging-port=0", "https://one.example/"))
	select {
	case got := <-found:
		if want := "3145728 HTTP/1.1 true h2 a message an event"; got != want {
			t.Errorf("Chromium found %q, want %q", got, want)
		}
	case <-time.After(2 * hostdirtest.Patience):
		t.Error("Chromium does not come to an end")
	}
}
