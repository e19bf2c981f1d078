//go:build !linux

package main

import "syscall"

// dieWithUs has no counterpart outside Linux: a daemon that outlives us waits for a SIGHUP.
func dieWithUs(*syscall.SysProcAttr) {}
