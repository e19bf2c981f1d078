// Package hostdir finds the backend of a host in the hosts directory, which is the
// working directory of the process, and connects to it.
//
// A host is a directory in it. The directory has the canonical name of the host or,
// with the build tag hashed, a hash of that name. In it are:
//
//	tls-socket     a Unix stream socket that the backend listens on
//	send-proxy-v1  if this exists, connections begin with a PROXY protocol header
//
// Everything is looked up anew for each connection; nothing is cached. Symlinks are
// followed wherever they lead: what may be reached is a matter of permissions.
package hostdir

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A Problem is why a host cannot be connected to.
type Problem uint8

// The problems that [Dial] tells apart.
const (
	NoDirectory   Problem = iota + 1 // the host has no directory
	NoSocket                         // there is no tls-socket in it
	NotPermitted                     // the directory or the socket is closed to this process
	NobodyListens                    // the socket is there, and nobody listens on it
	NotStream                        // tls-socket is something else than a stream socket
	PathTooLong                      // the name does not fit into the address of a socket
	BacklogFull                      // the backend has as many connections waiting as it allows
	NoRoom                           // no descriptor is left for the socket
	Other                            // something else: see Errno
)

var problems = [...]string{
	NoDirectory:   "no directory",
	NoSocket:      "no tls-socket in the directory",
	NotPermitted:  "no permission to connect to tls-socket",
	NobodyListens: "nobody listens on tls-socket",
	NotStream:     "tls-socket is not a stream socket",
	PathTooLong:   "the path of tls-socket is too long for a socket address, use hashed names",
	BacklogFull:   "the backlog of tls-socket is full",
	NoRoom:        "no descriptor is left to connect to tls-socket with",
	Other:         "cannot connect to tls-socket",
}

// An Error is what [Dial] fails with.
type Error struct {
	Problem Problem
	Errno   unix.Errno // what the system said
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %v", problems[e.Problem], e.Errno) }

func (e *Error) Unwrap() error { return e.Errno }

// Dial connects to the backend of the host with the canonical name. It returns a
// descriptor, which is non-blocking, closed on exec and the caller's to close, and
// whether the host has the marker send-proxy-v1. The error is of type [*Error].
//
// Socket and marker are of one directory, also when another one takes its place
// meanwhile, as when a symlink is switched.
//
// Dial does not wait for a backend whose backlog is full: the problem then is
// [BacklogFull], and the caller may try again.
func Dial(name []byte) (fd int, proxyV1 bool, err error) {
	dir := string(AppendName(make([]byte, 0, MaxName), name))
	for {
		// The two look-ups may find two directories, and the marker of the wrong one
		// is worse than none.
		before := identify(dir)
		fd, proxyV1, err = dial(dir)
		if err != nil || identify(dir) == before {
			return fd, proxyV1, err
		}
		unix.Close(fd)
	}
}

func dial(dir string) (fd int, proxyV1 bool, err error) {
	fd, err = socket()
	if err != nil {
		return -1, false, socketError(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}); err != nil {
		unix.Close(fd)
		return -1, false, connectError(dir, err)
	}
	proxyV1, err = exists(dir + "/send-proxy-v1")
	if err != nil {
		unix.Close(fd)
		return -1, false, err
	}
	return fd, proxyV1, nil
}

// An identity tells what is at a path, a directory or a symlink that leads to one, from
// all that was or will be there.
type identity struct {
	dirDev, dirIno   uint64
	linkDev, linkIno uint64
	linkChanged      unix.Timespec // a symlink may be switched, and switched back
}

func identify(path string) (id identity) {
	var dir, link unix.Stat_t
	if unix.Stat(path, &dir) == nil && unix.Lstat(path, &link) == nil {
		id = identity{uint64(dir.Dev), uint64(dir.Ino), uint64(link.Dev), uint64(link.Ino), unix.Timespec{}}
		if link.Mode&unix.S_IFMT == unix.S_IFLNK {
			id.linkChanged = link.Ctim
		}
	}
	return id
}

// exists tells whether there is anything at a path. A symlink there counts as it is;
// sniproxy-rs follows it.
func exists(path string) (bool, error) {
	var st unix.Stat_t
	switch err := unix.Fstatat(unix.AT_FDCWD, path, &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case nil:
		return true, nil
	case unix.ENOENT, unix.ENOTDIR: // the directory itself may be gone by now
		return false, nil
	case unix.EACCES: // or may have been closed to us
		return false, &Error{NotPermitted, unix.EACCES}
	default:
		return false, &Error{Other, errno(err)}
	}
}

func socketError(err error) error {
	switch err {
	case unix.EMFILE, unix.ENFILE:
		return &Error{NoRoom, errno(err)}
	}
	return &Error{Other, errno(err)}
}

// connectError finds out what is the matter with dir, or with its tls-socket, that
// connect(2) failed with err.
func connectError(dir string, err error) error {
	problem := Other
	var st unix.Stat_t
	switch err {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		// ELOOP is a tenant's symlink that leads nowhere. For sniproxy-rs this, ENOTDIR,
		// EPROTOTYPE and EINVAL are failures of its own (alert 80), not of the host.
		problem = NoSocket
		if unix.Stat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			problem = NoDirectory
		}
	case unix.EACCES, unix.EPERM:
		problem = NotPermitted
	case unix.ECONNREFUSED, unix.ENOTSOCK:
		// Linux says ECONNREFUSED of what is no socket as well.
		problem = NobodyListens
		if unix.Stat(dir+"/tls-socket", &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
			problem = NotStream
		}
	case unix.EPROTOTYPE:
		problem = NotStream
	case unix.EINVAL, unix.ENAMETOOLONG:
		// The dialled path is too long for sun_path. ENAMETOOLONG may also be said of
		// a symlink on the way, which is no different for the client.
		problem = PathTooLong
	case unix.EAGAIN:
		problem = BacklogFull
	}
	return &Error{problem, errno(err)}
}

// errno returns the number behind an error of package unix.
func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}
