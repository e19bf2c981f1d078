package hostdir

import (
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// nobody is the overflow uid unless somebody has changed it, and is never the administrator even then.
const nobody = 65534

// Hosts is the hosts directory: the working directory of the process. It is opened once, at the
// start, and shared by all dialers: no look-up needs a descriptor for it. Its methods, except Close,
// may be called from any goroutine.
type Hosts struct {
	place            // the directory, as the system wants it
	overflow  uint32 // the overflow uid
	paths     error  // why dialers work with paths
	refuses   bool   // the system has SO_PASSRIGHTS
	lastOwner atomic.Uint32
}

// Open opens the hosts directory, and finds out what the system can do for dialers.
func Open() (*Hosts, error) {
	h := &Hosts{overflow: nobody}
	if err := h.open(); err != nil {
		return nil, err
	}
	if _, err := h.owner(); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Close closes the directory. No dialer may be used after it.
func (h *Hosts) Close() { h.close() }

// PathsOnly returns why dialers work with paths, nil if they need not. Then the length of names is limited by the
// address of a socket, and each look-up may wait. On Linux it is the error of unshare(2), which
// container engines forbid.
func (h *Hosts) PathsOnly() error { return h.paths }

// RefusesDescriptors tells whether the system refuses the descriptors that backends pass
// (SCM_RIGHTS) over connections that a Dialer has made.
func (h *Hosts) RefusesDescriptors() bool { return h.refuses }

// Unmapped tells whether the hosts directory belongs to the overflow uid, as which a user namespace
// shows all users that it does not know. Then only entries of root's can speak for others.
func (h *Hosts) Unmapped() bool {
	owner, err := h.owner()
	return err == nil && h.Overflow(owner)
}

// Remarks says what is unusual about the hosts directory, or the system.
func (h *Hosts) Remarks() (lines []string) {
	if h.paths != nil && runtime.GOOS == "linux" {
		lines = append(lines, fmt.Sprintf("the system forbids unshare(2) (%v), as container engines do: so hosts are looked up by path, away from the event loops, and a name that is too long for a socket address (sun_path) needs hashed names", h.paths))
	}
	if owner, err := h.owner(); err == nil && h.Overflow(owner) {
		lines = append(lines, fmt.Sprintf("the hosts directory belongs to uid %d, which in a user namespace stands for all users unknown to it: no wildcard, no directory * and no log-connections counts unless it is root's; map the owner of the hosts directory", owner))
	}
	return lines
}

// Administrator tells whether a user is root or the owner of the hosts directory, which is asked for
// anew each time. The overflow uid never is.
func (h *Hosts) Administrator(uid uint32) bool {
	if uid == 0 || h.Overflow(uid) {
		return !h.Overflow(uid)
	}
	owner, err := h.owner()
	return err == nil && uid == owner
}

// seems is like Administrator, but goes by the owner that the hosts directory had when it was last
// asked for. It decides nothing that a tenant must not.
func (h *Hosts) seems(uid uint32) bool {
	return !h.Overflow(uid) && (uid == 0 || uid == h.lastOwner.Load())
}

// Overflow tells whether a user is the overflow uid, as which a user namespace shows all users that it does not know.
func (h *Hosts) Overflow(uid uint32) bool { return uid == nobody || uid == h.overflow }

// owner returns the owner of the hosts directory.
func (h *Hosts) owner() (uint32, error) {
	uid, err := h.ask()
	if err == nil {
		h.lastOwner.Store(uid)
	}
	return uid, err
}

// LogAll tells whether the connections of all hosts are logged: whether there is a log-connections
// in the directory *, and both are the administrator's. An error means that it could not be found
// out. It may wait for a file system.
func (h *Hosts) LogAll() (bool, error) {
	if _, err := h.owner(); err != nil { // for those, too, that go by the last answer
		return false, err
	}
	var buf [MaxName + len("/log-connections\x00")]byte
	star := AppendName(buf[:0], []byte{'*'})
	if is, err := h.administrators(append(star, 0)); !is {
		return false, err
	}
	return h.administrators(append(star, "/log-connections\x00"...))
}

// administrators tells whether there is something at a path in the hosts directory, and it is the
// administrator's.
func (h *Hosts) administrators(path []byte) (bool, error) {
	st, err := h.lstat(path, true)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return false, nil
	}
	return err == nil && h.Administrator(st.owner), err
}

// A status is what is known of an entry of the hosts directory by looking at it alone.
type status struct {
	owner  uint32
	kind   uint32 // S_IFDIR and the like
	unsure bool   // a file system is mounted on it that may lie about the owner, who is not given
}

// Find tells which entry serves a name, which may also be a wildcard, by looking at the entries alone: it
// follows nothing, and so it waits for nothing but the file system of the hosts directory. Passed over
// are the wildcards that do not count. The error is of type [*Error].
func (h *Hosts) Find(name []byte) (e Entry, passedOver []string, err error) {
	h.owner()
	var t trial
	for err = errAbsent; t.next(err); {
		entry := t.entry(nil, name)
		if entry == nil {
			continue
		}
		e, err = h.find(append(entry, 0), t.general(), false)
		if err == errIgnored || err == errOdd {
			passedOver = append(passedOver, string(entry))
		}
	}
	if isNone(err) {
		e = Entry{}
	}
	return e, passedOver, t.outcome(err)
}

// find looks at an entry, whose name ends in a zero.
func (h *Hosts) find(entry []byte, general, wait bool) (Entry, error) {
	st, err := h.lstat(entry, wait)
	if err == unix.ENOENT {
		return Entry{}, errAbsent
	}
	e := Entry{Name: entry[:len(entry)-1], Owner: nobody, Foreign: true}
	if err != nil {
		return e, lookError(err)
	}
	e.Owner = st.owner
	if err := h.counts(st, general); err != nil {
		return e, err
	}
	e.Administrators = h.seems(st.owner)
	e.Foreign = st.kind != unix.S_IFDIR || !e.Administrators
	return e, nil
}

// counts tells whether an entry counts: nil, errIgnored, errOdd, or NoDirectory for what is none.
func (h *Hosts) counts(st status, general bool) error {
	switch {
	case general && st.kind != unix.S_IFDIR && st.kind != unix.S_IFLNK:
		return errOdd
	case general && !st.unsure && !h.Administrator(st.owner): // that takes time to find out
		return errIgnored
	case st.kind != unix.S_IFDIR && st.kind != unix.S_IFLNK:
		return &Error{Problem: NoDirectory, Errno: unix.ENOTDIR}
	}
	return nil
}
