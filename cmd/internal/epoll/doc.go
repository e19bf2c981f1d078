// Package epoll is the engine for Linux: event loops, one for each processor, and no goroutine,
// lock, timer or buffer for each connection.
//
// Read it in the order of a connection's life:
//
//	engine.go    start and stop
//	loop.go      the loop: wait for events, deal with them, do what is due
//	conn.go      a connection and its phases: accept, ClientHello, refusal, end
//	lookup.go    from the name to the backend
//	relay.go     bytes both ways
//
// A client's hello may be encrypted (package ech). Then its connection has a session until no
// second hello can come any more. Meanwhile the client's bytes go through the session. While the
// client is to send a second hello, the connection is in a queue of its loop, and stays there.
//
// Beside these, each alone: poller.go waits, table.go has the connections by number, inbox.go has
// what others give a loop, and share.go measures how busy it is and gives work to the next one.
// watch.go frees a loop from a look-up that hangs. room.go has those who wait for room, and ends
// connections to make some. limits.go says how much of everything, syscall.go has the raw calls.
// README.md has what this costs, and what it survives.
//
// Some words: a runner is the goroutine, with a thread of its own, that runs a loop; a standby is
// ready to take its place. A flow is one direction of a relay, and takes a turn when there is more
// to move than may be moved at once. A tenant is the owner of a host, see package shares.
//
// How a connection ends, and what its client sees:
//
//	refuse    an alert and the end: there is no relay for it
//	finish    the end of one direction, passed on
//	end       the end, when both directions have ended
//	abort     a reset: something failed, and what the client has is not all there is
//	linger    the end, and what it still sends is read for a while, so that no reset overtakes it
//	close     whatever the kernel makes of close(2): the last step of all of them
package epoll
