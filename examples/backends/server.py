# The host one.example, served by Python 3.9 or later: python3 server.py
#
# Change the path of the socket, the certificate and its key, and what the server answers.
#
# The server makes its socket with mode 0666, so let nobody but sniproxy in:
#
#     mkdir -m 0710 /srv/sniproxy/one.example && chown alice:sniproxy /srv/sniproxy/one.example
#
# and run the server as alice. Under one.example.socket systemd makes the socket, and the server takes
# that. The server reads no PROXY headers, so make no marker send-proxy-v1 or send-proxy-v2. One that
# knows its clients' addresses is handed/server.py.

import contextlib
import os
import resource
import signal
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer

SOCKET = '/srv/sniproxy/one.example/tls-socket'
CERTIFICATE = '/etc/ssl/one.example.crt'
KEY = '/etc/ssl/private/one.example.key'
SILENCE = 10  # seconds for which a client may be silent; the stop waits for it as well


class Site(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = SILENCE

    def do_GET(self):
        page = f"This is {self.headers['Host']}.\n".encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


class Server(ThreadingMixIn, UnixStreamServer):
    request_queue_size = 4096  # by default five clients may wait
    daemon_threads = False  # the stop waits for open requests

    def __init__(self):
        super().__init__(SOCKET, Site, bind_and_activate=False)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(CERTIFICATE, KEY)
        if os.environ.get('LISTEN_PID') == str(os.getpid()):
            self.socket = socket.socket(fileno=3)
        else:
            self.listen()

    def listen(self):
        """Makes the socket under another name, so that it replaces that of an earlier run in one step."""
        new = SOCKET + '.new'
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        self.socket.bind(new)
        os.chmod(new, 0o666)
        self.socket.listen(self.request_queue_size)
        os.rename(new, SOCKET)

    def process_request_thread(self, request, client_address):
        # The handshake is made here, in the client's own thread: a client that sends nothing delays
        # nobody else.
        request.settimeout(SILENCE)
        with contextlib.suppress(OSError):  # which are the client's faults
            request = self.tls.wrap_socket(request, server_side=True)
            self.finish_request(request, ('', 0))
        self.shutdown_request(request)


# systemd and shells set a soft limit of 1,024 descriptors, and Python leaves that as it is.
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

server = Server()
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()  # waits for the threads
