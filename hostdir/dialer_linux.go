package hostdir

import (
	"bytes"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A place is the hosts directory, and what is known of the system that it is on.
type place struct {
	fd     uintptr
	device device
	cached bool // the system can tell whether a look-up may wait
	local  bool // the directory is in memory, or on a disk: nothing else keeps waiting there
}

// A device is what a file system is on. Its major number is 0 unless it is on a block device.
type device struct{ major, minor uint32 }

// An inode tells a directory that is open from all others.
type inode struct {
	device device
	number uint64
}

func (h *Hosts) open() error {
	fd, err := unix.Open(".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	h.fd = uintptr(fd)
	if err := h.probe(); err != nil {
		h.close()
		return err
	}
	return nil
}

func (h *Hosts) close() { closeRaw(h.fd) }

// probe finds out what the system can do.
func (h *Hosts) probe() (err error) {
	if h.overflow, err = overflowUID(); err != nil {
		return err
	}
	st, errno := stat(h.fd, empty, true)
	if errno != 0 {
		return errno
	}
	h.device = deviceOf(&st)
	h.local = h.device.major != 0 || inMemory(h.fd)
	// Linux has openat2(2) since 5.6, RESOLVE_CACHED since 5.12.
	fd, errno := openat2(h.fd, &dot[0], &cachedDirectory, true)
	switch errno {
	case 0:
		closeRaw(fd)
		h.cached = true
	case unix.EMFILE, unix.ENFILE:
		return errno
	}
	// Linux has SO_PASSRIGHTS since 6.16.
	s, errno := socket()
	if errno != 0 {
		return errno
	}
	h.refuses = setInt(s, soPassRights, 0) == 0
	closeRaw(s)
	onThread(func() { h.paths = unix.Unshare(unix.CLONE_FS) })
	return nil
}

// overflowUID returns the user as which the system shows those that it has no number for.
func overflowUID() (uint32, error) {
	fd, err := unix.Open("/proc/sys/kernel/overflowuid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.EMFILE || err == unix.ENFILE {
		return 0, err
	}
	if err != nil {
		return nobody, nil
	}
	defer unix.Close(fd)
	var text [16]byte
	n, _ := unix.Read(fd, text[:])
	uid := uint32(0)
	for _, digit := range bytes.TrimSpace(text[:max(n, 0)]) {
		uid = 10*uid + uint32(digit-'0')
	}
	if n <= 0 {
		uid = nobody
	}
	return uid, nil
}

// inMemory tells whether a directory is on a file system that is nowhere but in memory.
func inMemory(dir uintptr) bool {
	var fs unix.Statfs_t
	err := unix.Fstatfs(int(dir), &fs)
	return err == nil && (uint32(fs.Type) == unix.TMPFS_MAGIC || uint32(fs.Type) == unix.RAMFS_MAGIC)
}

// onThread calls do on a thread that ends after it, and is not the main thread, which would not end.
func onThread(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onThread(do)
			runtime.UnlockOSThread()
			return
		}
		do()
	}()
	<-done
}

// ask asks for the owner of the hosts directory.
func (h *Hosts) ask() (uint32, error) {
	st, errno := stat(h.fd, empty, false)
	if errno != 0 {
		return 0, errno
	}
	return st.Uid, nil
}

// lstat tells about an entry of the hosts directory, whose name ends in a zero.
func (h *Hosts) lstat(entry []byte, wait bool) (status, error) {
	st, errno := stat(h.fd, entry, wait || !h.local)
	if errno != 0 {
		return status{}, errno
	}
	is := h.status(&st)
	if !is.unsure || !wait {
		return is, nil
	}
	fd, errno := openat(h.fd, &entry[0], unix.O_NOFOLLOW)
	if errno != 0 {
		return status{}, errno
	}
	defer closeRaw(fd)
	return h.opened(fd, true)
}

// opened tells about an entry that is open.
func (h *Hosts) opened(fd uintptr, wait bool) (status, error) {
	st, errno := stat(fd, empty, wait)
	if errno != 0 {
		return status{}, errno
	}
	is := h.status(&st)
	if is.unsure && wait {
		var fs unix.Statfs_t
		is.unsure = false
		if err := unix.Fstatfs(int(fd), &fs); err == nil && uint32(fs.Type) != unix.FUSE_SUPER_MAGIC {
			is.owner = st.Uid
		}
	}
	return is, nil
}

// status returns what the system tells of an entry. A user may mount a FUSE on his directory
// (fusermount), and it can say that it belongs to anybody, such as root. It is on no block device.
func (h *Hosts) status(st *unix.Statx_t) status {
	is := status{owner: st.Uid, kind: uint32(st.Mode) & unix.S_IFMT}
	on := deviceOf(st)
	mounted := st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 || st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0
	if mounted && on.major == 0 && on != h.device {
		is.owner, is.unsure = nobody, true
	}
	return is
}

func deviceOf(st *unix.Statx_t) device { return device{st.Dev_major, st.Dev_minor} }

func inodeOf(st *unix.Statx_t) inode { return inode{deviceOf(st), st.Ino} }

func (h *Hosts) socket(deaf bool) (int, error) {
	s, errno := h.newSocket(deaf)
	if errno != 0 {
		return -1, errno
	}
	return int(s), nil
}

// newSocket returns a socket to which no backend can pass descriptors, as far as the system can
// refuse them. Where it cannot, a backend must at least not have the system drop them in the middle of a
// loop: that is what happens to those of an out-of-band byte which reading passes over.
func (h *Hosts) newSocket(deaf bool) (uintptr, unix.Errno) {
	s, errno := socket()
	if errno != 0 {
		return s, errno
	}
	if h.refuses {
		errno = setInt(s, soPassRights, 0)
	} else {
		errno = setInt(s, unix.SO_OOBINLINE, 1)
	}
	if errno == 0 && deaf {
		errno = shutdown(s)
	}
	if errno != 0 {
		closeRaw(s)
	}
	return s, errno
}

// connect connects a socket to a path. If it is to be deaf it is already.
func connect(fd int, path string, _ bool) error {
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// A thread is what a Dialer has if its thread has a working directory of its own.
type thread struct {
	away  bool // it is that of a host
	waits bool // the look-up that is made may wait for more than a disk
	kept  bool // the directory of a host is open: the next client often comes for the same
	dir   uintptr
	entry []byte // that it is, with a zero
	buf   [nameMax + 1]byte
	inode inode // its own

	changed unix.StatxTimestamp // when the directory was changed last, as far as is known
	known   bool                // which markers there were since
	marks   marks
}

// marks tells which markers are in a directory.
type marks struct {
	proxy uint8 // the version of the PROXY protocol
	log   bool  // there is a log-connections, whoever it belongs to
}

// begin gives the calling thread a working directory of its own, which takes no privilege.
func (t *thread) begin() error { return unix.Unshare(unix.CLONE_FS) }

// Release closes the descriptor that is kept open for the next look-up, and reports whether there was
// one. It is still the working directory.
func (d *Dialer) Release() bool {
	t := &d.own
	if !t.kept {
		return false
	}
	closeRaw(t.dir)
	t.kept, t.entry, t.known = false, nil, false
	return true
}

// Leave makes the hosts directory the working directory again. That of a host, if it is used
// for long, keeps what it is on from being unmounted. Nothing is found any more.
func (d *Dialer) Leave() {
	if d.own.away {
		d.Release()
		d.own.away = unix.Fchdir(int(d.hosts.fd)) != nil
		d.err = errAbsent
	}
}

// enterOwn makes the directory of the entry the working directory, if it is not that already.
func (d *Dialer) enterOwn(general, wait bool) error {
	t := &d.own
	t.waits = wait || !d.hosts.local
	d.found = Entry{Name: d.entry[:len(d.entry)-1], Owner: nobody, Foreign: true}
	if in, err := d.isIn(general); in {
		return err
	}
	err := d.change(general, wait)
	if isProblem(err, NoRoom) {
		if d.Release() {
			err = d.change(general, wait)
		}
		if isProblem(err, NoRoom) { // whose it is can be told all the same
			if e, looked := d.hosts.find(d.entry, general, false); looked == nil {
				d.found = e
			} else if isNone(looked) {
				err = looked
			}
		}
	}
	return err
}

// isIn tells whether the entry is the directory that is open. No other one can have the number of
// its inode meanwhile.
func (d *Dialer) isIn(general bool) (bool, error) {
	t := &d.own
	if !bytes.Equal(d.entry, t.entry) {
		return false, nil
	}
	st, errno := stat(d.hosts.fd, d.entry, t.waits)
	if errno != 0 || inodeOf(&st) != t.inode {
		return false, nil
	}
	t.known = t.known && st.Ctime == t.changed
	t.changed = st.Ctime
	return true, d.plain(&st, general)
}

// plain tells whether an entry that is a directory, and no mount, counts.
func (d *Dialer) plain(st *unix.Statx_t, general bool) error {
	if general && !d.hosts.Administrator(st.Uid) {
		return errIgnored
	}
	d.found.Owner = st.Uid
	d.found.Administrators = d.hosts.seems(st.Uid)
	d.found.Foreign = !d.found.Administrators
	return nil
}

// change opens the directory of the entry, makes it the working directory, and closes the one that
// was open.
func (d *Dialer) change(general, wait bool) error {
	h, t := d.hosts, &d.own
	fd, errno := h.openPlain(d.entry, t.waits)
	switch errno {
	case 0:
	case unix.ENOENT:
		return errAbsent
	case unix.ENOTDIR, unix.EXDEV: // a symlink, or a mount
		return d.follow(general, wait)
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
		return d.follow(general, wait)
	}
	err := d.plain(&st, general)
	if err == nil {
		err = d.goTo(fd)
	}
	if err != nil {
		closeRaw(fd)
		return err
	}
	t.kept, t.dir = true, fd
	t.entry = append(t.buf[:0], d.entry...)
	t.inode, t.changed = inodeOf(&st), st.Ctime
	return nil
}

// goTo makes a directory the working directory. The one that was open is closed.
func (d *Dialer) goTo(fd uintptr) error {
	if errno := fchdir(fd, d.own.waits); errno != 0 {
		return enterError(errno)
	}
	d.own.away = true
	d.Release()
	return nil
}

// openPlain opens an entry that is a directory on the file system of the hosts directory. It does not wait for
// another one.
func (h *Hosts) openPlain(entry []byte, waits bool) (uintptr, unix.Errno) {
	if h.cached {
		return openat2(h.fd, &entry[0], &ownDirectory, waits)
	}
	return openat(h.fd, &entry[0], unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

// follow goes to the directory that a symlink leads to, or that is mounted. If the entry is a general
// one, it is opened before its owner is asked for, so it does not matter what takes its place meanwhile.
func (d *Dialer) follow(general, wait bool) error {
	h := d.hosts
	dir, path := h.fd, d.entry
	if general {
		link, errno := openat(h.fd, &d.entry[0], unix.O_NOFOLLOW)
		if errno == unix.ENOENT {
			return errAbsent
		}
		if errno != 0 {
			return enterError(errno)
		}
		defer closeRaw(link)
		st, err := h.opened(link, wait)
		if err := d.counts(st, err, general); err != nil {
			return err
		}
		if st.unsure { // whether it counts takes time to find out
			return &Error{Problem: MayWait}
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
		if err := d.counts(st, err, general); err != nil {
			return err
		}
	}
	fd, err := d.open(dir, path, wait)
	if err != nil {
		return err
	}
	defer closeRaw(fd) // what has led here cannot be told again by its name
	d.own.waits = true
	return d.goTo(fd)
}

// counts fills in what is known of the entry, and tells whether it counts.
func (d *Dialer) counts(st status, err error, general bool) error {
	if err == unix.ENOENT {
		return errAbsent
	}
	if err != nil {
		return enterError(err)
	}
	d.found.Owner, d.found.Administrators = st.owner, d.hosts.seems(st.owner)
	return d.hosts.counts(st, general)
}

// open opens the directory at a path in another one. If it must not wait, it does not follow where it might have to, nor does it open
// what may have a permission check of its own for those who enter it. File systems on block devices have none.
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
		return fd, &Error{Problem: MayWait}
	}
	d.found.Foreign = !h.seems(st.Uid)
	return fd, nil
}

// connectOwn connects to the tls-socket in the working directory.
func (d *Dialer) connectOwn(wait bool) (Backend, error) {
	none := Backend{FD: -1}
	d.own.waits = d.own.waits || wait
	if !wait {
		if err := d.checkSocket(); err != nil {
			return none, d.room(err)
		}
	}
	s, errno := d.hosts.newSocket(d.Deaf)
	if errno != 0 {
		return none, d.room(socketError(errno))
	}
	if errno = connectHere(s); errno != 0 {
		closeRaw(s)
		return none, d.room(connectError(".", errno))
	}
	b := Backend{FD: int(s)}
	if errno = d.markers(&b); errno != 0 {
		closeRaw(s)
		return none, lookError(errno)
	}
	return b, nil
}

// room releases the descriptor that is kept open if it may be the one that there is no room for.
func (d *Dialer) room(err error) error {
	if isProblem(err, NoRoom) {
		d.Release()
	}
	return err
}

// checkSocket sees to it that connecting to tls-socket does not wait, wherever that leads.
func (d *Dialer) checkSocket() error {
	if !d.hosts.cached {
		st, errno := stat(here, tlsSocket, d.own.waits)
		if errno == 0 && (st.Mode&unix.S_IFMT == unix.S_IFLNK || deviceOf(&st) != d.hosts.device) {
			return &Error{Problem: MayWait}
		}
		return nil
	}
	for range 2 {
		fd, errno := openat2(here, &tlsSocket[0], &nearDirectory, false)
		switch errno {
		case 0: // a directory, which connect(2) has an error for
			closeRaw(fd)
			return nil
		case unix.ENOTDIR: // it was found, and it is none
			return nil
		case unix.EXDEV:
			return &Error{Problem: MayWait, Errno: errno}
		case unix.EAGAIN:
		default:
			return connectError(".", errno)
		}
		// Now it will be in the cache, unless it is a symlink that leads elsewhere.
		var link [1]byte
		if _, errno := readlink(here, tlsSocket, link[:], d.own.waits); errno != 0 && errno != unix.EINVAL {
			return connectError(".", errno)
		}
	}
	return &Error{Problem: MayWait, Errno: unix.EAGAIN}
}

// markers finds out what the markers say. Which there are is known from the look-up before, if the directory
// has not changed since. The system proves that: it tells when a directory was changed, by a clock that had gone on
// before the markers were looked at. Who owns a marker is no change of the directory.
func (d *Dialer) markers(b *Backend) unix.Errno {
	t := &d.own
	if !t.known {
		sure := t.kept && !t.waits && time.Since(time.Unix(t.changed.Sec, int64(t.changed.Nsec))) > clockTick
		var errno unix.Errno
		if t.marks, errno = d.lookForMarkers(); errno != 0 {
			return errno
		}
		t.known = sure
	}
	b.Proxy = t.marks.proxy
	if t.marks.log {
		st, errno := stat(here, logConnections, t.waits)
		b.Log = errno == 0 && d.hosts.Administrator(st.Uid)
	}
	return 0
}

func (d *Dialer) lookForMarkers() (m marks, errno unix.Errno) {
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

// has tells whether there is something in the working directory.
func (d *Dialer) has(name []byte) (bool, unix.Errno) {
	var link [1]byte
	switch _, errno := readlink(here, name, link[:], d.own.waits); errno {
	case 0, unix.EINVAL:
		return true, 0
	case unix.ENOENT:
		return false, 0
	default:
		return false, errno
	}
}

func isProblem(err error, p Problem) bool {
	e, ok := err.(*Error)
	return ok && e.Problem == p
}
