//go:build portable || !linux

package main

// The path of the socket, with the host's name in it, has to fit into a socket address.
const anyName = false
