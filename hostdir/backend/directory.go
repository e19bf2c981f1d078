package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// A directory is that of a host. It stays the same one when its name changes.
type directory struct {
	fd   int
	path string // absolute, as it was
}

// An inode tells a file from all others that there are at the time.
type inode struct{ dev, ino uint64 }

// socketMode is the mode of the socket. It is the directory that keeps others out.
const socketMode = 0o666

// pathMost is the length of the longest path of a socket: a zero follows it in sun_path.
const pathMost = len(unix.RawSockaddrUnix{}.Path) - 1

func openDirectory(path string) (*directory, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	for {
		fd, err := unix.Open(path, openPath|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			return &directory{fd, abs}, nil
		case unix.EINTR:
		default:
			return nil, os.NewSyscallError("open", err)
		}
	}
}

func (d *directory) close() { unix.Close(d.fd) }

// newSocket makes a datagram socket, non-blocking, that programs do not inherit.
func newSocket() (int, error) {
	syscall.ForkLock.RLock()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err == nil {
		if err = unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	prepare(fd)
	return fd, nil
}

// install gives the socket a file in the directory, as a backend's socket. Until all is done, the
// file has another name.
func (d *directory) install(fd int) (own inode, err error) {
	var name string
	for {
		name = temporaryName()
		err = d.reach(name, func(path string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: path}) })
		if err != unix.EADDRINUSE {
			break
		}
	}
	if err != nil {
		return own, bindError(err)
	}
	own, err = d.inode(name)
	if err != nil { // somebody has removed it
		return own, os.NewSyscallError("fstatat", err)
	}
	if err = d.open(name); err == nil {
		err = os.NewSyscallError("renameat", unix.Renameat(d.fd, name, d.fd, socketName))
	}
	if err != nil {
		unix.Unlinkat(d.fd, name, 0)
	}
	return own, err
}

func bindError(err error) error {
	if _, ok := errors.AsType[unix.Errno](err); ok {
		return os.NewSyscallError("bind", err)
	}
	return err
}

// open lets everybody who can enter the directory write to the socket. bind(2) has taken the bits
// of the umask from its mode.
func (d *directory) open(name string) error {
	// Somebody else who may write to the directory could have put a symlink there. Before 6.6 Linux
	// cannot leave that alone.
	if unix.Fchmodat(d.fd, name, socketMode, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return nil
	}
	return os.NewSyscallError("fchmodat", unix.Fchmodat(d.fd, name, socketMode, 0))
}

// inode tells which file has a name in the directory. A symlink is not followed.
func (d *directory) inode(name string) (inode, error) {
	var st unix.Stat_t
	for {
		err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			return inode{uint64(st.Dev), uint64(st.Ino)}, err
		}
	}
}

// remove removes the socket if it is still the own one, and reports whether it is another one.
//
// Another backend can put its socket there at any moment. So remove renames what it has found to be
// the own one, and looks again before it removes that. If it was the other's, remove puts it back:
// better a moment without a socket than none for good.
func (d *directory) remove(own inode) (replaced bool, err error) {
	switch is, err := d.inode(socketName); {
	case err == unix.ENOENT:
		return false, nil
	case err != nil:
		return false, os.NewSyscallError("fstatat", err)
	case is != own:
		return true, nil
	}
	beforeRename()
	name := temporaryName()
	if err := unix.Renameat(d.fd, socketName, d.fd, name); err != nil {
		if err == unix.ENOENT {
			return false, nil
		}
		return false, os.NewSyscallError("renameat", err)
	}
	if is, err := d.inode(name); err == nil && is != own {
		// It does not go over one that is newer still.
		err := unix.Linkat(d.fd, name, d.fd, socketName, 0)
		if err != nil && err != unix.EEXIST { // hard links may be forbidden
			return true, os.NewSyscallError("renameat", unix.Renameat(d.fd, name, d.fd, socketName))
		}
		replaced = true
	}
	return replaced, os.NewSyscallError("unlinkat", unix.Unlinkat(d.fd, name, 0))
}

// beforeRename is for tests.
var beforeRename = func() {}

// reach calls f with a path of something in the directory that fits into the address of a socket.
func (d *directory) reach(name string, f func(path string) error) error {
	for _, way := range ways {
		if ok, err := way(d, name, f); ok {
			return err
		}
	}
	return fmt.Errorf("the path of the socket is too long, %d bytes where the system allows %d: give the directory a shorter name, or a symlink to it",
		len(d.path)+1+len(name), pathMost)
}

// ways are the ways to reach something in a directory. Each reports whether it could call f, and
// what f has returned.
var ways = []func(d *directory, name string, f func(path string) error) (bool, error){
	(*directory).directly, (*directory).throughProc, (*directory).inThread, (*directory).throughLink,
}

// directly uses the directory's own path.
func (d *directory) directly(name string, f func(path string) error) (bool, error) {
	return d.through(d.path, name, f)
}

// throughProc uses the descriptor, on Linux.
func (d *directory) throughProc(name string, f func(path string) error) (bool, error) {
	return d.through(fmt.Sprintf("/proc/self/fd/%d", d.fd), name, f)
}

// throughLink makes a symlink to the directory where temporary files are.
func (d *directory) throughLink(name string, f func(path string) error) (bool, error) {
	dir, err := os.MkdirTemp("", "backend")
	if err != nil {
		return false, err
	}
	link := filepath.Join(dir, "d")
	defer os.Remove(dir)
	if err := os.Symlink(d.path, link); err != nil {
		return false, err
	}
	defer os.Remove(link)
	return d.through(link, name, f)
}

// through uses a path that may be one of the directory.
func (d *directory) through(dir, name string, f func(path string) error) (bool, error) {
	path := dir + "/" + name
	if len(path) > pathMost {
		return false, nil
	}
	var is, want unix.Stat_t
	if unix.Stat(dir, &is) != nil || unix.Fstat(d.fd, &want) != nil || is.Dev != want.Dev || is.Ino != want.Ino {
		return false, nil // it was renamed, or there is no such thing here
	}
	return true, f(path)
}
