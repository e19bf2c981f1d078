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

// explain returns the problem in the words of sniproxy, then why, and what to do. Entry is the
// entry that decided, "" if there is none; passedOver are wildcards that did not count; limit is
// how long the wait was.
func explain(hosts *hostdir.Hosts, entry string, passedOver []string, limit time.Duration, err error) string {
	why := ""
	switch err {
	case hostdir.BacklogFull:
		why = "the backend has accepted nobody " + limitWords(limit)
	case hostdir.Exchanged:
		why = "the entry, or what it leads to, is replaced again and again, so that nobody can tell whose socket and markers belong together"
	case hostdir.NoRoom:
		why = "raise the limit (ulimit -n)"
	default:
		why = explainProblem(hosts, entry, passedOver, err)
	}
	if why == "" {
		return err.Error()
	}
	return err.Error() + ": " + why
}

// explainProblem says why a host cannot be served, and what to do, "" if there is nothing more to
// say.
func explainProblem(hosts *hostdir.Hosts, entry string, passedOver []string, err error) (why string) {
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
					why += chown(hosts, wildcard)
				}
			}
		default:
			why = "make one, in which the backend listens on tls-socket"
		}
	case hostdir.NoSocket:
		why = "let the backend listen on " + show(socket)
		if other := closeTo(entry, "tls-socket"); other != "" {
			why += ", not on " + show(other)
		}
	case hostdir.Dangling:
		why = lost(socket)
	case hostdir.NotPermitted:
		why = closed(socket)
	case hostdir.NobodyListens:
		why = "start the backend, or start it again if it listens on a socket that was removed"
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
	at, err := walk(path + "/.")
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

// closed says where the way to a socket is closed to this user.
func closed(socket string) string {
	at, err := walk(socket)
	if err == unix.EACCES {
		return needs(unix.X_OK, at)
	}
	if err == nil && unix.Access(at, unix.W_OK) == unix.EACCES {
		return needs(unix.W_OK, at)
	}
	if link := unprotected(socket); link != "" {
		return fmt.Sprintf("fs.protected_symlinks lets the symlink %s be followed by nobody but its owner, unless the owner of the directory makes it", show(link))
	}
	return "by something else than modes, as a security module or a sandbox"
}

// needs says that a permission is missing.
func needs(bit uint32, path string) string {
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
	}
	return text + ": chmod or setfacl it"
}

// chown says who owns an entry or a marker, and who should.
func chown(hosts *hostdir.Hosts, path string) string {
	var st, dir unix.Stat_t
	if unix.Lstat(path, &st) != nil || unix.Stat(".", &dir) != nil {
		return "it cannot be told whose it is"
	}
	if dir.Uid == 0 || hosts.Overflow(dir.Uid) {
		return fmt.Sprintf("it is that of uid %d, chown -h it to root", st.Uid)
	}
	return fmt.Sprintf("it is that of uid %d, chown -h it to root or to uid %d, who has the hosts directory", st.Uid, dir.Uid)
}

// walk follows a path as the kernel does, and returns where it cannot go on, and why. Without an
// error it returns the path with all symlinks resolved.
func walk(path string) (at string, err error) {
	at, _, err = walkLinks(path)
	return at, err
}

// unprotected returns a symlink on a path that Linux follows only for its owner, "" if there is
// none: see fs.protected_symlinks in proc(5).
func unprotected(path string) string {
	_, links, _ := walkLinks(path)
	for _, link := range links {
		var st, dir unix.Stat_t
		if unix.Lstat(link, &st) != nil || unix.Stat(filepath.Dir(link), &dir) != nil {
			continue
		}
		const everybodys = unix.S_ISVTX | unix.S_IWOTH
		if dir.Mode&everybodys == everybodys && st.Uid != dir.Uid && int(st.Uid) != unix.Geteuid() {
			return link
		}
	}
	return ""
}

func walkLinks(path string) (at string, links []string, err error) {
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
			return at, links, unix.ENOTDIR
		}
		if err := unix.Access(at, unix.X_OK); err != nil {
			return at, links, err
		}
		next := filepath.Join(at, name)
		target, err := os.Readlink(next)
		switch {
		case errors.Is(err, unix.EINVAL): // it is no symlink
			at = next
		case err != nil:
			return next, links, errno(err)
		default:
			if links = append(links, next); len(links) > most {
				return next, links, unix.ELOOP
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
		}
	}
	return at, links, nil
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
		return err.Error()
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
