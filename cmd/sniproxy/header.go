package main

import (
	"golang.org/x/sys/unix"

	"sniproxy/proxyproto"
)

// proxyHeader returns the header of a version of the PROXY protocol for the client with the
// socket fd, who named a host or not.
func proxyHeader(fd int, version uint8, name []byte) ([]byte, error) {
	remote, err := unix.Getpeername(fd)
	if err != nil {
		return nil, err
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		return nil, err
	}
	header := make([]byte, 0, proxyproto.MaxV2)
	if version == 1 {
		return proxyproto.AppendV1(header, addrPort(remote), addrPort(local)), nil
	}
	return proxyproto.AppendV2(header, addrPort(remote), addrPort(local), name), nil
}
