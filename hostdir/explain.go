package hostdir

import (
	"time"

	"golang.org/x/sys/unix"
)

// What is here is for programs that tell people about the hosts directory.

// Deciding tells which entry of the hosts directory decides about clients of the host with the
// canonical name; it is "" if there is none. Ignored are the wildcards that were passed over, since
// they are not the administrator's.
//
// Here, and for [Dial] and [Connect], name may also be a wildcard. Then it stands for those that
// this is meant for, and that have no entry of their own.
func Deciding(name []byte) (entry string, ignored []string) {
	var buf [MaxName]byte
	var t trial
	for err := errAbsent; t.next(err); {
		e := t.entry(buf[:0], name)
		if e == nil {
			continue
		}
		before := identify(string(e))
		switch {
		case before.absent:
			err = errAbsent
		case t.general() && !administrators(before.owner):
			err = errIgnored
			ignored = append(ignored, string(e))
		default:
			return string(e), ignored
		}
	}
	return "", ignored
}

// DialEntry is like [Dial], but for the entry itself that a host has in the hosts directory. It is
// for hashed builds, in which nobody can tell the name.
func DialEntry(entry []byte) (fd int, marks Marks, err error) {
	for {
		fd, err = Socket()
		if err != nil {
			return -1, Marks{}, err
		}
		marks, err = connectTo(fd, string(entry), false)
		if err == nil {
			return fd, marks, nil
		}
		unix.Close(fd)
		if err.(*Error).Problem != Exchanged {
			return -1, Marks{}, new(trial).outcome(err)
		}
		time.Sleep(time.Millisecond)
	}
}
