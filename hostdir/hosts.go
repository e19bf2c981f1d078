package hostdir

import (
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// nobody is the usual overflow uid. It is never the administrator, even where that was changed.
const nobody = 65534

// Hosts is the hosts directory: the working directory of the process. A program opens it once, at
// the start; all dialers share it, so that no look-up needs a descriptor for it. Its methods,
// except Close, may be called from any goroutine.
type Hosts struct {
	directory        // as the system opens it
	overflow  uint32 // the overflow uid
	paths     error  // why dialers work with paths, nil if they need not; on Linux from unshare(2)
	refuses   bool   // the kernel has SO_PASSRIGHTS
	lastOwner atomic.Uint32
	shared    atomic.Bool // others than the owner may change the directory; known on Linux
}

// Open opens the hosts directory and finds out what the system offers.
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

// RefusesDescriptors reports whether the kernel refuses descriptors that backends pass (SCM_RIGHTS)
// over connections of a Dialer.
func (h *Hosts) RefusesDescriptors() bool { return h.refuses }

// Remarks says what is unusual about the hosts directory or the system.
func (h *Hosts) Remarks() (lines []string) {
	if h.paths != nil && runtime.GOOS == "linux" {
		lines = append(lines, fmt.Sprintf("the system forbids unshare(2) (%v), as container engines do: so hosts are looked up by path, away from the event loops, and a name that is too long for a socket address (sun_path) needs hashed names", h.paths))
	}
	if owner, err := h.owner(); err == nil && h.Overflow(owner) {
		lines = append(lines, fmt.Sprintf("the hosts directory belongs to uid %d, which in a user namespace stands for all users unknown to it: no wildcard, no directory *, no log-connections, no .accept-proxy and no .ech counts unless it is root's; map the owner of the hosts directory", owner))
	}
	return lines
}

// isAdministrator reports whether a user is root or owns the hosts directory now. The overflow uid
// is never the administrator.
func (h *Hosts) isAdministrator(uid uint32) bool {
	if h.Overflow(uid) {
		return false
	}
	if uid == 0 {
		return true
	}
	owner, err := h.owner()
	return err == nil && uid == owner
}

// wasAdministrator is isAdministrator without a system call: it goes by the owner that the hosts
// directory had when it was last asked for. That is good enough for limits, and for who makes a
// look-up, but never for whether an entry or a marker counts.
func (h *Hosts) wasAdministrator(uid uint32) bool {
	return !h.Overflow(uid) && (uid == 0 || uid == h.lastOwner.Load())
}

// Overflow reports whether a user is the overflow uid.
func (h *Hosts) Overflow(uid uint32) bool { return uid == nobody || uid == h.overflow }

// owner returns the owner of the hosts directory.
func (h *Hosts) owner() (uint32, error) {
	uid, err := h.askOwner()
	if err == nil {
		h.lastOwner.Store(uid)
	}
	return uid, err
}

// LogAll reports whether the connections of all hosts are logged: whether the entry * and a
// log-connections in it exist and are the administrator's. An error means that this could not be
// found out. It may wait for a file system.
func (h *Hosts) LogAll() (bool, error) {
	if _, err := h.owner(); err != nil { // also for wasAdministrator
		return false, err
	}
	var buf [MaxName + len("/log-connections\x00")]byte
	star := AppendName(buf[:0], []byte{'*'})
	if is, err := h.administrators(append(star, 0)); !is {
		return false, err
	}
	return h.administrators(append(star, "/log-connections\x00"...))
}

// AcceptProxy reports whether all connections must begin with a PROXY protocol header: whether the
// marker .accept-proxy in the hosts directory is a directory of the administrator's. (A tenant can
// move files and symlinks of the administrator's out of his own directory, but no directory.) If
// something exists there and does not count, ignored says why and what to do. An error means that
// this could not be found out. It waits for no file system but that of the hosts directory: whoever
// mounts another one on a marker of his own keeps nobody from finding out about the
// administrator's.
func (h *Hosts) AcceptProxy() (yes bool, ignored string, err error) {
	st, err := h.look([]byte(".accept-proxy\x00"), true)
	switch {
	case err == unix.ENOENT:
		return false, "", nil
	case err != nil:
		return false, "", err
	case st.kind != unix.S_IFDIR:
		return false, "it is no directory, so a tenant may have moved it there: remove it, and if there is a load balancer, make a directory of that name", nil
	case st.unsure:
		return false, "a file system is mounted on it, which may lie about its owner: unmount that, and make the marker itself there", nil
	}
	ignored, err = h.foreign(st.owner)
	return ignored == "" && err == nil, ignored, err
}

// foreign says why what a user owns does not count, and what to do. It says nothing for the
// administrator.
func (h *Hosts) foreign(owner uint32) (ignored string, err error) {
	if h.Overflow(owner) {
		return fmt.Sprintf("it belongs to uid %d, which in a user namespace stands for all users unknown to it: chown it to a user that is known there, who owns the hosts directory, or to root", owner), nil
	}
	if owner == 0 {
		return "", nil
	}
	administrator, err := h.owner()
	if err != nil || owner == administrator {
		return "", err
	}
	return fmt.Sprintf("it belongs to uid %d, neither to root nor to the owner of the hosts directory: chown it to root, or remove it", owner), nil
}

// administrators reports whether something exists at a path in the hosts directory and is the
// administrator's.
func (h *Hosts) administrators(path []byte) (bool, error) {
	st, err := h.lstat(path, true)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return false, nil
	}
	return err == nil && h.isAdministrator(st.owner), err
}

// A status is what lstat(2) tells about an entry of the hosts directory.
type status struct {
	owner uint32
	kind  uint32 // S_IFDIR and the like

	shared bool // others than the owner may change it; known on Linux

	// unsure: a file system is mounted on the entry that may lie about the owner, so owner is
	// nobody.
	unsure bool
}

// Find tells which entry serves a name, which may also be a wildcard, and which wildcards it passed
// over because they do not count. It looks at the entries alone and follows nothing, so it waits
// for no file system but that of the hosts directory.
//
// Whoever may change the hosts directory can keep it locked. With wait false the error is [MayWait]
// if others than the owner may, and the kernel does not know whether the entry exists. The error is
// [Again] or an [*Error].
func (h *Hosts) Find(name []byte, wait bool) (e Entry, passedOver []string, err error) {
	h.owner()
	ignored := false
	for n := range candidates {
		entry := candidate(nil, name, n)
		if entry == nil {
			continue
		}
		entry = append(entry, 0)
		if !wait && h.mayWait(entry) {
			return unknown, passedOver, MayWait
		}
		e, err = h.find(entry, n > 0, false)
		if !isSkip(err) {
			return e, passedOver, err
		}
		if err != absent {
			passedOver = append(passedOver, string(entry[:len(entry)-1]))
		}
		ignored = ignored || err == untrusted
	}
	return Entry{}, passedOver, notFound(ignored)
}

// find looks at an entry, whose name ends in a zero.
func (h *Hosts) find(entry []byte, wildcard, wait bool) (Entry, error) {
	st, err := h.lstat(entry, wait)
	if err == unix.ENOENT {
		return Entry{}, absent
	}
	e := Entry{Name: entry[:len(entry)-1], Owner: nobody, Foreign: true}
	if err != nil {
		return e, lookError(err)
	}
	e.Owner = st.owner
	if err := h.counts(st, wildcard); err != nil {
		return e, err
	}
	e.Administrators = h.wasAdministrator(st.owner)
	e.Foreign = st.kind != unix.S_IFDIR || !e.Administrators || st.shared
	return e, nil
}

// counts returns nil if an entry counts, a skip if it does not, and NoDirectory for the entry of a
// host that cannot be a directory.
func (h *Hosts) counts(st status, wildcard bool) error {
	isDirectory := st.kind == unix.S_IFDIR || st.kind == unix.S_IFLNK
	switch {
	case wildcard && !isDirectory:
		return odd
	case wildcard && !st.unsure && !h.isAdministrator(st.owner): // if unsure, the caller finds out
		return untrusted
	case !isDirectory:
		return &Error{Problem: NoDirectory, Errno: unix.ENOTDIR}
	}
	return nil
}
