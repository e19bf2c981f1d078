// Package hostdir finds the backend of a host in the hosts directory, which is the
// working directory of the process, and connects to it.
//
// A host is a directory in it. The directory has the canonical name of the host or,
// with the build tag hashed, a hash of that name. In it are:
//
//	tls-socket       a Unix stream socket that the backend listens on
//	send-proxy-v2    if this exists, connections begin with a PROXY protocol header of version 2
//	send-proxy-v1    the same of version 1, if there is no send-proxy-v2
//	log-connections  if this exists, and is the administrator's, connections are logged
//
// If there is nothing with the name of a host, the directory *.REST counts, where REST is the
// name without its first label; and if there is nothing with that name either, the directory *,
// which also serves clients that name no host. But only the administrator can speak for others:
// an entry *.REST or * counts only if it belongs to root or to the owner of the hosts directory;
// what a symlink leads to may be anybody's. What is there and cannot serve has no substitute.
//
// Everything is looked up anew for each connection; nothing is cached. Symlinks are
// followed wherever they lead: what may be reached is a matter of permissions.
package hostdir

import (
	"bytes"
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

	absent  // there is nothing with that name
	ignored // what there is must not speak for others
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

	// For NoDirectory: there is a wildcard for the name, or a directory *, that does not
	// count, since it is not the administrator's.
	Ignored bool
}

func (e *Error) Error() string {
	text := problems[e.Problem]
	switch e.Problem {
	case NotPermitted:
		text = fmt.Sprintf("%s for uid %d", text, unix.Geteuid())
	case Other:
		text = fmt.Sprintf("%s: %v", text, e.Errno)
	}
	if e.Ignored {
		text += ", and the wildcard for it belongs neither to root nor to the owner of the hosts directory"
	}
	return text
}

func (e *Error) Unwrap() error { return e.Errno }

// Marks is what the markers in a host's directory say.
type Marks struct {
	Proxy uint8 // the version of the PROXY protocol that connections begin with, 0 for none
	Log   bool  // connections are logged
}

// Dial connects to the backend of the host with the canonical name, or of that for clients
// that name none, if name is empty. It returns a descriptor, which is non-blocking, closed on
// exec and the caller's to close, and what the markers say. The error is of type [*Error].
//
// Socket and markers are of one directory, also when another one takes its place
// meanwhile, as when a symlink is switched.
//
// Dial does not wait for a backend whose backlog is full: the problem then is
// [BacklogFull], and the caller may try again. But it waits for the file systems that the
// path leads to.
func Dial(name []byte) (fd int, marks Marks, err error) {
	for {
		fd, err = Socket()
		if err != nil {
			return -1, Marks{}, err
		}
		marks, err = Connect(fd, name)
		if err == nil {
			return fd, marks, nil
		}
		unix.Close(fd)
		if err.(*Error).Problem != Exchanged {
			return -1, Marks{}, err
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
func Connect(fd int, name []byte) (marks Marks, err error) {
	var buf [MaxName]byte
	var t trial
	for err = errAbsent; t.next(err); {
		if entry := t.entry(buf[:0], name); entry != nil {
			marks, err = connectTo(fd, string(entry), t.general())
		}
	}
	return marks, t.outcome(err)
}

// A trial goes through the entries of the hosts directory that can serve a host, until there is
// one that counts. It is for loops such as that of Connect.
type trial struct {
	step    int
	ignored bool // there was one that does not count
}

// next goes on to the next entry, if the last one, which gave err, is not the answer. Before the
// first err is errAbsent.
func (t *trial) next(err error) bool {
	t.ignored = t.ignored || err == errIgnored
	if err != errAbsent && err != errIgnored {
		return false
	}
	t.step++
	return t.step <= 3
}

// entry appends the name of the entry to dst. It returns nil if the name of the host allows none.
func (t *trial) entry(dst, name []byte) []byte {
	var star [MaxName]byte
	switch t.step {
	case 1:
		if len(name) == 0 || name[0] == '*' { // a wildcard: see Deciding
			return nil
		}
	case 2:
		dot := bytes.IndexByte(name, '.')
		if dot < 0 {
			return nil
		}
		name = append(append(star[:0], '*'), name[dot:]...)
	case 3:
		name = append(star[:0], '*')
	}
	return AppendName(dst, name)
}

// general tells whether the entry is one that speaks for other names.
func (t *trial) general() bool { return t.step > 1 }

// outcome returns the error of the trial, whose last entry gave err.
func (t *trial) outcome(err error) error {
	if err == errAbsent || err == errIgnored {
		return &Error{Problem: NoDirectory, Errno: unix.ENOENT, Ignored: t.ignored}
	}
	return err
}

// What is said of an entry that is not the answer.
var (
	errAbsent  error = &Error{Problem: absent}
	errIgnored error = &Error{Problem: ignored}
)

func connectTo(fd int, dir string, general bool) (marks Marks, err error) {
	// The look-ups may find two directories, and the markers of the wrong one are worse than
	// none.
	before := identify(dir)
	switch {
	case before.absent:
		return Marks{}, errAbsent
	case general && !administrators(before.owner):
		return Marks{}, errIgnored
	case (before.link || general) && before.recent():
		return Marks{}, &Error{Problem: Exchanged}
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: dir + "/tls-socket"}); err != nil {
		err = connectError(dir, err)
		if identify(dir) != before { // what the error is about may be gone, and another entry counts
			err = &Error{Problem: Exchanged}
		}
		return Marks{}, err
	}
	for _, v := range []uint8{2, 1} {
		there, _, err := exists(fmt.Sprintf("%s/send-proxy-v%d", dir, v))
		if err != nil {
			return Marks{}, err
		}
		if there {
			marks.Proxy = v
			break
		}
	}
	there, owner, err := exists(dir + "/log-connections")
	if err != nil {
		return Marks{}, err
	}
	marks.Log = there && administrators(owner)
	if identify(dir) != before {
		return Marks{}, &Error{Problem: Exchanged}
	}
	return marks, nil
}

// LogAll tells whether the connections of all hosts are logged: whether there is a
// log-connections in the directory *, and both are the administrator's.
func LogAll() bool {
	dir := string(AppendName(nil, []byte{'*'}))
	if there, owner, err := exists(dir); err != nil || !there || !administrators(owner) {
		return false
	}
	there, owner, err := exists(dir + "/log-connections")
	return err == nil && there && administrators(owner)
}

// administrators tells whether what belongs to a user is the administrator's: root's, or that
// of the owner of the hosts directory.
func administrators(uid uint32) bool {
	if uid == 0 {
		return true
	}
	_, owner, err := exists(".")
	return err == nil && uid == owner
}

// An identity tells what is at a path, a directory or a symlink that leads to one, from
// all that was or will be there.
type identity struct {
	absent           bool
	owner            uint32 // of what is there, not of what it leads to
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
		return identity{absent: err == unix.ENOENT}
	}
	id = identity{
		owner: link.Uid, linkDev: uint64(link.Dev), linkIno: uint64(link.Ino),
		changed: link.Ctim, link: link.Mode&unix.S_IFMT == unix.S_IFLNK,
	}
	if found {
		id.dirDev, id.dirIno = uint64(dir.Dev), uint64(dir.Ino)
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
	case unix.EACCES: // or may have been closed to us
		return false, 0, &Error{Problem: NotPermitted, Errno: unix.EACCES}
	default:
		return false, 0, &Error{Problem: Other, Errno: errno(err)}
	}
}

func socketError(err error) error {
	switch err {
	case unix.EMFILE, unix.ENFILE:
		return &Error{Problem: NoRoom, Errno: errno(err)}
	}
	return &Error{Problem: Other, Errno: errno(err)}
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
	return &Error{Problem: problem, Errno: errno(err)}
}

// errno returns the number behind an error of package unix.
func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}
