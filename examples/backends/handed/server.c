// The host one.example, served by a C program with OpenSSL, which is handed its connections:
//
//     cc -o server server.c -lssl -lcrypto -pthread
//     ./server
//
// Change the path of the socket, the certificate and its key, and what the server answers. server.py
// is the same in Python.
//
// The socket is a datagram socket. So sniproxy sends the client's connection itself to it, together
// with the bytes that it has read, the beginning of the ClientHello. Then the proxy is out of the way.
// BIO_set_buffer_read_data gives OpenSSL those bytes before it reads the connection.
//
// The socket has mode 0666, so let nobody but sniproxy in:
//
//     mkdir -m 0710 /srv/sniproxy/one.example && chown alice:sniproxy /srv/sniproxy/one.example
//
// and run the server as alice. The address of the connection is the client's, so make no marker
// send-proxy-v1 or send-proxy-v2.

#define _GNU_SOURCE // MSG_CMSG_CLOEXEC
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET "/srv/sniproxy/one.example/tls-socket"
#define CERTIFICATE "/etc/ssl/one.example.crt"
#define KEY "/etc/ssl/private/one.example.key"
#define SILENCE 60 // seconds for which a client may be silent

#ifndef MSG_CMSG_CLOEXEC // macOS
#define MSG_CMSG_CLOEXEC 0
#endif

static SSL_CTX *context;

struct client {
	int connection;
	size_t length;
	char first[]; // the bytes that sniproxy has read
};

static void fail(const char *what) {
	perror(what);
	exit(1);
}

// answer reads a request and sends a page.
static void answer(SSL *tls, int connection) {
	char request[8192], name[NI_MAXHOST], page[sizeof name + 100], head[100];
	size_t length = 0;
	do {
		int n = SSL_read(tls, request + length, sizeof request - 1 - length);
		if (n <= 0)
			return;
		length += n;
		request[length] = 0;
	} while (!strstr(request, "\r\n\r\n") && length < sizeof request - 1);

	struct sockaddr_storage address;
	socklen_t size = sizeof address;
	if (getpeername(connection, (struct sockaddr *)&address, &size) < 0 ||
	    getnameinfo((struct sockaddr *)&address, size, name, sizeof name, NULL, 0, NI_NUMERICHOST))
		return;
	snprintf(page, sizeof page, "This is one.example for %s.\n", name);
	snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n", strlen(page));
	if (SSL_write(tls, head, strlen(head)) > 0 && SSL_write(tls, page, strlen(page)) > 0)
		SSL_shutdown(tls);
}

static void *serve(void *argument) {
	struct client *client = argument;
	int connection = client->connection;
	struct timeval silence = {.tv_sec = SILENCE};
	setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
	setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &silence, sizeof silence);

	SSL *tls = SSL_new(context);
	BIO *first = BIO_new(BIO_f_buffer());
	BIO *in = BIO_new_socket(connection, BIO_NOCLOSE), *out = BIO_new_socket(connection, BIO_NOCLOSE);
	if (!tls || !first || !in || !out || BIO_set_buffer_read_data(first, client->first, client->length) <= 0)
		abort(); // there is no memory
	SSL_set_bio(tls, BIO_push(first, in), out);
	if (SSL_accept(tls) == 1)
		answer(tls, connection);
	SSL_free(tls); // with the BIOs
	close(connection);
	free(client);
	return NULL;
}

// listen_here makes the socket under another name, so that it replaces that of an earlier run in one
// step.
static int listen_here(void) {
	struct sockaddr_un new = {.sun_family = AF_UNIX, .sun_path = SOCKET ".new"};
	int listener = socket(AF_UNIX, SOCK_DGRAM, 0);
	unlink(new.sun_path);
	if (listener < 0 || bind(listener, (struct sockaddr *)&new, sizeof new) < 0 ||
	    chmod(new.sun_path, 0666) < 0 || rename(new.sun_path, SOCKET) < 0)
		fail(SOCKET);
	return listener;
}

// receive returns a client. It closes what is not one TCP connection, and returns NULL.
static struct client *receive(int listener) {
	static char data[1 << 17]; // for 64 KiB and, if there is a marker, a header
	static union {
		char bytes[CMSG_SPACE(253 * sizeof(int))]; // no message has more descriptors
		struct cmsghdr align;
	} control;
	struct iovec vector = {data, sizeof data};
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1,
		.msg_control = control.bytes, .msg_controllen = sizeof control.bytes,
	};
	ssize_t length = recvmsg(listener, &message, MSG_CMSG_CLOEXEC);
	if (length < 0)
		return NULL;

	int descriptors[253], count = 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		int n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(descriptors + count, CMSG_DATA(c), n * sizeof(int));
		count += n;
	}
	int option;
	struct sockaddr_storage address;
	socklen_t option_size = sizeof option, size = sizeof address;
	struct client *client = NULL;
	if (count == 1 && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
	    getsockopt(descriptors[0], IPPROTO_TCP, TCP_NODELAY, &option, &option_size) == 0 && // it is TCP
	    getpeername(descriptors[0], (struct sockaddr *)&address, &size) == 0 &&             // and connected
	    (client = malloc(sizeof *client + length))) {
		client->connection = descriptors[0];
		client->length = length;
		memcpy(client->first, data, length);
		return client;
	}
	for (int i = 0; i < count; i++)
		close(descriptors[i]);
	return NULL;
}

static void stop(int signal) {
	(void)signal;
	_exit(0);
}

int main(void) {
	signal(SIGPIPE, SIG_IGN);
	signal(SIGTERM, stop); // as PID 1 of a container it would ignore the signal
	context = SSL_CTX_new(TLS_server_method());
	if (!context || SSL_CTX_use_certificate_chain_file(context, CERTIFICATE) != 1 ||
	    SSL_CTX_use_PrivateKey_file(context, KEY, SSL_FILETYPE_PEM) != 1) {
		fprintf(stderr, "the certificate or its key is no good\n");
		return 1;
	}
	int listener = listen_here();
	for (;;) {
		struct client *client = receive(listener);
		pthread_t thread;
		if (!client)
			continue;
		if (pthread_create(&thread, NULL, serve, client) == 0) {
			pthread_detach(thread);
		} else {
			close(client->connection);
			free(client);
		}
	}
}
