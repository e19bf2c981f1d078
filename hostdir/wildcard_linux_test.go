package hostdir_test

import (
	"testing"

	"sniproxy/hostdir"
)

// dialers returns the ways to connect with a Dialer.
func dialers(*testing.T) []dialling {
	way := func(what string, dial func(d *hostdir.Dialer, name []byte) (int, hostdir.Marks, error)) dialling {
		return dialling{what, func(name string) (fd int, marks hostdir.Marks, err error) {
			withDialer(func(d *hostdir.Dialer) { fd, marks, err = dial(d, []byte(name)) })
			return fd, marks, err
		}}
	}
	now := func(d *hostdir.Dialer, name []byte) (int, hostdir.Marks, error) {
		fd, marks, err := d.DialNow(name)
		if problem(err) == hostdir.MayWait { // as of a symlink that is followed for the first time
			return d.Dial(name)
		}
		return fd, marks, err
	}
	return []dialling{way("Dialer.Dial", (*hostdir.Dialer).Dial), way("Dialer.DialNow", now)}
}
