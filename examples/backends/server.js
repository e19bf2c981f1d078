// The host one.example, served by Node.js 18 or later: node server.js
//
// Change the path of the socket, the certificate and its key, and what the server answers.
//
// The server makes its socket with mode 0666, so let nobody but sniproxy in:
//
//     mkdir -m 0710 /srv/sniproxy/one.example && chown alice:sniproxy /srv/sniproxy/one.example
//
// and run the server as alice. Under one.example.socket systemd makes the socket, and the server takes
// that.
//
// Node.js does not read PROXY headers, so make no marker send-proxy-v1 or send-proxy-v2. If the
// application must know its clients' addresses, put nginx, HAProxy or Caddy between the two, as in
// the other files of this directory. Node.js cannot be handed its connections as in
// handed/server.py, since it has no datagram Unix sockets.

'use strict';
const fs = require('node:fs');
const https = require('node:https');

const socket = '/srv/sniproxy/one.example/tls-socket';

const server = https.createServer({
  cert: fs.readFileSync('/etc/ssl/one.example.crt'),
  key: fs.readFileSync('/etc/ssl/private/one.example.key'),
}, (request, response) => {
  response.end(`This is ${request.headers.host}.\n`);
});

if (process.env.LISTEN_PID === String(process.pid)) {
  server.listen({ fd: 3 });
} else {
  // The socket is made under another name, and then replaces that of an earlier run in one step: one
  // that a crash has left, or one that still serves. A server removes only the name that it has
  // made, when it ends, and so never the socket of its successor. Without writableAll the mode would
  // be 0755.
  const made = socket + '.new';
  fs.rmSync(made, { force: true });
  server.listen({ path: made, backlog: 4096, readableAll: true, writableAll: true }, () => {
    fs.renameSync(made, socket);
  });
}

// Let open requests end.
process.on('SIGTERM', () => {
  server.close(() => process.exit());
  server.closeIdleConnections();
});
