//go:build !linux

package hostdir_test

// forbid does nothing, as there is nothing that it could forbid.
func forbid(string) {}
