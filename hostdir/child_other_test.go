//go:build !linux

package hostdir_test

// forbid does nothing: what it forbids exists only on Linux.
func forbid(string) {}
