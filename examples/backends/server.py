# The host one.example, served by Python 3.10 or later: python3 server.py
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
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer

SOCKET = '/srv/sniproxy/one.example/tls-socket'
CERTIFICATE = '/etc/ssl/one.example.crt'
KEY = '/etc/ssl/private/one.example.key'
SILENCE = 10  # seconds for which a client may be silent
STOP = 25  # seconds that open requests have at the stop; systemd must wait for longer


class Site(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = SILENCE

    def do_GET(self):
        page = f"This is {self.headers['Host']}.\n".encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def handle(self):
        self.close_connection = True
        self.handle_one_request()
        while not self.close_connection:
            self.server.idle.add(self.connection)  # until parse_request
            if self.server.stopping:
                break
            self.handle_one_request()

    def parse_request(self):
        self.server.idle.discard(self.connection)
        return super().parse_request()

    def finish(self):
        self.server.idle.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass


class Server(ThreadingMixIn, UnixStreamServer):
    request_queue_size = 4096  # by default five clients may wait
    daemon_threads = False  # the stop waits for open requests

    def __init__(self):
        super().__init__(SOCKET, Site, bind_and_activate=False)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(CERTIFICATE, KEY)
        self.tls.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # otherwise an end is answered by an alert
        self.stopping = False
        self.idle = set()  # connections that wait for another request
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

    def stop(self):
        """Lets open requests end, and closes connections on which there is none."""
        self.stopping = True
        for connection in list(self.idle):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                socket.socket.shutdown(connection, socket.SHUT_RD)  # beneath TLS
        self.shutdown()

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

# The signal wakes a thread. A handler would run within whatever the main thread is doing, and must not
# start a thread there: that needs locks which the main thread may hold.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def stop():
    signal.sigwait([signal.SIGTERM])
    server.stop()
    time.sleep(STOP)
    os._exit(0)  # a client may send its request byte by byte


server = Server()
threading.Thread(target=stop, daemon=True).start()
server.serve_forever()
server.server_close()  # waits for the threads
