# The host one.example, served by Python 3.9 or later, which is handed its connections:
# python3 server.py
#
# Change the path of the socket, the certificate and its key, and what the server answers. server.c
# is the same in C.
#
# The socket is a datagram socket. So sniproxy sends the client's connection itself to it, together
# with the bytes that it has read, the beginning of the ClientHello. Then the proxy is out of the way.
# Python's TLS cannot be given such bytes together with a socket, so class TLS reads and writes the
# socket, and has package ssl work in memory.
#
# The socket has mode 0666, so let nobody but sniproxy in:
#
#     mkdir -m 0710 /srv/sniproxy/one.example && chown alice:sniproxy /srv/sniproxy/one.example
#
# and run the server as alice. The address of the connection is the client's, so make no marker
# send-proxy-v1 or send-proxy-v2.

import contextlib
import io
import os
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler

SOCKET = '/srv/sniproxy/one.example/tls-socket'
CERTIFICATE = '/etc/ssl/one.example.crt'
KEY = '/etc/ssl/private/one.example.key'
SILENCE = 60  # seconds for which a client may be silent

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(CERTIFICATE, KEY)


class Site(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        page = f"This is {self.headers['Host']} for {self.client_address[0]}.\n".encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


class TLS(io.RawIOBase):
    """TLS over a connection whose first bytes were read already."""

    def __init__(self, connection, first):
        self.connection = connection
        self.received, self.to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.received.write(first)
        self.tls = context.wrap_bio(self.received, self.to_send, server_side=True)
        self.do(self.tls.do_handshake)

    def do(self, method, *arguments):
        """Calls a method of the TLS object, as often as it wants to read more, and sends what it says."""
        while True:
            try:
                return method(*arguments)
            except ssl.SSLWantReadError:
                pass
            finally:
                if self.to_send.pending:
                    self.connection.sendall(self.to_send.read())
            data = self.connection.recv(1 << 16)
            if data:
                self.received.write(data)
            else:
                self.received.write_eof()

    # What http.server wants of a socket.

    def makefile(self, *arguments):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.do(self.tls.read, len(buffer))
        buffer[:len(data)] = data
        return len(data)

    def sendall(self, data):
        data = memoryview(data)
        while data:
            data = data[self.do(self.tls.write, data):]


def serve(connection, first):
    connection.settimeout(SILENCE)
    with connection, contextlib.suppress(OSError):  # which are the client's faults
        Site(TLS(connection, first), connection.getpeername(), None)


def listen():
    """Makes the socket under another name, so that it replaces that of an earlier run in one step."""
    new = SOCKET + '.new'
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(new)
    os.chmod(new, 0o666)
    os.rename(new, SOCKET)
    return listener


def connection_in(descriptors):
    """Returns the TCP connection if there is just that, and closes anything else."""
    sockets = []
    for descriptor in descriptors:
        try:
            sockets.append(socket.socket(fileno=descriptor))
        except OSError:  # it is something else
            os.close(descriptor)
    if len(descriptors) == len(sockets) == 1:
        with contextlib.suppress(OSError):  # it is of another kind, or not connected
            sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sockets[0].getpeername()
            return sockets[0]
    for other in sockets:
        other.close()


listener = listen()
while True:
    # At most 64 KiB and, if there is a marker, a header; and at most 253 descriptors.
    first, descriptors, flags, _ = socket.recv_fds(listener, 1 << 17, 253)
    connection = connection_in(descriptors)
    if connection:
        threading.Thread(target=serve, args=(connection, first), daemon=True).start()
