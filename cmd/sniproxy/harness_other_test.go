//go:build !linux

package main

import "time"

// The path of the socket, with the host's name in it, has to fit into a socket address.
const anyName = false

// While a symlink is switched more often than the clock of the file system ticks, the host is not
// connected to.
const switchPause = 40 * time.Millisecond
