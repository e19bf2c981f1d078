// Package hostdir finds the backend of a host in the hosts directory, which is the working
// directory of the process, and connects to it.
//
// The hosts directory has a directory for each host. Its name is the canonical name of the host or,
// with the build tag hashed, a hash of that name. In it are:
//
//	tls-socket       a Unix stream socket on which the backend listens
//	send-proxy-v2    a marker: connections begin with a PROXY protocol header of version 2
//	send-proxy-v1    the same for version 1; send-proxy-v2 overrides it
//	log-connections  a marker: connections are logged; it counts only if it is the administrator's
//
// A host without an entry in the hosts directory is served by a wildcard: by the entry *.REST,
// where REST is the name without its first label, or else by the entry *. The entry * also serves
// clients that name no host.
//
// Beside the hosts there may be .accept-proxy, a marker: clients come through a load balancer, and
// all connections begin with a PROXY protocol header. It counts only if it is a directory of the
// administrator's.
//
// The administrator is root or the owner of the hosts directory. A wildcard speaks for names of
// others, so it counts only if it is the administrator's, and if it is a directory or a symlink. A
// symlink may lead to a directory of anybody. A file never counts: a tenant can move a file of
// root's from a directory of his own to the hosts directory, but not a directory of root's. A
// look-up passes over a wildcard that does not count. There is no fallback from an entry that
// counts but cannot serve.
//
// A user namespace shows all users that it does not know as one, the overflow uid. The overflow uid
// is never the administrator.
//
// Every connection is looked up anew, with one exception: if the kernel proves that the directory
// of the look-up before has not changed since, its markers are still known. Symlinks are followed
// wherever they lead: permissions decide what can be reached.
//
// A program opens [Hosts] once. Each thread that connects has a [Dialer]: Find tells which entry
// serves a name and who owns it, and Connect connects to the backend of that entry.
package hostdir

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"
)

// nameMax is the length in bytes of the longest name in a directory.
const nameMax = 255

// An Entry is the entry of the hosts directory that serves a name.
type Entry struct {
	// Name is its name in the hosts directory. It is valid until the next Find of the Dialer that
	// returned it. With [MayWait] it can be nil: then it is not known which entry that is.
	Name []byte

	// Owner is the owner of the entry itself: for a symlink, the owner of the link. It is the
	// overflow uid where a file system is mounted on the entry that can claim any owner.
	Owner uint32

	// Administrators reports whether the owner is the administrator.
	Administrators bool

	// Foreign reports that somebody else than the administrator may be able to change the
	// directory, which is the entry or its target.
	Foreign bool
}

// unknown is an entry that nobody has looked for.
var unknown = Entry{Owner: nobody, Foreign: true}

// A Backend is a connection to a backend.
type Backend struct {
	FD       int   // non-blocking, close-on-exec, the caller's to close; -1 if there is none
	Datagram bool  // of a datagram socket: the client's connection is to be handed over
	Proxy    uint8 // the version of the PROXY protocol header to send, 0 for none
	Log      bool  // the connection is to be logged
}

// Expects says what a backend must expect, given the version of the PROXY protocol header that it
// is sent, 0 for none: a backend that does not agree with its markers is the most common mistake.
func Expects(proxy uint8) string {
	if proxy == 0 {
		return "without send-proxy-v1 and send-proxy-v2 it must expect no PROXY header"
	}
	return fmt.Sprintf("with send-proxy-v%d it must expect a PROXY header of version %[1]d", proxy)
}

// Again is an error that passes: the same look-up can succeed once what it names has been dealt
// with. Comparing with == is enough. If it never passes, its text is a reason for people.
type Again uint8

// What the caller can do about each of them.
const (
	MayWait     Again = iota + 1 // a file system may keep the look-up waiting: use a thread that may wait
	NoRoom                       // no descriptor is left: close one
	BacklogFull                  // the backlog of the backend's socket is full: try later
	Exchanged                    // another directory took the host's place: find it anew after a pause
	Datagram                     // tls-socket is a datagram socket: use ConnectDatagram
	Stream                       // tls-socket is no datagram socket: use Connect
)

func (a Again) Error() string {
	switch a {
	case MayWait:
		return "the directory leads to another file system"
	case NoRoom:
		return "no descriptor is left to connect to tls-socket with"
	case BacklogFull:
		return "the backlog of tls-socket is full"
	case Exchanged:
		return "the directory was exchanged"
	case Datagram:
		return "tls-socket is a datagram socket"
	case Stream:
		return "tls-socket is not a datagram socket"
	}
	return fmt.Sprintf("hostdir.Again(%d)", uint8(a))
}

// A Problem is a reason, for people, why a host cannot be reached.
type Problem uint8

// The problems that are told apart.
const (
	NoDirectory   Problem = iota + 1 // the host has no directory
	NoSocket                         // the directory has no tls-socket
	Dangling                         // tls-socket is a symlink, and nothing is where it leads
	NotPermitted                     // this process may not enter the directory or use the socket
	NobodyListens                    // nobody listens on tls-socket
	NotSocket                        // tls-socket is a file, a directory or the like
	NotStream                        // tls-socket is neither a stream nor a datagram socket
	PathTooLong                      // the path does not fit into the address of a socket
	Other                            // another error of the system: see Errno
)

var problems = [...]string{
	NoDirectory:   "no directory",
	NoSocket:      "no tls-socket in the directory",
	Dangling:      "tls-socket is a symlink that leads nowhere",
	NotPermitted:  "permission denied",
	NobodyListens: "nobody listens on tls-socket",
	NotSocket:     "tls-socket is not a socket",
	NotStream:     "tls-socket is neither a stream nor a datagram socket",
	PathTooLong:   "the path of tls-socket is too long for a socket address, use hashed names",
	Other:         "cannot connect to tls-socket",
}

// An Error is a Problem with its circumstances.
type Error struct {
	Problem Problem
	Errno   unix.Errno // the error of the system, which Unwrap returns

	// Ignored is for NoDirectory: there is a wildcard for the name, which does not count, since it
	// is not the administrator's.
	Ignored bool

	// Anew is for NobodyListens: somebody did when the socket was connected, so another may have
	// taken its place by now. Find the host anew.
	Anew bool
}

func (e *Error) Error() string {
	text := problems[e.Problem]
	switch e.Problem {
	case NotPermitted:
		text = DeniedTo(uint32(unix.Geteuid()))
	case Other:
		text = fmt.Sprintf("%s: %v", text, e.Errno)
	}
	if e.Ignored {
		text += ", and the wildcard for it belongs neither to root nor to the owner of the hosts directory"
	}
	return text
}

func (e *Error) Unwrap() error { return e.Errno }

// DeniedTo is the text of the error NotPermitted for a user.
func DeniedTo(uid uint32) string { return fmt.Sprintf("%s for uid %d", problems[NotPermitted], uid) }

// FindAnew reports whether the host is to be found anew after an error: see [Error].
func FindAnew(err error) bool {
	e, ok := err.(*Error)
	return ok && e.Anew
}

// A skip is why a look-up passes over an entry and goes on to the next candidate. It is an error
// only inside this package.
type skip uint8

const (
	absent    skip = iota // there is no such entry
	untrusted             // a wildcard that is not the administrator's
	odd                   // a wildcard that is neither a directory nor a symlink
)

func (s skip) Error() string { return fmt.Sprintf("hostdir.skip(%d)", uint8(s)) }

func isSkip(err error) bool {
	_, ok := err.(skip)
	return ok
}

// notFound is the error when all candidates were passed over. Ignored reports that one was
// untrusted.
func notFound(ignored bool) error {
	return &Error{Problem: NoDirectory, Errno: unix.ENOENT, Ignored: ignored}
}

// candidates is how many entries can serve a host. All but the first are wildcards.
const candidates = 3

// candidate appends to dst the name of the nth entry that can serve a host. It returns nil if this
// host has no such candidate. The name may be a wildcard, which stands for any host that it serves.
func candidate(dst, name []byte, n int) []byte {
	var wildcard [nameMax + 1]byte
	switch n {
	case 0:
		if len(name) == 0 || name[0] == '*' {
			return nil
		}
	case 1:
		dot := bytes.IndexByte(name, '.')
		if dot < 0 {
			return nil
		}
		name = append(append(wildcard[:0], '*'), name[dot:]...)
	case 2:
		name = append(wildcard[:0], '*')
	}
	return AppendName(dst, name)
}

// lookError translates the error of looking at an entry, or at something in its directory. The
// caller handles ENOENT.
func lookError(err error) error {
	switch err {
	case nil:
		return nil
	case unix.EACCES, unix.EPERM:
		return &Error{Problem: NotPermitted, Errno: errno(err)}
	case unix.ENAMETOOLONG:
		return &Error{Problem: NoDirectory, Errno: unix.ENAMETOOLONG}
	}
	return systemError(err)
}

// enterError translates the error of opening or entering a directory.
func enterError(err error) error {
	switch err {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP: // ELOOP: a symlink leads nowhere
		return &Error{Problem: NoDirectory, Errno: errno(err)}
	case unix.EAGAIN: // openat2(2) with RESOLVE_CACHED
		return MayWait
	}
	return lookError(err)
}

// connectError translates the error of connect(2) to the tls-socket in dir. It looks what is there.
// [Datagram] is for a stream socket that was connected to something else.
func connectError(dir string, err error) error {
	problem := Other
	switch err {
	case unix.EAGAIN:
		return BacklogFull
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		// ELOOP is a tenant's symlink that leads nowhere. For sniproxy-rs this, ENOTDIR, EPROTOTYPE
		// and EINVAL are failures of its own (alert 80), not of the host.
		problem = NoSocket
		if _, kind := kinds(dir); kind != unix.S_IFDIR {
			problem = NoDirectory
		} else if link, _ := kinds(dir + "/tls-socket"); link == unix.S_IFLNK {
			problem = Dangling
		}
	case unix.EACCES, unix.EPERM, unix.ECONNREFUSED, unix.ENOTSOCK:
		// Linux says ECONNREFUSED also where there is no socket, and EACCES before it looks whether
		// there is one.
		problem = NotPermitted
		if err == unix.ECONNREFUSED {
			problem = NobodyListens
		}
		if _, kind := kinds(dir + "/tls-socket"); kind != 0 && kind != unix.S_IFSOCK {
			problem = NotSocket
		}
	case unix.EPROTOTYPE:
		return Datagram
	case unix.EINVAL, unix.ENAMETOOLONG:
		// The path is too long for sun_path. ENAMETOOLONG can also come from a symlink on the way,
		// which makes no difference to the client.
		problem = PathTooLong
	default:
		return systemError(err)
	}
	return &Error{Problem: problem, Errno: errno(err)}
}

// kinds returns what is at a path (S_IFDIR and the like), and what that leads to if it is a
// symlink. They are 0 if that cannot be found out.
func kinds(path string) (at, to uint32) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) == nil {
		at = uint32(st.Mode) & unix.S_IFMT
	}
	if unix.Stat(path, &st) == nil {
		to = uint32(st.Mode) & unix.S_IFMT
	}
	return at, to
}

// NotStreamSocket is the error when tls-socket is neither a stream nor a datagram socket.
func NotStreamSocket() error { return &Error{Problem: NotStream, Errno: unix.EPROTOTYPE} }

// SendError translates the error of sending a datagram with a socket that [Dialer.ConnectDatagram]
// has connected. It is [BacklogFull] if the queue is full, or if too many descriptors are under
// way.
func SendError(err unix.Errno) error {
	switch err {
	case unix.EAGAIN, unix.ENOBUFS, unix.ETOOMANYREFS:
		return BacklogFull
	case unix.ECONNREFUSED, unix.ECONNRESET, unix.ENOTCONN:
		return &Error{Problem: NobodyListens, Errno: err, Anew: true}
	case unix.EACCES, unix.EPERM:
		return &Error{Problem: NotPermitted, Errno: err}
	}
	return &Error{Problem: Other, Errno: err}
}

// systemError translates an error that says nothing about the host.
func systemError(err error) error {
	switch err {
	case unix.EMFILE, unix.ENFILE:
		return NoRoom
	}
	return &Error{Problem: Other, Errno: errno(err)}
}

// errno returns the number of an error of package unix.
func errno(err error) unix.Errno {
	e, _ := err.(unix.Errno)
	return e
}
