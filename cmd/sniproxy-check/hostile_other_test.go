//go:build !linux

package main

// forbidUnshare does nothing: there is no unshare(2).
func forbidUnshare() {}

// printAccess is for tests on Linux only.
func printAccess([]string) {}
