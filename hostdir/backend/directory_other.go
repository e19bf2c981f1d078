//go:build !linux

package backend

import "golang.org/x/sys/unix"

const openPath = unix.O_RDONLY

// inThread is a way on Linux only.
func (d *directory) inThread(string, func(path string) error) (bool, error) { return false, nil }
