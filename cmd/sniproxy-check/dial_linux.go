//go:build !portable

package main

import "sniproxy/hostdir"

// dial looks a host up as the engine for Linux does, and tells whether that has a thread that has the time do it. It is
// for a thread that does nothing else afterwards.
func dial(h host) (marks hostdir.Marks, slow bool, err error) {
	d := hostdir.NewDialer()
	defer d.Close()
	defer d.Leave()
	now, later, what := d.DialNow, d.Dial, h.name
	if h.name == nil {
		now, later, what = d.DialEntryNow, d.DialEntry, h.entry
	}
	marks, err = redial(now, what)
	if isProblem(err, hostdir.MayWait) {
		slow = true
		marks, err = redial(later, what)
	}
	return marks, slow, err
}
