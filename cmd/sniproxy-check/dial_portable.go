//go:build portable || !linux

package main

import "sniproxy/hostdir"

// dial looks a host up as the portable engine does, which cannot tell beforehand what takes time.
func dial(h host) (marks hostdir.Marks, slow bool, err error) {
	if h.name == nil {
		marks, err = redial(hostdir.DialEntry, h.entry)
	} else {
		marks, err = redial(hostdir.Dial, h.name)
	}
	return marks, false, err
}
