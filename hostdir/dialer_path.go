package hostdir

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// This file is how a Dialer works with paths. Two look-ups of one path may find two directories,
// and markers of the wrong one are worse than none. So it identifies the directory before it
// connects, and again afterwards: if that has changed, the error is Exchanged.

// A path is what is known of the entry that was found.
type path struct {
	wildcard bool
	before   identity // zero if there was no time to find out
}

// look finds out whether the candidate serves the host.
func (d *Dialer) look(wildcard, wait bool) (err error) {
	d.path = path{wildcard: wildcard}
	if !wait && d.hosts.mayWait(d.entry) {
		d.found = unknown
		return MayWait
	}
	if d.found, err = d.hosts.find(d.entry, wildcard, wait); err != nil || !wait {
		return err
	}
	return d.identify()
}

// identify identifies the directory of the entry that was found.
func (d *Dialer) identify() error {
	wildcard := d.path.wildcard
	id := identify(string(d.found.Name))
	d.path.before = id
	switch {
	case id.absent:
		return absent
	case wildcard && id.owner != d.found.Owner:
		return Exchanged
	case (id.link || wildcard) && id.recent():
		return Exchanged
	}
	d.found.Foreign = !d.hosts.wasAdministrator(id.dirOwner)
	return nil
}

// connectPath connects to the tls-socket of the entry that was found.
func (d *Dialer) connectPath(datagram int) (Backend, error) {
	if d.path.before == (identity{}) {
		if d.identify() != nil {
			d.path.before = identity{}
			return none, Exchanged
		}
	}
	dir := string(d.found.Name)
	fd := datagram
	if datagram < 0 {
		var err error
		if fd, err = d.hosts.socket(d.Deaf); err != nil {
			return none, systemError(err)
		}
	}
	b, err := d.connectTo(fd, dir)
	b.Datagram = datagram >= 0
	if identify(dir) != d.path.before { // an error, too, may be about what is gone by now
		err = Exchanged
	}
	if err == nil {
		return b, nil
	}
	if datagram < 0 {
		unix.Close(fd)
	}
	return none, err
}

// connectTo connects a socket to the tls-socket in dir, and reads the markers there.
func (d *Dialer) connectTo(fd int, dir string) (Backend, error) {
	b := Backend{FD: fd}
	if err := connect(fd, dir+"/tls-socket", d.Deaf); err != nil {
		return b, connectError(dir, err)
	}
	for _, version := range []uint8{2, 1} {
		there, _, err := exists(fmt.Sprintf("%s/send-proxy-v%d", dir, version))
		if err != nil {
			return b, err
		}
		if there {
			b.Proxy = version
			break
		}
	}
	there, owner, err := exists(dir + "/log-connections")
	b.Log = there && d.hosts.isAdministrator(owner)
	return b, err
}

// exists reports whether there is anything at a path, and who owns it. A symlink counts as it is;
// sniproxy-rs follows it.
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

// An identity tells what is at a path, a directory or a symlink to one, from all that was or will
// be there.
type identity struct {
	absent           bool
	owner            uint32 // of the entry itself
	dirOwner         uint32
	dirDev, dirIno   uint64
	linkDev, linkIno uint64        // of the entry itself
	changed          unix.Timespec // it may be switched, and switched back
	link             bool          // it is a symlink
}

func identify(path string) (id identity) {
	var dir, link unix.Stat_t
	// The directory comes first: if the link is the same the next time, the second stat(2) followed
	// that link.
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

// clockTick is more than the time between two ticks of the clock by which file systems note
// changes.
const clockTick = 20 * time.Millisecond

// recent reports a change within the last clock tick, in which a switch and back can leave the same
// ctime and a reused inode number.
func (id identity) recent() bool {
	ago := time.Since(time.Unix(id.changed.Unix()))
	return ago.Abs() < clockTick
}
