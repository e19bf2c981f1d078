//go:build !linux

package shares

// roomForThreads tells whether the system lets this user have some threads more, which only Linux
// can be asked.
func roomForThreads() bool { return true }

// underWay tells whether a datagram that was sent with a socket was not received yet. Other systems
// put it into the receiver's queue at once, and do not charge the sender.
func underWay(int) bool { return false }
