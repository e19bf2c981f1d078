//go:build portable || !linux

package main

import (
	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// dial looks a host up as the portable engine does, which cannot tell beforehand what takes time.
func dial(h host) (marks hostdir.Marks, slow bool, err error) {
	if h.name == nil {
		marks, err = redial(hostdir.DialEntry, h.entry)
	} else {
		marks, err = redial(dialOnce, h.name)
	}
	return marks, false, err
}

// dialOnce is [hostdir.Dial], but does not go on for as long as the directory is exchanged again and again.
func dialOnce(name []byte) (fd int, marks hostdir.Marks, err error) {
	fd, err = hostdir.Socket()
	if err != nil {
		return -1, hostdir.Marks{}, err
	}
	marks, err = hostdir.Connect(fd, name)
	if err != nil {
		unix.Close(fd)
		return -1, hostdir.Marks{}, err
	}
	return fd, marks, nil
}
