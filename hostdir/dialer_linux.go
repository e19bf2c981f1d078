package hostdir

import (
	"bytes"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Dialer connects to backends, as [Dial] does, from a thread that has a working directory
// of its own. It makes each host's directory the working directory of that thread, so all
// that is looked up is of one directory, whatever takes its place meanwhile, and the path of
// the socket is short: a name of any length fits.
type Dialer struct {
	own    bool // the thread has a working directory of its own
	away   bool // it is that of a host
	hosts  int  // the hosts directory
	cached bool // the system can tell whether a look-up may wait
	local  bool // the hosts directory is in memory, or on a disk: nothing else keeps waiting there
	waits  bool // the look-up that is made may wait for more than that
	device device

	// The directory that the last look-up was made in. It stays open until there is another:
	// the next client often comes for the same host.
	dir   atomic.Int32 // 0 if none is open
	entry []byte       // that it is, with a zero; empty if it cannot be told again by its name
	inode inode        // its own, once that was needed

	// Distrusted, if not nil, are the owners of directories for which DialNow leaves the
	// look-up to Dial.
	Distrusted *Owners
}

// Owners is a set of users.
type Owners struct {
	some  atomic.Bool
	mu    sync.Mutex
	until map[uint32]time.Time
}

// Add adds a user, by number, for a time.
func (o *Owners) Add(uid uint32, d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.until == nil {
		o.until = map[uint32]time.Time{}
	}
	o.until[uid] = time.Now().Add(d)
	o.some.Store(true)
}

// has tells whether the owner of a directory is in the set.
func (o *Owners) has(dir uintptr) bool {
	if o == nil || !o.some.Load() {
		return false
	}
	st, errno := stat(dir, empty, false)
	if errno != 0 {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if until, ok := o.until[st.Uid]; !ok || time.Now().Before(until) {
		return ok
	}
	delete(o.until, st.Uid)
	o.some.Store(len(o.until) > 0)
	return false
}

// Owner returns the owner of the directory that the look-up is made in, or the last one was. It is
// for other goroutines, when one takes long.
func (d *Dialer) Owner() (uid uint32, ok bool) {
	dir := d.dir.Load()
	if dir == 0 {
		return 0, false
	}
	st, errno := stat(uintptr(dir), empty, false)
	return st.Uid, errno == 0
}

// A device is what a file system is on. Its major number is 0 unless it is on a block device.
type device struct{ major, minor uint32 }

// An inode tells a directory that is open from all others.
type inode struct {
	device device
	number uint64
}

// NewDialer returns a Dialer for the calling goroutine, which must be locked to its thread
// for good and be the only one to use it. What it takes to have a working directory for the
// thread, unshare(2) with CLONE_FS, needs no privilege; where it is forbidden all the same,
// the Dialer does what the function [Dial] does.
func NewDialer() *Dialer {
	d := &Dialer{}
	hosts, err := unix.Open(".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return d
	}
	if unix.Unshare(unix.CLONE_FS) != nil {
		unix.Close(hosts)
		return d
	}
	d.own, d.hosts = true, hosts
	// Linux has openat2(2) since 5.6, RESOLVE_CACHED since 5.12.
	fd, errno := openat2(uintptr(hosts), &dot[0], &cachedDirectory, false)
	if errno == 0 {
		closeRaw(fd)
		d.device, errno = deviceOf(uintptr(hosts))
	}
	d.cached = errno == 0
	d.local = d.device.major != 0 || inMemory(hosts)
	return d
}

// Close closes what the Dialer has open. The thread is of no use for anything else.
func (d *Dialer) Close() {
	if d.own {
		d.Release()
		unix.Close(d.hosts)
	}
}

// inMemory tells whether a directory is on a file system that is nowhere but in memory.
func inMemory(dir int) bool {
	var fs unix.Statfs_t
	err := unix.Fstatfs(dir, &fs)
	return err == nil && (uint32(fs.Type) == unix.TMPFS_MAGIC || uint32(fs.Type) == unix.RAMFS_MAGIC)
}

// What there is in a host's directory, as system calls want it.
var (
	tlsSocket      = []byte("tls-socket\x00")
	sendProxyV2    = []byte("send-proxy-v2\x00")
	sendProxyV1    = []byte("send-proxy-v1\x00")
	logConnections = []byte("log-connections\x00")
	dot            = []byte(".\x00")
	empty          = []byte("\x00")

	tlsSocketAddr = struct {
		family uint16
		path   [len("tls-socket\x00")]byte
	}{unix.AF_UNIX, [len("tls-socket\x00")]byte(tlsSocket)}
)

// here is AT_FDCWD, the working directory, in place of a descriptor.
const here = ^uintptr(-unix.AT_FDCWD - 1)

// resolveCached is RESOLVE_CACHED of openat2(2), which package unix does not have.
const resolveCached = 0x20

// Ways to open what is at a path.
var (
	// A directory that is in the hosts directory itself.
	ownDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_XDEV,
	}
	// One that a symlink or a mount leads to, without waiting.
	cachedDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached,
	}
	// One that is on the same mount as what it is in, without waiting.
	nearDirectory = unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: resolveCached | unix.RESOLVE_NO_XDEV,
	}
)

// Dial is like the function [Dial].
func (d *Dialer) Dial(name []byte) (fd int, marks Marks, err error) {
	if !d.own {
		return Dial(name)
	}
	return d.dial(name, false)
}

// DialNow is like Dial, but waits for no file system except that of the hosts directory. If
// the host is elsewhere, by a symlink or a mount, and it cannot be told beforehand that
// looking it up takes no time, the problem is [MayWait], and Dial can be used by a thread that
// has the time. A tenant's file system (FUSE, NFS) may never answer.
//
// Where the system cannot tell such file systems it does what Dial does. And there is a moment
// between looking and connecting at which who may write to the directory can exchange the
// socket for a symlink: then it waits all the same.
func (d *Dialer) DialNow(name []byte) (fd int, marks Marks, err error) {
	if !d.own {
		return Dial(name)
	}
	return d.dial(name, d.cached)
}

func (d *Dialer) dial(name []byte, now bool) (fd int, marks Marks, err error) {
	var buf [MaxName + 1]byte
	var t trial
	fd = -1
	for err = errAbsent; t.next(err); {
		if entry := t.entry(buf[:0], name); entry != nil {
			fd, marks, err = d.dialEntry(append(entry, 0), t.general(), now)
		}
	}
	if e, ok := err.(*Error); ok && e.Problem == NoRoom {
		d.Release() // that may be the descriptor that there is no room for
	}
	return fd, marks, t.outcome(err)
}

func (d *Dialer) dialEntry(entry []byte, general, now bool) (fd int, marks Marks, err error) {
	if err := d.enter(entry, general, now); err != nil {
		return -1, Marks{}, err
	}
	if now {
		if err := d.checkSocket(); err != nil {
			return -1, Marks{}, err
		}
	}
	s, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1, Marks{}, socketError(errno)
	}
	errno = connect(s)
	if errno != 0 {
		closeRaw(s)
		return -1, Marks{}, connectError(".", errno)
	}
	marks, errno = d.marks()
	if errno != 0 {
		closeRaw(s)
		return -1, Marks{}, &Error{Problem: Other, Errno: errno}
	}
	return int(s), marks, nil
}

// marks looks for the markers.
func (d *Dialer) marks() (m Marks, errno unix.Errno) {
	there, errno := d.has(sendProxyV2)
	if there {
		m.Proxy = 2
	} else if errno == 0 {
		if there, errno = d.has(sendProxyV1); there {
			m.Proxy = 1
		}
	}
	if errno == 0 {
		if there, errno = d.has(logConnections); there {
			st, errno := stat(here, logConnections, d.waits)
			m.Log = errno == 0 && d.administrators(st.Uid)
		}
	}
	return m, errno
}

// LogAll is like the function [LogAll].
func (d *Dialer) LogAll() bool {
	if !d.own {
		return LogAll()
	}
	var buf [MaxName + 1]byte
	star := AppendName(buf[:0], []byte{'*'})
	st, errno := stat(uintptr(d.hosts), append(star, 0), !d.local)
	if errno != 0 || !d.administrators(st.Uid) {
		return false
	}
	fd, errno := openat(uintptr(d.hosts), &buf[0], unix.O_DIRECTORY)
	if errno != 0 {
		return false
	}
	defer closeRaw(fd)
	st, errno = stat(fd, logConnections, true)
	return errno == 0 && d.administrators(st.Uid)
}

// administrators is like the function of that name.
func (d *Dialer) administrators(uid uint32) bool {
	if uid == 0 {
		return true
	}
	st, errno := stat(uintptr(d.hosts), empty, false)
	return errno == 0 && uid == st.Uid
}

// enter makes a host's directory the working directory, if it is not that already.
func (d *Dialer) enter(entry []byte, general, now bool) error {
	d.waits = !now || !d.local
	if !now || general || !d.isIn(entry) {
		if err := d.change(entry, general, now); err != nil {
			return err
		}
	}
	if now && d.Distrusted.has(here) {
		return &Error{Problem: MayWait}
	}
	return nil
}

// isIn tells whether an entry is the directory that is open. No other one can have the number of
// its inode meanwhile.
func (d *Dialer) isIn(entry []byte) bool {
	if !bytes.Equal(entry, d.entry) {
		return false
	}
	var errno unix.Errno
	if d.inode == (inode{}) {
		if d.inode, errno = inodeOf(here, empty, false); errno != 0 {
			return false
		}
	}
	is, errno := inodeOf(uintptr(d.hosts), entry, d.waits)
	return errno == 0 && is == d.inode
}

// change opens a host's directory, in place of the one that is open, and makes it the working
// directory.
func (d *Dialer) change(entry []byte, general, now bool) error {
	d.Release()
	dir, err := d.open(entry, general, now)
	if err != nil {
		return err
	}
	d.dir.Store(int32(dir))
	d.waits = d.waits || len(d.entry) == 0
	if errno := fchdir(dir, d.waits); errno != 0 {
		d.Release()
		return enterError(errno)
	}
	d.away = true
	return nil
}

// Release closes the descriptor that is kept open for the next look-up, and reports whether there was
// one.
func (d *Dialer) Release() bool {
	dir := d.dir.Swap(0)
	if dir != 0 {
		closeRaw(uintptr(dir)) // it is still the working directory
	}
	d.entry, d.inode = d.entry[:0], inode{}
	return dir != 0
}

// open opens a host's directory. If it is a general one, it must be the administrator's: the entry
// is opened before its owner is asked for, so it does not matter what takes its place meanwhile.
func (d *Dialer) open(entry []byte, general, now bool) (uintptr, error) {
	hosts := uintptr(d.hosts)
	if !general {
		return d.openAny(entry, now)
	}
	fd, errno := openat(hosts, &entry[0], unix.O_NOFOLLOW)
	if errno == unix.ENOENT {
		return 0, errAbsent
	}
	if errno != 0 {
		return 0, enterError(errno)
	}
	st, errno := stat(fd, empty, false)
	if errno == 0 && d.administrators(st.Uid) && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fd, d.mayWait(fd, now)
	}
	defer closeRaw(fd)
	switch {
	case errno != 0:
		return 0, enterError(errno)
	case !d.administrators(st.Uid):
		return 0, errIgnored
	}
	// Of what is no symlink, readlink(2) says ENOENT.
	var target [unix.PathMax]byte
	n, errno := readlink(fd, empty, target[:], true)
	if errno != 0 || n == len(target) {
		return 0, enterError(unix.ENOTDIR)
	}
	if now {
		return d.openCached(target[:n+1])
	}
	to, errno := openat(hosts, &target[0], unix.O_DIRECTORY)
	return to, enterError(errno)
}

func (d *Dialer) openAny(entry []byte, now bool) (uintptr, error) {
	hosts, dir := uintptr(d.hosts), &entry[0]
	if !now {
		fd, errno := openat(hosts, dir, unix.O_DIRECTORY)
		if errno == unix.ENOENT {
			if _, errno := stat(hosts, entry, true); errno == unix.ENOENT {
				return 0, errAbsent
			}
		}
		return fd, enterError(errno)
	}
	fd, errno := openat2(hosts, dir, &ownDirectory, d.waits)
	switch errno {
	case 0:
		d.entry = append(d.entry, entry...)
	case unix.ENOENT:
		return 0, errAbsent
	case unix.ENOTDIR, unix.EXDEV: // a symlink, or a mount
		return d.openCached(entry)
	}
	return fd, enterError(errno)
}

// openCached opens a directory that a symlink or a mount leads to, without waiting.
func (d *Dialer) openCached(path []byte) (uintptr, error) {
	fd, errno := openat2(uintptr(d.hosts), &path[0], &cachedDirectory, false)
	if errno != 0 {
		return fd, enterError(errno)
	}
	return fd, d.mayWait(fd, true)
}

// mayWait closes the directory if entering it may wait and must not, as it may if the file
// system has a permission check of its own. Those on block devices have none.
func (d *Dialer) mayWait(fd uintptr, now bool) error {
	if !now {
		return nil
	}
	if on, errno := deviceOf(fd); errno != 0 || on.major == 0 && on != d.device {
		closeRaw(fd)
		return &Error{Problem: MayWait}
	}
	return nil
}

// checkSocket sees to it that connecting to tls-socket does not wait, wherever that leads.
func (d *Dialer) checkSocket() error {
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
		case unix.EMFILE, unix.ENFILE:
			return socketError(errno)
		case unix.EAGAIN:
		default:
			return connectError(".", errno)
		}
		// Now it will be in the cache, unless it is a symlink that leads elsewhere.
		var link [1]byte
		if _, errno := readlink(here, tlsSocket, link[:], d.waits); errno != 0 && errno != unix.EINVAL {
			return connectError(".", errno)
		}
	}
	return &Error{Problem: MayWait, Errno: unix.EAGAIN}
}

// The scheduler is told of system calls that may wait for a file system: a thread that waits without
// its knowledge keeps others from running. That is dear, most of all because its monitor then looks
// after the thread, so it is not told of those that wait for a local disk at most. A call that waits
// can be interrupted, by a signal of the scheduler's, and is made again.

// connect connects a socket to the tls-socket in the working directory.
func connect(fd uintptr) unix.Errno {
	for {
		_, _, errno := syscall.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&tlsSocketAddr)), unsafe.Sizeof(tlsSocketAddr))
		if errno != unix.EINTR {
			return errno
		}
	}
}

// readlink is the shortest way to ask whether there is something in a directory, without
// following a symlink: of what exists and is none, readlink(2) says EINVAL.
func readlink(dir uintptr, name, link []byte, waits bool) (int, unix.Errno) {
	if !waits {
		n, _, errno := syscall.RawSyscall6(unix.SYS_READLINKAT, dir, uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&link[0])), uintptr(len(link)), 0, 0)
		return int(n), errno
	}
	for {
		n, _, errno := syscall.Syscall6(unix.SYS_READLINKAT, dir, uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&link[0])), uintptr(len(link)), 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// has tells whether there is something in the working directory.
func (d *Dialer) has(name []byte) (bool, unix.Errno) {
	var link [1]byte
	switch _, errno := readlink(here, name, link[:], d.waits); errno {
	case 0, unix.EINVAL:
		return true, 0
	case unix.ENOENT:
		return false, 0
	default:
		return false, errno
	}
}

// openat opens a directory, as a place to look things up in, or an entry of one.
func openat(dir uintptr, path *byte, flags uintptr) (uintptr, unix.Errno) {
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT, dir, uintptr(unsafe.Pointer(path)), unix.O_PATH|unix.O_CLOEXEC|flags, 0, 0, 0)
		if errno != unix.EINTR {
			return fd, errno
		}
	}
}

func fchdir(fd uintptr, waits bool) unix.Errno {
	if !waits {
		_, _, errno := syscall.RawSyscall(unix.SYS_FCHDIR, fd, 0, 0)
		return errno
	}
	for {
		_, _, errno := syscall.Syscall(unix.SYS_FCHDIR, fd, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

func openat2(dir uintptr, path *byte, how *unix.OpenHow, waits bool) (uintptr, unix.Errno) {
	if !waits {
		fd, _, errno := syscall.RawSyscall6(unix.SYS_OPENAT2, dir, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(how)), unsafe.Sizeof(*how), 0, 0)
		return fd, errno
	}
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT2, dir, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(how)), unsafe.Sizeof(*how), 0, 0)
		if errno != unix.EINTR {
			return fd, errno
		}
	}
}

func deviceOf(fd uintptr) (device, unix.Errno) {
	i, errno := inodeOf(fd, empty, false)
	return i.device, errno
}

func inodeOf(dir uintptr, name []byte, waits bool) (inode, unix.Errno) {
	st, errno := stat(dir, name, waits)
	return inode{device{st.Dev_major, st.Dev_minor}, st.Ino}, errno
}

// stat tells about something in a directory, or about that itself if name is empty. It follows no
// symlink, and takes what the system knows already of what is there; but to find it may have to wait.
func stat(dir uintptr, name []byte, waits bool) (st unix.Statx_t, errno unix.Errno) {
	const flags = unix.AT_EMPTY_PATH | unix.AT_SYMLINK_NOFOLLOW | unix.AT_STATX_DONT_SYNC
	const mask = unix.STATX_TYPE | unix.STATX_UID | unix.STATX_INO
	if !waits {
		_, _, errno = syscall.RawSyscall6(unix.SYS_STATX, dir, uintptr(unsafe.Pointer(&name[0])), flags, mask, uintptr(unsafe.Pointer(&st)), 0)
		return st, errno
	}
	_, _, errno = syscall.Syscall6(unix.SYS_STATX, dir, uintptr(unsafe.Pointer(&name[0])), flags, mask, uintptr(unsafe.Pointer(&st)), 0)
	return st, errno
}

// Leave makes the hosts directory the working directory again. That of a host, if it is used
// for long, keeps what it is on from being unmounted.
func (d *Dialer) Leave() {
	if d.away {
		d.Release()
		d.away = unix.Fchdir(d.hosts) != nil
	}
}

func enterError(errno unix.Errno) error {
	switch errno {
	case 0:
		return nil
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG:
		// The last two come from a symlink.
		return &Error{Problem: NoDirectory, Errno: errno}
	case unix.EACCES, unix.EPERM:
		return &Error{Problem: NotPermitted, Errno: errno}
	case unix.EAGAIN:
		return &Error{Problem: MayWait, Errno: errno}
	}
	return socketError(errno)
}

func closeRaw(fd uintptr) { syscall.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }
