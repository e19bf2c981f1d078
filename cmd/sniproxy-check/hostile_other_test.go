//go:build !linux

package main

// forbidUnshare does nothing: there is no unshare(2).
func forbidUnshare() {}

// forbidPassRights does nothing: no other system has SO_PASSRIGHTS.
func forbidPassRights() {}

// printAccess is for tests on Linux only.
func printAccess([]string) {}
