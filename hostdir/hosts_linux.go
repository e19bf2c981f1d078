package hostdir

import (
	"bytes"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// A directory is the hosts directory as Linux opens it, and what the kernel offers for it.
type directory struct {
	fd     uintptr
	device device
	cached bool // openat2(2) has RESOLVE_CACHED: the kernel can tell whether a look-up may wait
	local  bool // the hosts directory is in memory or on a disk: it keeps nobody waiting for long
	dated  bool // its file system dates changes by this machine's clock: see [Dialer.whatIsSeenLasts]
}

// A device is what a file system is on. Its major number is 0 unless it is a block device.
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

// at returns the directory for system calls that take one: threads have other working directories.
func (h *Hosts) at() int { return int(h.fd) }

// probe finds out what the kernel offers.
func (h *Hosts) probe() (err error) {
	if h.overflow, err = overflowUID(); err != nil {
		return err
	}
	st, errno := stat(h.fd, empty, true)
	if errno != 0 {
		return errno
	}
	h.device = deviceOf(&st)
	kind := fileSystem(h.fd)
	h.local = h.device.major != 0 || kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC
	// Others on block devices may be those of a cluster, or a FUSE.
	h.dated = h.local && slices.Contains([]uint32{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.RAMFS_MAGIC}, kind)
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
	onOwnThread(func() { h.paths = unix.Unshare(unix.CLONE_FS) })
	return nil
}

// overflowUID returns the user as which the kernel shows those that it has no number for.
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
	uid, err := strconv.ParseUint(string(bytes.TrimSpace(text[:max(n, 0)])), 10, 32)
	if err != nil {
		return nobody, nil
	}
	return uint32(uid), nil
}

// fileSystem returns the kind of file system that something open is on, 0 if that is not known.
func fileSystem(fd uintptr) uint32 {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(fd), &fs); err != nil {
		return 0
	}
	return uint32(fs.Type)
}

// onOwnThread calls do on a thread that ends afterwards. That is never the main thread, which would
// not end with its goroutine.
func onOwnThread(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(do)
			runtime.UnlockOSThread()
			return
		}
		do()
	}()
	<-done
}

// askOwner asks for the owner of the hosts directory.
func (h *Hosts) askOwner() (uint32, error) {
	st, errno := stat(h.fd, empty, false)
	if errno != 0 {
		return 0, errno
	}
	h.shared.Store(mayLock(uint32(st.Mode)))
	return st.Uid, nil
}

// mayLock reports whether others than its owner can change a directory with a mode. (An ACL shows
// in the bits of the group.) Who may read a directory, and change it, can keep it locked for ever;
// then a look for a name that the kernel does not know waits.
func mayLock(mode uint32) bool { return mode&0o022 != 0 }

// asks reports whether to ask the kernel what it knows before a look for an entry, if that must not
// wait: somebody who may change the hosts directory can keep it locked. Before Linux 5.12 the
// kernel cannot tell.
func (h *Hosts) asks(wait bool) bool { return !wait && h.shared.Load() && h.cached }

// mayWait reports whether to look for an entry, whose name ends in a zero, may wait for as long as
// somebody likes.
func (h *Hosts) mayWait(entry []byte) bool {
	if !h.asks(false) {
		return false
	}
	fd, errno := openat2(h.fd, &entry[0], &cachedEntry, true)
	switch errno {
	case 0:
		closeRaw(fd)
		return false
	case unix.ENOENT, unix.ENAMETOOLONG:
		return false
	}
	return true
}

// lstat tells about an entry of the hosts directory, whose name ends in a zero.
func (h *Hosts) lstat(entry []byte, wait bool) (status, error) {
	is, err := h.look(entry, wait || !h.local || h.shared.Load())
	if err != nil || !is.unsure || !wait {
		return is, err
	}
	fd, errno := openat(h.fd, &entry[0], unix.O_NOFOLLOW)
	if errno != 0 {
		return status{}, errno
	}
	defer closeRaw(fd)
	return h.fstat(fd, true)
}

// look tells about an entry as far as the kernel knows it.
func (h *Hosts) look(entry []byte, slow bool) (status, error) {
	st, errno := stat(h.fd, entry, slow)
	if errno != 0 {
		return status{}, errno
	}
	return h.status(&st), nil
}

// fstat tells about an entry that is open. If there is time to wait, the file system itself says
// whether it is a FUSE, which may lie about the owner; other file systems are believed.
func (h *Hosts) fstat(fd uintptr, wait bool) (status, error) {
	st, errno := stat(fd, empty, wait)
	if errno != 0 {
		return status{}, errno
	}
	is := h.status(&st)
	if is.unsure && wait {
		is.unsure = false
		if kind := fileSystem(fd); kind != 0 && kind != unix.FUSE_SUPER_MAGIC {
			is.owner = st.Uid
		}
	}
	return is, nil
}

// status is what the kernel tells about an entry, as far as that can be believed. A user may mount
// a FUSE on his directory (fusermount), and it can say that it belongs to root. A FUSE that he can
// mount is on no block device.
func (h *Hosts) status(st *unix.Statx_t) status {
	is := status{owner: st.Uid, kind: uint32(st.Mode) & unix.S_IFMT, shared: mayLock(uint32(st.Mode))}
	on := deviceOf(st)
	mounted := st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 || st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0
	if mounted && on.major == 0 && on != h.device {
		is.owner, is.unsure = nobody, true
	}
	return is
}

func deviceOf(st *unix.Statx_t) device { return device{st.Dev_major, st.Dev_minor} }

func inodeOf(st *unix.Statx_t) inode { return inode{deviceOf(st), st.Ino} }

// socket returns a socket to which no backend can pass descriptors, if the kernel can refuse them.
// If not, a backend must at least not choose when the kernel drops them: it drops what came with an
// out-of-band byte as soon as reading passes over that byte, so such bytes are read like all
// others.
func (h *Hosts) socket(deaf bool) (fd int, err error) {
	s, errno := socket()
	if errno != 0 {
		return -1, errno
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
		return -1, errno
	}
	return int(s), nil
}

// NewDatagram returns a datagram socket for [Dialer.ConnectDatagram], non-blocking and
// close-on-exec.
func NewDatagram() (int, error) {
	return unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

// connect connects a socket, which is deaf already if it is to be, to a path.
func connect(fd int, path string, _ bool) error {
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}
