package hostdir

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// nameMax is the length in bytes of the longest name in a directory.
const nameMax = 255

// A Dialer connects to backends. On Linux it does so from a thread that has a working directory of its own. It
// makes each host's directory the working directory of that thread, so all that is looked up is of one
// directory, whatever takes its place meanwhile, and the path of the socket is short: a name of any
// length fits. Elsewhere it works with paths: see [Hosts.PathsOnly].
type Dialer struct {
	// Deaf connections are shut down for reading before they are made, where the system can do that, and else at once
	// after: nothing that a backend sends or passes is held by them.
	Deaf bool

	hosts *Hosts
	entry []byte // that was found last, with a zero at its end
	buf   [nameMax + 2]byte
	found Entry
	err   error // that Find has ended with

	own thread

	// Of what was found, when working with paths.
	general bool // it is a wildcard, or *
	before  identity
}

// NewDialer returns a Dialer for the calling goroutine, which must be the only one to use it and, on
// Linux, be locked to its thread for good. It opens nothing.
func (h *Hosts) NewDialer() (*Dialer, error) {
	d := &Dialer{hosts: h}
	if h.paths == nil {
		if err := d.own.begin(); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// Close closes what the Dialer has open. The thread is of no use for anything else.
func (d *Dialer) Close() { d.Release() }

// Find finds the entry that serves the host with the canonical name, or the clients that name none if
// name is empty, and enters its directory. The name may also be a wildcard, which stands for
// those that it is meant for, and that have no entry of their own.
//
// With wait false it waits for no file system except that of the hosts directory. If the entry leads
// elsewhere, by a symlink or a mount, and it cannot be told beforehand that finding out more takes
// no time, the problem is [MayWait], and a thread that has the time can find it with wait true. A
// tenant's file system (FUSE, NFS) may never answer.
//
// The error is of type [*Error]. The Entry is returned with it, as far as it is known, if it is about
// one; Name and Owner always are.
func (d *Dialer) Find(name []byte, wait bool) (Entry, error) {
	d.found = Entry{}
	err := errAbsent
	var t trial
	for t.next(err) {
		if entry := t.entry(d.buf[:0], name); entry != nil {
			d.entry = append(entry, 0)
			err = d.enter(t.general(), wait)
		}
	}
	return d.end(t.outcome(err), isNone(err))
}

// FindEntry is like Find, but for an entry itself, whose name in the hosts directory is given.
func (d *Dialer) FindEntry(entry []byte, wait bool) (Entry, error) {
	d.found = Entry{}
	if len(entry) > nameMax {
		return d.end(lookError(unix.ENAMETOOLONG), true)
	}
	d.entry = append(append(d.buf[:0], entry...), 0)
	err := d.enter(false, wait)
	return d.end(new(trial).outcome(err), isNone(err))
}

func (d *Dialer) enter(general, wait bool) error {
	if d.hosts.paths != nil {
		return d.look(general, wait)
	}
	return d.enterOwn(general, wait)
}

// end ends a Find.
func (d *Dialer) end(err error, none bool) (Entry, error) {
	if none {
		d.found = Entry{}
	}
	d.err = err
	return d.found, err
}

// Connect connects to tls-socket of what the last Find has found. Socket and markers are of one directory,
// also when another one takes the place of the host's meanwhile, as when a symlink is switched. With
// wait false the problem is [MayWait] if tls-socket leads to another file system. But there is a moment
// between looking and connecting in which who may write to the directory can exchange the socket for a
// symlink: then it waits all the same.
//
// Connect never waits for a backend whose backlog is full, and never tries again: see [BacklogFull] and
// [Exchanged]. After [NoRoom] it may be called again. The error is of type [*Error].
func (d *Dialer) Connect(wait bool) (Backend, error) {
	switch {
	case d.err != nil:
		return Backend{FD: -1}, d.err
	case d.hosts.paths == nil:
		return d.connectOwn(wait)
	case !wait:
		return Backend{FD: -1}, &Error{Problem: MayWait}
	}
	return d.connectPath()
}

// What follows works with paths. Two look-ups may find two directories, and the markers of the wrong
// one are worse than none. So a directory is identified before and after.

// look finds an entry.
func (d *Dialer) look(general, wait bool) (err error) {
	d.general, d.before = general, identity{}
	if d.found, err = d.hosts.find(d.entry, general, wait); err != nil || !wait {
		return err
	}
	return d.identify()
}

// identify identifies the directory of the entry that was found.
func (d *Dialer) identify() error {
	path, general := string(d.found.Name), d.general
	d.before = identify(path)
	switch {
	case d.before.absent:
		return errAbsent
	case general && d.before.owner != d.found.Owner:
		return &Error{Problem: Exchanged}
	case (d.before.link || general) && d.before.recent():
		return &Error{Problem: Exchanged}
	}
	d.found.Foreign = !d.hosts.seems(d.before.dirOwner)
	return nil
}

func (d *Dialer) connectPath() (Backend, error) {
	if d.before == (identity{}) { // it was found with no time for it
		if d.identify() != nil {
			d.before = identity{}
			return Backend{FD: -1}, &Error{Problem: Exchanged}
		}
	}
	path := string(d.found.Name)
	fd, err := d.hosts.socket(d.Deaf)
	if err != nil {
		return Backend{FD: -1}, socketError(err)
	}
	b, err := d.connectTo(fd, path)
	if err == nil && identify(path) != d.before {
		err = &Error{Problem: Exchanged}
	}
	if err != nil {
		unix.Close(fd)
		return Backend{FD: -1}, err
	}
	return b, nil
}

func (d *Dialer) connectTo(fd int, path string) (b Backend, err error) {
	if err := connect(fd, path+"/tls-socket", d.Deaf); err != nil {
		err = connectError(path, err)
		if identify(path) != d.before { // what the error is about may be gone, and another entry counts
			err = &Error{Problem: Exchanged}
		}
		return b, err
	}
	b.FD = fd
	for _, v := range []uint8{2, 1} {
		there, _, err := exists(fmt.Sprintf("%s/send-proxy-v%d", path, v))
		if err != nil {
			return b, err
		}
		if there {
			b.Proxy = v
			break
		}
	}
	there, owner, err := exists(path + "/log-connections")
	b.Log = there && d.hosts.Administrator(owner)
	return b, err
}

// An identity tells what is at a path, a directory or a symlink that leads to one, from
// all that was or will be there.
type identity struct {
	absent           bool
	owner            uint32 // of what is there, not of what it leads to
	dirOwner         uint32
	dirDev, dirIno   uint64
	linkDev, linkIno uint64
	changed          unix.Timespec // it may be switched, and switched back
	link             bool          // it is a symlink
}

func identify(path string) (id identity) {
	var dir, link unix.Stat_t
	// The directory comes first: if the symlink is the same at the next time, it has led there
	// by then as well.
	found := unix.Stat(path, &dir) == nil
	if err := unix.Lstat(path, &link); err != nil {
		return identity{absent: true}
	}
	id = identity{
		owner: link.Uid, dirOwner: nobody, linkDev: uint64(link.Dev), linkIno: uint64(link.Ino),
		changed: link.Ctim, link: link.Mode&unix.S_IFMT == unix.S_IFLNK,
	}
	if found {
		id.dirOwner, id.dirDev, id.dirIno = dir.Uid, uint64(dir.Dev), uint64(dir.Ino)
	}
	return id
}

// clockTick is more than the time between two steps of the clock by which file systems tell
// when something was changed.
const clockTick = 20 * time.Millisecond

// recent tells whether an entry was switched so lately that after another switch, and one back,
// the time may still be the same, and the number too, since numbers are used again.
func (id identity) recent() bool {
	ago := time.Since(time.Unix(id.changed.Unix()))
	return ago.Abs() < clockTick
}

// exists tells whether there is anything at a path, and whose it is. A symlink there counts as it
// is; sniproxy-rs follows it.
func exists(path string) (there bool, owner uint32, err error) {
	var st unix.Stat_t
	switch err := unix.Fstatat(unix.AT_FDCWD, path, &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case nil:
		return true, st.Uid, nil
	case unix.ENOENT, unix.ENOTDIR: // the directory itself may be gone by now
		return false, 0, nil
	default: // it may have been closed to us by now
		return false, 0, lookError(err)
	}
}
