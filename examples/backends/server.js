// The host one.example, served by Node.js: node server.js
//
// Change the path of the socket, the certificate and its key, and what the server answers.
//
// The server makes its socket with mode 0666, so let nobody but sniproxy in:
//
//     install -d -m 0710 -o alice -g sniproxy /srv/sniproxy/one.example
//
// and run the server as alice. Node.js does not read PROXY headers, so make no marker send-proxy-v1
// or send-proxy-v2. If the application must know its clients' addresses, put nginx, HAProxy or Caddy
// between the two, as in the other files of this directory. Node.js cannot be handed its connections
// as in handed/server.py, since it has no datagram Unix sockets.

'use strict';
const fs = require('node:fs');
const https = require('node:https');

const socket = '/srv/sniproxy/one.example/tls-socket';

// A socket that an earlier run has left is in the way.
fs.rmSync(socket, { force: true });

https.createServer({
  cert: fs.readFileSync('/etc/ssl/one.example.crt'),
  key: fs.readFileSync('/etc/ssl/private/one.example.key'),
}, (request, response) => {
  response.end(`This is ${request.headers.host}.\n`);
}).listen({ path: socket, readableAll: true, writableAll: true });
