// Package ech opens Encrypted Client Hellos in split mode (RFC 9849): the server name is encrypted
// to a proxy, which finds the host by it, and TLS ends in the host's backend. The package does no
// I/O.
//
// A [Key] is what a hello is encrypted to. It comes from a file, and clients learn its public half
// from the DNS. With keys a proxy waits for the end of the hello ([Scanner]) and opens it ([Open]).
// One that cannot be opened is for the host of the outer name: its bytes pass unchanged. For the
// other the backend gets the inner hello in its place, and a [Session] goes on from there.
//
// # HelloRetryRequest
//
// A backend may answer a hello with a HelloRetryRequest. Then the client sends a second hello,
// which has to be opened with the key that the first one has agreed on. So until the backend's
// answer has begun, a Session looks at the bytes of both: it lets records of the client pass, but
// holds back what may be a second hello. All else passes unchanged, both ways. Once the answer is
// known to be another one, or the second hello is opened, the Session is over, and all bytes pass.
//
// What a Session holds is bounded by [sni.MaxHello], and it opens each hello once. An inner hello
// is shorter than the outer one.
package ech
