package hostdir

// DialEntry is like the function [DialEntry].
func (d *Dialer) DialEntry(entry []byte) (fd int, marks Marks, err error) {
	return d.dialOne(entry, false)
}

// DialEntryNow is to DialEntry what DialNow is to Dial.
func (d *Dialer) DialEntryNow(entry []byte) (fd int, marks Marks, err error) {
	return d.dialOne(entry, d.cached)
}

func (d *Dialer) dialOne(entry []byte, now bool) (fd int, marks Marks, err error) {
	if !d.own {
		return DialEntry(entry)
	}
	fd, marks, err = d.dialEntry(append(entry[:len(entry):len(entry)], 0), false, now)
	return fd, marks, new(trial).outcome(err)
}
