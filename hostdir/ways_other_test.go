//go:build !linux

package hostdir_test

// gettid returns no thread: there is no need to know it.
func gettid() int { return -1 }
