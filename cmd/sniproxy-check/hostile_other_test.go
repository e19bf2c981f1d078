//go:build !linux

package main

// forbidUnshare does nothing: there is no unshare(2).
func forbidUnshare() {}
