package hostdir

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// This file is how a Dialer works from inside the host's directory: it makes that the working
// directory of its thread. It keeps the directory open as well, since the next client often comes
// for the same host.

// A workdir is the working directory of a thread, and what is known of it.
type workdir struct {
	away      bool // it is that of a host, not the hosts directory
	slow      bool // system calls of this look-up may wait for more than a disk
	slowEntry bool // so may those that look for the entry, in the hosts directory

	// Of the directory that is kept open, if it is an entry itself, not behind a symlink or mount.
	kept    bool
	dir     uintptr
	entry   []byte // its entry, with a zero at its end
	buf     [nameMax + 1]byte
	inode   inode
	changed unix.StatxTimestamp // its ctime at the last look
	same    bool                // it was the same at the look before
	known   bool                // plain and markers tell what is in it, for as long as it is the same
	plain   bool                // tls-socket is itself a socket, neither a symlink nor a mount
	markers markers
}

// markers tells which markers are in a directory.
type markers struct {
	proxy uint8 // the version of the PROXY protocol
	log   bool  // there is a log-connections, whoever owns it
}

// ownWorkdir gives the calling thread a working directory of its own, which takes no privilege.
func ownWorkdir() error { return unix.Unshare(unix.CLONE_FS) }

// Release closes the descriptor that is kept open for the next look-up, and reports whether there
// was one. The directory is still the working directory.
func (d *Dialer) Release() bool {
	w := &d.workdir
	if !w.kept {
		return false
	}
	closeRaw(w.dir)
	w.kept, w.entry, w.same, w.known = false, nil, false, false
	return true
}

// Leave makes the hosts directory the working directory again: a working directory keeps its file
// system from being unmounted. Connect needs another Find then.
func (d *Dialer) Leave() {
	if d.workdir.away {
		d.Release()
		d.workdir.away = unix.Fchdir(int(d.hosts.fd)) != nil
		d.err = notFound(false)
	}
}

// enter makes the directory of the candidate the working directory, if it serves the host.
func (d *Dialer) enter(wildcard, wait bool) error {
	d.workdir.slow = wait || !d.hosts.local
	d.workdir.slowEntry = d.workdir.slow || d.hosts.shared.Load()
	d.found = Entry{Name: d.entry[:len(d.entry)-1], Owner: nobody, Foreign: true}
	if is, err := d.isOpen(wildcard, wait); is {
		return err
	}
	err := d.change(wildcard, wait)
	if err == NoRoom && d.Release() {
		err = d.change(wildcard, wait)
	}
	switch {
	case err != NoRoom:
	case d.hosts.asks(wait): // to ask the kernel what it knows takes a descriptor
		d.found, err = unknown, MayWait
	default: // the owner can be found all the same
		if e, looked := d.hosts.find(d.entry, wildcard, false); looked == nil {
			d.found = e
		} else if isSkip(looked) {
			err = looked
		}
	}
	return err
}

// isOpen reports whether the candidate is the directory that is kept open, and whether it counts.
// No other directory can have the inode number of one that is open.
func (d *Dialer) isOpen(wildcard, wait bool) (bool, error) {
	h, w := d.hosts, &d.workdir
	if !bytes.Equal(d.entry, w.entry) {
		return false, nil
	}
	dir, entry := h.fd, d.entry
	if h.asks(wait) { // by now it may have another name, and a look for this one wait
		fd, errno := h.openDirectory(d.entry, w.slowEntry, wait)
		if errno != 0 {
			return false, nil
		}
		defer closeRaw(fd)
		dir, entry = fd, empty
	}
	st, errno := stat(dir, entry, w.slowEntry)
	if errno != 0 || inodeOf(&st) != w.inode {
		return false, nil
	}
	w.same = st.Ctime == w.changed
	w.known = w.known && w.same
	w.changed = st.Ctime
	return true, d.countsDirectory(&st, wildcard)
}

// countsDirectory is counts for an entry that is a directory on the file system of the hosts
// directory.
func (d *Dialer) countsDirectory(st *unix.Statx_t, wildcard bool) error {
	if wildcard && !d.hosts.isAdministrator(st.Uid) {
		return untrusted
	}
	d.found.Owner = st.Uid
	d.found.Administrators = d.hosts.wasAdministrator(st.Uid)
	d.found.Foreign = !d.found.Administrators || mayLock(uint32(st.Mode))
	return nil
}

// change makes another directory the working directory. It is kept open, unless it is behind a
// symlink or a mount.
func (d *Dialer) change(wildcard, wait bool) error {
	h, w := d.hosts, &d.workdir
	fd, errno := h.openDirectory(d.entry, w.slowEntry, wait)
	switch errno {
	case 0:
	case unix.EAGAIN: // who may change the hosts directory can keep it locked
		d.found = unknown
		return MayWait
	case unix.ENOENT:
		return absent
	case unix.ENOTDIR, unix.EXDEV: // a symlink, or a mount
		return d.follow(wildcard, wait)
	default:
		return enterError(errno)
	}
	st, errno := stat(fd, empty, false)
	if errno != 0 {
		closeRaw(fd)
		return enterError(errno)
	}
	if !h.cached && (h.status(&st).unsure || deviceOf(&st) != h.device) {
		closeRaw(fd)
		return d.follow(wildcard, wait)
	}
	err := d.countsDirectory(&st, wildcard)
	if err == nil {
		err = d.chdir(fd)
	}
	if err != nil {
		closeRaw(fd)
		return err
	}
	w.kept, w.dir = true, fd
	w.entry = append(w.buf[:0], d.entry...)
	w.inode, w.changed = inodeOf(&st), st.Ctime
	return nil
}

// chdir makes a directory the working directory, and closes the one that was kept open.
func (d *Dialer) chdir(fd uintptr) error {
	if errno := fchdir(fd, d.workdir.slow); errno != 0 {
		return enterError(errno)
	}
	d.workdir.away = true
	d.Release()
	return nil
}

// openDirectory opens an entry that is a directory on the file system of the hosts directory, so
// that it waits for no other. See [Hosts.asks] for who may keep it waiting all the same.
func (h *Hosts) openDirectory(entry []byte, slow, wait bool) (uintptr, unix.Errno) {
	switch {
	case h.asks(wait):
		return openat2(h.fd, &entry[0], &ownCached, slow)
	case h.cached:
		return openat2(h.fd, &entry[0], &ownDirectory, slow)
	}
	// Before openat2(2) a mount can be told only once it is open.
	return openat(h.fd, &entry[0], unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

// follow goes to the directory that a symlink leads to, or that is mounted. A wildcard is opened
// before its owner is asked for, so that nothing can take its place in between.
func (d *Dialer) follow(wildcard, wait bool) error {
	h := d.hosts
	dir, path := h.fd, d.entry
	if wildcard {
		link, errno := openat(h.fd, &d.entry[0], unix.O_NOFOLLOW)
		if errno == unix.ENOENT {
			return absent
		}
		if errno != 0 {
			return enterError(errno)
		}
		defer closeRaw(link)
		st, err := h.fstat(link, wait)
		if err := d.counts(st, err, wildcard); err != nil {
			return err
		}
		if st.unsure { // to find out whether it counts takes time
			return MayWait
		}
		if dir, path = link, dot; st.kind == unix.S_IFLNK {
			var target [unix.PathMax]byte
			n, errno := readlink(link, empty, target[:], true)
			if errno != 0 || n == len(target) {
				return enterError(unix.ENOTDIR)
			}
			dir, path = h.fd, target[:n+1]
		}
	} else {
		st, err := h.lstat(d.entry, wait)
		if err := d.counts(st, err, wildcard); err != nil {
			return err
		}
	}
	fd, err := d.open(dir, path, wait)
	if err != nil {
		return err
	}
	defer closeRaw(fd) // not kept: the same name may lead elsewhere next time
	d.workdir.slow = true
	return d.chdir(fd)
}

// counts notes the owner of an entry, and tells whether it counts.
func (d *Dialer) counts(st status, err error, wildcard bool) error {
	if err == unix.ENOENT {
		return absent
	}
	if err != nil {
		return enterError(err)
	}
	d.found.Owner, d.found.Administrators = st.owner, d.hosts.wasAdministrator(st.owner)
	return d.hosts.counts(st, wildcard)
}

// open opens the directory at a path in another one. If it must not wait, it neither follows where
// it might have to, nor opens what may check permissions itself when somebody enters it. File
// systems on block devices do not.
func (d *Dialer) open(dir uintptr, path []byte, wait bool) (uintptr, error) {
	h := d.hosts
	var fd uintptr
	var errno unix.Errno
	switch {
	case wait:
		fd, errno = openat(dir, &path[0], unix.O_DIRECTORY)
	case h.cached:
		fd, errno = openat2(dir, &path[0], &cachedDirectory, false)
	default:
		errno = unix.EAGAIN
	}
	if errno != 0 {
		return fd, enterError(errno)
	}
	st, errno := stat(fd, empty, wait)
	if errno != 0 {
		closeRaw(fd)
		return fd, enterError(errno)
	}
	if on := deviceOf(&st); !wait && on.major == 0 && on != h.device {
		closeRaw(fd)
		return fd, MayWait
	}
	d.found.Foreign = !h.wasAdministrator(st.Uid) || mayLock(uint32(st.Mode))
	return fd, nil
}

// connectInside connects to the tls-socket in the working directory. For lack of a descriptor it
// gives up the one that is kept open, so that the next try has that.
func (d *Dialer) connectInside(datagram int, wait bool) (Backend, error) {
	b, err := d.connectOnce(datagram, wait)
	if err == NoRoom {
		d.Release()
	}
	return b, err
}

func (d *Dialer) connectOnce(datagram int, wait bool) (Backend, error) {
	// Whoever may read and change a directory can keep it locked, and then a look into it waits.
	d.workdir.slow = d.workdir.slow || wait || d.found.Foreign
	w := &d.workdir
	sure := w.known && w.plain
	if !wait && !sure {
		if err := d.checkSocket(); err != nil {
			return none, err
		}
	}
	b := Backend{FD: datagram, Datagram: datagram >= 0}
	if !b.Datagram {
		var err error
		if b.FD, err = d.hosts.socket(d.Deaf); err != nil {
			return none, systemError(err)
		}
	}
	var err error
	// Only if nobody but the administrator can exchange the socket just now does this surely not
	// wait.
	if errno := connectSocket(uintptr(b.FD), !sure || w.slow); errno != 0 {
		err = connectError(".", errno)
	} else if errno = d.readMarkers(&b); errno != 0 {
		err = lookError(errno)
	}
	if err == nil {
		return b, nil
	}
	if !b.Datagram {
		closeRaw(uintptr(b.FD))
	}
	return none, err
}

// checkSocket makes sure that connecting to tls-socket does not wait, wherever that leads.
func (d *Dialer) checkSocket() error {
	if !d.hosts.cached {
		st, errno := stat(here, tlsSocket, d.workdir.slow)
		if errno == 0 && (st.Mode&unix.S_IFMT == unix.S_IFLNK || deviceOf(&st) != d.hosts.device) {
			return MayWait
		}
		return nil
	}
	for range 2 {
		fd, errno := openat2(here, &tlsSocket[0], &nearDirectory, false)
		switch errno {
		case 0: // a directory, which connect(2) has an error for
			closeRaw(fd)
			return nil
		case unix.ENOTDIR: // it was found, and is no directory
			return nil
		case unix.EXDEV:
			return MayWait
		case unix.EAGAIN:
		default:
			return connectError(".", errno)
		}
		// This brings tls-socket into the cache, though not what it leads to if it is a symlink.
		if _, errno := readlink(here, tlsSocket, make([]byte, 1), d.workdir.slow); errno != 0 && errno != unix.EINVAL {
			return connectError(".", errno)
		}
	}
	return MayWait
}

// readMarkers finds out what the markers say. A new owner of a marker is no change of the
// directory, so it is asked for each time.
func (d *Dialer) readMarkers(b *Backend) (errno unix.Errno) {
	w := &d.workdir
	is := w.markers
	if !w.known {
		lasts := d.whatIsSeenLasts()
		if is, errno = d.lookForMarkers(); errno != 0 {
			return errno
		}
		if lasts {
			d.rely(is)
		}
	}
	b.Proxy = is.proxy
	if is.log {
		st, errno := stat(here, logConnections, w.slow)
		b.Log = errno == 0 && d.hosts.isAdministrator(st.Uid)
	}
	return 0
}

// whatIsSeenLasts reports whether what is in the working directory from now on stays there for as
// long as the ctime of the directory is the same. It costs some calls, so it never does at the
// first look-up.
//
// A change writes the ctime down first, and then makes the change itself. So there are two ways in
// which the ctime could be that of the last look although something has changed since. The clock
// may not have moved on since that ctime: then the next change can have the same. And the change
// that wrote it down may not be done yet: but that locks the directory, so whoever has had that
// lock has waited for it.
func (d *Dialer) whatIsSeenLasts() bool {
	w := &d.workdir
	if !w.same || !d.hosts.dated || !clockAfter(w.changed) {
		return false
	}
	// The file system is asked for a name that is not in the kernel's cache, for which it takes the
	// lock. No name can be so long.
	_, errno := readlink(here, tooLong, make([]byte, 1), w.slow)
	return errno == unix.ENAMETOOLONG
}

// clockAfter reports whether the next change of a file gets a later time. The clock that files are
// dated by moves on with a timer, which a virtual machine may get late, so another clock does not
// tell. A file system that has no nanoseconds dates by seconds.
func clockAfter(t unix.StatxTimestamp) bool {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
		return false
	}
	sec, nsec := now.Unix() // its fields have 32 bits on some processors
	if t.Nsec == 0 {
		return sec > t.Sec
	}
	return sec > t.Sec || sec == t.Sec && nsec > int64(t.Nsec)
}

// rely has later look-ups of this directory rely on the markers that were found, and on tls-socket
// if that is itself a socket. Only root can mount something on a socket later: fusermount(1) takes
// directories and files.
func (d *Dialer) rely(on markers) {
	w := &d.workdir
	st, errno := stat(here, tlsSocket, w.slow)
	w.known, w.markers = errno == 0, on
	w.plain = st.Mode&unix.S_IFMT == unix.S_IFSOCK && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 && deviceOf(&st) == d.hosts.device
}

func (d *Dialer) lookForMarkers() (m markers, errno unix.Errno) {
	there, errno := d.has(sendProxyV2)
	if there {
		m.proxy = 2
	} else if errno == 0 {
		if there, errno = d.has(sendProxyV1); there {
			m.proxy = 1
		}
	}
	if errno == 0 {
		m.log, errno = d.has(logConnections)
	}
	return m, errno
}

// has reports whether the working directory has something with that name. A symlink counts as it
// is.
func (d *Dialer) has(name []byte) (bool, unix.Errno) {
	switch _, errno := readlink(here, name, make([]byte, 1), d.workdir.slow); errno {
	case 0, unix.EINVAL:
		return true, 0
	case unix.ENOENT:
		return false, 0
	default:
		return false, errno
	}
}
