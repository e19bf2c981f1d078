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
// which also serves clients that name no host. Only the administrator can speak for others: an
// entry *.REST or * counts only if it belongs to root or to the owner of the hosts directory, and
// is a directory or a symlink. What a symlink leads to may be anybody's. A file never counts, since
// tenants can rename root's files in their directories, but not root's directories. There is no
// fallback from an entry that counts but cannot serve.
//
// In a user namespace all users that it does not know look like one, the overflow uid. That one is
// never the administrator.
//
// Everything is looked up anew for each connection. Only the markers of the directory of the look-up before are
// not looked for again, if the system proves that it has not changed since. Symlinks are
// followed wherever they lead: what may be reached is a matter of permissions.
//
// A program opens [Hosts] once. Each thread that connects has a [Dialer]: its Find tells which
// entry serves a name, and whose it is, and its Connect connects to the backend of that entry.
package hostdir

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"
)

// An Entry is what serves a name.
type Entry struct {
	// Name is that of the entry in the hosts directory. It is valid until the next Find of
	// the Dialer that has returned it.
	Name []byte

	// Owner is that of the entry itself: of the link, where it is a symlink. For the file system
	// that is mounted on an entry, and that can say what it likes, it is the overflow uid.
	Owner uint32

	// Administrators tells whether the owner is the administrator.
	Administrators bool

	// Foreign is set if the directory that the entry is or leads to is not the administrator's,
	// or it is not known whose it is.
	Foreign bool
}

// A Backend is a connection to a backend.
type Backend struct {
	FD    int   // non-blocking, closed on exec, the caller's to close; -1 if there is none
	Proxy uint8 // the version of the PROXY protocol that the connection begins with, 0 for none
	Log   bool  // the connection is logged
}

// A Problem is why a host cannot be connected to.
type Problem uint8

// The problems that are told apart.
const (
	// Reasons, for people.

	NoDirectory   Problem = iota + 1 // the host has no directory
	NoSocket                         // there is no tls-socket in it
	NotPermitted                     // the directory or the socket is closed to this process
	NobodyListens                    // the socket is there, and nobody listens on it
	NotStream                        // tls-socket is something else than a stream socket
	PathTooLong                      // the name does not fit into the address of a socket
	Other                            // something else: see Errno

	// What the caller may be able to do something about. If it goes on for too long these are
	// reasons as well.

	BacklogFull // the backend has as many connections waiting as it allows: try again later
	NoRoom      // no descriptor is left: close one
	Exchanged   // another directory took the place of the host's meanwhile: find it once more, after a pause
	MayWait     // finding out may wait for a file system: let a thread do it that has the time

	// What is said of an entry that is not the answer.

	absent  // there is nothing with that name
	ignored // what there is must not speak for others
	odd     // what there is can speak for nobody, since it is neither a directory nor a symlink
)

var problems = [...]string{
	NoDirectory:   "no directory",
	NoSocket:      "no tls-socket in the directory",
	NotPermitted:  "permission denied",
	NobodyListens: "nobody listens on tls-socket",
	NotStream:     "tls-socket is not a stream socket",
	PathTooLong:   "the path of tls-socket is too long for a socket address, use hashed names",
	Other:         "cannot connect to tls-socket",
	BacklogFull:   "the backlog of tls-socket is full",
	NoRoom:        "no descriptor is left to connect to tls-socket with",
	Exchanged:     "the directory was exchanged",
	MayWait:       "the directory leads to another file system",
}

// An Error is what the functions of this package fail with if they have found a problem.
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

var (
	errAbsent  error = &Error{Problem: absent}
	errIgnored error = &Error{Problem: ignored}
	errOdd     error = &Error{Problem: odd}
)

// isNone tells whether an entry is not the answer, so that the next one may be.
func isNone(err error) bool { return err == errAbsent || err == errIgnored || err == errOdd }

// A trial goes through the entries of the hosts directory that can serve a host, until there is
// one that counts.
type trial struct {
	step    int
	ignored bool // there was one that is not the administrator's
}

// next goes on to the next entry, if the last one, which gave err, is not the answer. Before the
// first err is errAbsent.
func (t *trial) next(err error) bool {
	t.ignored = t.ignored || err == errIgnored
	if !isNone(err) {
		return false
	}
	t.step++
	return t.step <= 3
}

// entry appends the name of the entry to dst. It returns nil if the name of the host allows none.
// The name of the host may be a wildcard, which stands for those that it is meant for, and that
// have no entry of their own.
func (t *trial) entry(dst, name []byte) []byte {
	var star [MaxName]byte
	switch t.step {
	case 1:
		if len(name) == 0 || name[0] == '*' {
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
	if isNone(err) {
		return &Error{Problem: NoDirectory, Errno: unix.ENOENT, Ignored: t.ignored}
	}
	return err
}

// lookError turns what looking for an entry, or for something in its directory, has failed with into
// an Error. It is not for ENOENT.
func lookError(err error) error {
	switch err {
	case nil:
		return nil
	case unix.EACCES, unix.EPERM:
		return &Error{Problem: NotPermitted, Errno: errno(err)}
	case unix.ENAMETOOLONG:
		return &Error{Problem: NoDirectory, Errno: unix.ENAMETOOLONG}
	}
	return socketError(err)
}

// enterError is like lookError, but for a directory that is opened or entered.
func enterError(err error) error {
	switch err {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP: // the last comes from a symlink
		return &Error{Problem: NoDirectory, Errno: errno(err)}
	case unix.EAGAIN:
		return &Error{Problem: MayWait, Errno: unix.EAGAIN}
	}
	return lookError(err)
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
	case unix.EMFILE, unix.ENFILE:
		problem = NoRoom
	}
	return &Error{Problem: problem, Errno: errno(err)}
}

// errno returns the number behind an error of package unix.
func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}
