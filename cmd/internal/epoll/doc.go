// Package epoll is the engine for Linux: event loops, one for each processor, and no goroutine, lock,
// timer or buffer for each connection.
//
// Read it in the order of a connection's life:
//
//	engine.go    start and stop
//	loop.go      the loop: wait for events, deal with them, do what is due
//	conn.go      a connection and its phases: accept, ClientHello, refusal, end
//	lookup.go    from the name to the backend
//	relay.go     bytes both ways
//
// Beside these, each alone: poller.go waits, inbox.go has what others give a loop, load.go measures
// how busy it is and handover.go gives relays to the next loop. watch.go frees a loop from a look-up
// that hangs, redial.go has those who wait for a backlog, room.go ends connections to make room for others, and
// limits.go says how much of everything. README.md has what this costs, and what it survives.
package epoll
