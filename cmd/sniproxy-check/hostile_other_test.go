//go:build !linux

package main

// forbidUnshare does nothing, as there is nothing that it could forbid.
func forbidUnshare() {}
