//go:build !linux

package shares

// roomForThreads tells whether the system lets this user have some threads more, which only Linux
// can be asked.
func roomForThreads() bool { return true }
