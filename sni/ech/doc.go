// Package ech opens Encrypted Client Hellos in split mode (RFC 9849): the server name is encrypted
// to a proxy, which finds the host by it, and TLS ends in the host's backend.
//
// A [Key] is what the hello was encrypted to. It comes from a file, and clients learn its public
// half from the DNS.
package ech
