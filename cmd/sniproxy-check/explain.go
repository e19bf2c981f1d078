package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// explain returns the problem in the words of sniproxy, then why, and what to do. Name is nil if
// only the entry is known; entry is the one that decided, "" if there is none; passedOver are
// wildcards that did not count; limit is how long the wait was.
func (c *checker) explain(name []byte, entry string, passedOver []string, limit time.Duration, err error) string {
	why := ""
	switch err {
	case hostdir.BacklogFull:
		why = "the backend has accepted nobody " + limitWords(limit)
	case hostdir.Exchanged:
		why = "the entry, or what it leads to, is replaced again and again, so that nobody can tell whose socket and markers belong together"
	case hostdir.NoRoom:
		why = "raise the limit (ulimit -n)"
	default:
		why = c.explainProblem(name, entry, passedOver, err)
	}
	if why == "" {
		return err.Error()
	}
	return err.Error() + ": " + why
}

// explainProblem says why a host cannot be served, and what to do, "" if there is nothing more to
// say.
func (c *checker) explainProblem(name []byte, entry string, passedOver []string, err error) (why string) {
	var e *hostdir.Error
	if !errors.As(err, &e) {
		return ""
	}
	socket := entry + "/tls-socket"
	switch e.Problem {
	case hostdir.NoDirectory:
		switch {
		case entry != "":
			why = lost(entry)
		case len(passedOver) > 0:
			for i, wildcard := range passedOver {
				if i > 0 {
					why += "; "
				}
				if what := odd(wildcard); what != "" {
					why += "a wildcard must be a directory or a symlink, and " + show(wildcard) + " is " + what
				} else {
					why += chown(c.hosts, wildcard)
				}
			}
		default:
			why = "make one, in which the backend listens on tls-socket"
			if near := c.nearby(name); near != "" {
				why += "; or " + near
			}
		}
	case hostdir.NoSocket:
		why = "let the backend listen on " + show(socket)
		if other := closeTo(entry, "tls-socket"); other != "" {
			why += ", not on " + show(other)
		}
	case hostdir.Dangling:
		why = lost(socket)
	case hostdir.NotPermitted:
		why = c.eyes.shut(socket)
	case hostdir.NobodyListens:
		why = c.nobody(socket)
	case hostdir.NotSocket, hostdir.NotStream:
		why = "it is " + kind(socket)
	case hostdir.PathTooLong:
		if n := len(unix.RawSockaddrUnix{}.Path) - 1; len(socket) > n {
			why = fmt.Sprintf("it has %d bytes, and %d is the most", len(socket), n)
		}
	}
	return why
}

// unwaited is explain for a look-up without waiting.
func unwaited(err error) string {
	switch {
	case err == hostdir.BacklogFull:
		return err.Error() + ": the backend has accepted nobody " + limitWords(0)
	case err == hostdir.MayWait:
		return "the look-up may wait for a file system, and is not made, as many others have kept this waiting"
	}
	return err.Error()
}

// lost says why a path does not lead to a directory.
func lost(path string) string {
	self := ours()
	at, err := self.walk(path + "/.")
	switch {
	case err == unix.ENOTDIR && at == path:
		return "it is " + kind(path)
	case err == unix.ENOTDIR:
		return fmt.Sprintf("the symlink leads to %s, which is %s", show(at), kind(at))
	case err == unix.ENOENT:
		return fmt.Sprintf("the symlink leads nowhere, there is no %s", show(at))
	case err == unix.ELOOP:
		return "the symlink goes round in circles"
	case err != nil:
		return fmt.Sprintf("%s: %v", show(at), err)
	}
	return ""
}

// shut says why the user, whom the process runs as, may not connect.
func (e *eyes) shut(socket string) string {
	if !e.own {
		return "" // it was not the user who tried
	}
	if why, _ := e.closed(socket, false); why != "" {
		return why
	}
	return "by something else than modes, as a security module or a sandbox"
}

// closed says where the way to a socket is closed to the user, "" if it is not by modes or ACLs.
// The error is errUnseen if that cannot be told. Of a wildcard the symlink itself is read by
// sniproxy.
func (e *eyes) closed(socket string, wildcard bool) (why string, err error) {
	at, links, _, err := e.walkLinks(socket)
	switch {
	case err == unix.EACCES:
		return e.needs(unix.X_OK, at), nil
	case err == errUnseen:
		return "", err
	case err == nil && isSocket(at):
		switch err := e.may(at, unix.W_OK); err {
		case unix.EACCES:
			return e.needs(unix.W_OK, at), nil
		case errUnseen:
			return "", err
		}
	}
	if wildcard && len(links) > 0 {
		links = links[1:]
	}
	if link := e.unprotected(links); link != "" && (e.own || protectsSymlinks()) {
		return fmt.Sprintf("fs.protected_symlinks lets the symlink %s be followed by nobody but its owner, unless the owner of the directory makes it", show(link)), nil
	}
	return "", nil
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}

// protectsSymlinks reports whether fs.protected_symlinks is set.
func protectsSymlinks() bool {
	value, err := os.ReadFile("/proc/sys/fs/protected_symlinks")
	return err == nil && string(value) != "0\n"
}

// needs says that a permission is missing, and how to give it so that it lasts.
func (e *eyes) needs(bit uint32, path string) string {
	what, letter := "directory", "x"
	switch bit {
	case unix.R_OK:
		letter = "r"
	case unix.W_OK:
		what, letter = "socket", "w"
	}
	text := fmt.Sprintf("%s is missing on the %s %s", letter, what, show(path))
	if path == "." {
		text = letter + " is missing on the hosts directory"
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil {
		text += fmt.Sprintf(" (mode %04o, uid %d)", st.Mode&0o7777, st.Uid)
		acl, _ := readACL(path)
		if ok, masked := e.allowed(uint32(st.Mode), st.Uid, st.Gid, acl, bit); !ok && masked {
			text += fmt.Sprintf(", since the mask of its ACL takes away what an entry gives (a chmod sets the mask too): setfacl -m m::%s it", permissions(uint32(st.Mode)>>3&7|bit))
			if bit != unix.W_OK {
				return text
			}
			return text + "; " + asMade
		}
	}
	if bit == unix.W_OK {
		return text + ": " + asMade
	}
	return fmt.Sprintf("%s: setfacl -m u:%d:%s it, or chmod", text, e.uid, letter)
}

// asMade is how a backend makes its socket so that everybody may connect: what is done to the
// socket itself ends with the next start of the backend.
const asMade = "a chmod lasts until the backend starts again, so have it make the socket with mode 0666: nginx does, HAProxy with `mode 666`, Caddy with `|0666` behind the path, Node.js with `writableAll: true`, a socket unit of systemd with `SocketMode=0666`, others with umask 0 (`UMask=0000`)"

// asLeft is what to do about a socket that an earlier run of the backend has left behind.
const asLeft = "start the backend, or start it again if its socket was removed or replaced; if it says that the address is in use, an old socket is in its way: have that removed before each start, as by `ExecStartPre=-/bin/rm -f %s`"

// permissions returns the letters of permissions, as setfacl(1) takes them.
func permissions(bits uint32) string {
	letters := ""
	for i, letter := range []string{"r", "w", "x"} {
		if bits&(4>>i) != 0 {
			letters += letter
		}
	}
	return letters
}

// nobody says why nobody may listen on a socket that exists.
func (c *checker) nobody(socket string) string {
	var st unix.Stat_t
	if unix.Stat(socket, &st) == nil && st.Nlink == 0 {
		return "this socket was removed (its link count is 0), and only a mount still shows it: mount its directory into the container or sandbox, not the socket, so that the next socket is seen there"
	}
	return fmt.Sprintf(asLeft, show(filepath.Join(c.root, socket)))
}

// chown says who owns an entry or a marker, and who should.
func chown(hosts *hostdir.Hosts, path string) string {
	var st, dir unix.Stat_t
	if unix.Lstat(path, &st) != nil || unix.Stat(".", &dir) != nil {
		return "it cannot be told whose it is"
	}
	if dir.Uid == 0 || hosts.Overflow(dir.Uid) {
		return fmt.Sprintf("it belongs to uid %d, chown -h it to root", st.Uid)
	}
	return fmt.Sprintf("it belongs to uid %d, chown -h it to root or to uid %d, who has the hosts directory", st.Uid, dir.Uid)
}

// walk follows a path as the kernel does for the user, and returns where it cannot go on, and why.
// Without an error it returns the path with all symlinks resolved.
func (e *eyes) walk(path string) (at string, err error) {
	at, _, _, err = e.walkLinks(path)
	return at, err
}

// unprotected returns the first of the symlinks that Linux follows only for its owner, "" if there
// is none: see fs.protected_symlinks in proc(5).
func (e *eyes) unprotected(links []string) string {
	for _, link := range links {
		var st, dir unix.Stat_t
		if unix.Lstat(link, &st) != nil || unix.Stat(filepath.Dir(link), &dir) != nil {
			continue
		}
		const everybodys = unix.S_ISVTX | unix.S_IWOTH
		if dir.Mode&everybodys == everybodys && st.Uid != dir.Uid && st.Uid != e.uid {
			return link
		}
	}
	return ""
}

// walkLinks also returns the symlinks on the path, and the first of them that is absolute or leaves
// the hosts directory, where the path begins.
func (e *eyes) walkLinks(path string) (at string, links []string, leaving string, err error) {
	const most = 40 // as on Linux
	at = "."
	if filepath.IsAbs(path) {
		at = "/"
	}
	rest := strings.Split(path, "/")
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		if name == "" {
			continue
		}
		if info, err := os.Lstat(at); err == nil && !info.IsDir() {
			return at, links, leaving, unix.ENOTDIR
		}
		if err := e.may(at, unix.X_OK); err != nil {
			return at, links, leaving, err
		}
		next := filepath.Join(at, name)
		target, err := os.Readlink(next)
		switch {
		case errors.Is(err, unix.EINVAL): // it is no symlink
			at = next
		case err != nil:
			if err = errno(err); !e.own {
				err = unseen(err)
			}
			return next, links, leaving, err
		default:
			if links = append(links, next); len(links) > most {
				return next, links, leaving, unix.ELOOP
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
		}
		if leaving == "" && len(links) > 0 && (at == ".." || strings.HasPrefix(at, "../") || filepath.IsAbs(at)) {
			leaving = links[len(links)-1]
		}
	}
	return at, links, leaving, nil
}

// errno returns the number of an error of package os.
func errno(err error) error {
	var number unix.Errno
	if errors.As(err, &number) {
		return number
	}
	return err
}

// kind says what is at a path.
func kind(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return errno(err).Error() // what surrounds it has the name in it
	}
	return kindOf(info)
}

func kindOf(info fs.FileInfo) string {
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return "a regular file"
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeSocket != 0:
		return "a seqpacket socket"
	case mode&fs.ModeNamedPipe != 0:
		return "a FIFO"
	}
	return "a device"
}

// show returns a name. It is in quotes if a line with it could be misread, or if it could harm a
// terminal.
func show(s string) string {
	odd := func(r rune) bool {
		return !unicode.IsPrint(r) || r == unicode.ReplacementChar || strings.ContainsRune(` :;"\`, r)
	}
	if s == "" || strings.ContainsFunc(s, odd) {
		return strconv.Quote(s)
	}
	return s
}
