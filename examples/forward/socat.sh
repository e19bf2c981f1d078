#!/bin/sh -e
# Forwards the host two.example to a TLS server on a TCP address, without systemd: for a shell, a run
# script of s6 or runit, or a tenant. Change:
# - the path, to the directory of the host;
# - 192.0.2.7:443, to the address of the server.
#
# Whoever runs it needs a directory that lets only sniproxy in:
#
#     mkdir -m 0710 /srv/sniproxy/two.example && chown alice:sniproxy /srv/sniproxy/two.example
#
# What the options are for:
# -t 3600        when one side has ended, the other may go on; by default only for half a second, in
#                which a client that ends its side and waits for the answer gets none
# fork           a process for each connection; at most 1,000 (max-children)
# backlog        how many clients may wait, 5 by default
# unlink-early   the socket that a crash or a power loss has left is no obstacle
# unlink-close=0 an old process that ends does not remove the socket of its successor
# mode=666       sniproxy may connect, whatever the umask
cd /srv/sniproxy/two.example
exec socat -t 3600 \
	UNIX-LISTEN:tls-socket,fork,max-children=1000,backlog=4096,unlink-early,unlink-close=0,mode=666 \
	TCP:192.0.2.7:443,keepalive,nodelay
