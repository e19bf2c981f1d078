//go:build !linux

package shares

// underWay tells whether a datagram that was sent with a socket was not received yet. Other systems
// put it into the receiver's queue at once, and do not charge the sender.
func underWay(int) bool { return false }
