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
	"time"

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
	Exchanged                        // another directory took the place of the host's meanwhile
	MayWait                          // finding out may take time: see [Dialer.DialNow]
	Other                            // something else: see Errno
)

var problems = [...]string{
	NoDirectory:   "no directory",
	NoSocket:      "no tls-socket in the directory",
	NotPermitted:  "permission denied",
	NobodyListens: "nobody listens on tls-socket",
	NotStream:     "tls-socket is not a stream socket",
	PathTooLong:   "the path of tls-socket is too long for a socket address, use hashed names",
	BacklogFull:   "the backlog of tls-socket is full",
	NoRoom:        "no descriptor is left to connect to tls-socket with",
	Exchanged:     "the directory was exchanged",
	MayWait:       "the directory leads to another file system",
	Other:         "cannot connect to tls-socket",
}

// An Error is what [Dial] fails with.
type Error struct {
	Problem Problem
	Errno   unix.Errno // what the system said, 0 if it was not asked
}

func (e *Error) Error() string {
	text := problems[e.Problem]
	switch e.Problem {
	case NotPermitted:
		text = fmt.Sprintf("%s for uid %d", text, unix.Geteuid())
	case Other:
		text = fmt.Sprintf("%s: %v", text, e.Errno)
	}
	return text
}

func (e *Error) Unwrap() error { return e.Errno }

// Dial connects to the backend of the host with the canonical name. It returns a
// descriptor, which is non-blocking, closed on exec and the caller's to close, and
// whether the host has the marker send-proxy-v1. The error is of type [*Error].
//
// Socket and marker are of one directory, also when another one takes its place
// meanwhile, as when a symlink is switched.
//
// Dial does not wait for a backend whose backlog is full: the problem then is
// [BacklogFull], and the caller may try again. But it waits for the file systems that the
// path leads to.
func Dial(name []byte) (fd int, proxyV1 bool, err error) {
	for {
		fd, err = Socket()
		if err != nil {
			return -1, false, err
		}
		proxyV1, err = Connect(fd, name)
		if err == nil {
			return fd, proxyV1, nil
		}
		unix.Close(fd)
		if e, ok := err.(*Error); !ok || e.Problem != Exchanged {
			return -1, false, err
		}
		time.Sleep(time.Millisecond)
	}
}

// Socket returns a socket for [Connect], which is the one descriptor that [Dial] takes. It is
// non-blocking, closed on exec and the caller's to close. The error is of type [*Error].
func Socket() (fd int, err error) {
	fd, err = socket()
	if err != nil {
		return -1, socketError(err)
	}
	return fd, nil
}

// Connect is what remains of [Dial] when there is a socket. After an error, which is of type
// [*Error], the socket can only be closed. The problem [Exchanged], which Dial does not have,
// calls for another attempt.
func Connect(fd int, name []byte) (proxyV1 bool, err error) {
	dir := string(AppendName(make([]byte, 0, MaxName), name))
	// The two look-ups may find two directories, and the marker of the wrong one is worse
	// than none.
	before := identify(dir)
	if before.recent() {
		return false, &Error{Problem: Exchanged}
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}); err != nil {
		return false, connectError(dir, err)
	}
	proxyV1, err = exists(dir + "/send-proxy-v1")
	if err != nil {
		return false, err
	}
	if identify(dir) != before {
		return false, &Error{Problem: Exchanged}
	}
	return proxyV1, nil
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

// clockTick is more than the time between two steps of the clock by which file systems tell
// when something was changed.
const clockTick = 20 * time.Millisecond

// recent tells whether a symlink was switched so lately that after another switch, and one back,
// the time may still be the same, and the number too, since numbers are used again.
func (id identity) recent() bool {
	ago := time.Since(time.Unix(id.linkChanged.Unix()))
	return ago.Abs() < clockTick
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
