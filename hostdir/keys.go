package hostdir

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// MaxKeys is how many files in .ech count.
	MaxKeys = 16

	maxKeyFile = 16 << 10 // bytes; they have some hundred
)

// A KeyFile is a file in .ech, for keys of Encrypted Client Hello.
type KeyFile struct {
	Name    string
	Content []byte
	Err     error // why it cannot be used, for people; nil if it can
}

// KeyFiles reads the files in the directory .ech of the hosts directory, the first MaxKeys by name,
// and tells how many more there are. Names with a dot in front do not count. The directory and the
// files must be the administrator's, and only their owners may change them. If something is there
// that does not count, ignored says why and what to do. An error means that this could not be found
// out.
//
// Before it opens anything it waits for no file system but that of the hosts directory: whoever
// mounts another one on a directory of that name of his own keeps nobody from finding out.
func (h *Hosts) KeyFiles() (files []KeyFile, more int, ignored string, err error) {
	name := []byte(".ech\x00")
	st, err := h.look(name, true)
	switch {
	case err == unix.ENOENT:
		return nil, 0, "", nil
	case err != nil:
		return nil, 0, "", err
	case st.kind != unix.S_IFDIR:
		return nil, 0, "it is no directory, so a tenant may have moved it there: remove it, and make a directory of that name", nil
	case st.unsure:
		return nil, 0, "a file system is mounted on it, which may lie about its owner: unmount that, and put the files there themselves", nil
	}
	if ignored, err := h.foreign(st.owner); ignored != "" || err != nil {
		return nil, 0, ignored, err
	}
	fd, err := openRead(h.at(), string(name[:len(name)-1]), unix.O_DIRECTORY)
	if err == unix.EACCES {
		return nil, 0, fmt.Sprintf("permission denied: let uid %d, as which sniproxy runs, read it, but not others: chgrp it, and chmod it to 0750", unix.Geteuid()), nil
	}
	if err != nil {
		return nil, 0, "", err
	}
	dir := os.NewFile(uintptr(fd), string(name))
	defer dir.Close()
	if ignored, err := h.unsafe(fd); ignored != "" || err != nil { // it may have been exchanged
		return nil, 0, ignored, err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, 0, "", err
	}
	names = slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, ".") })
	slices.Sort(names)
	if more = len(names) - MaxKeys; more > 0 {
		names = names[:MaxKeys]
	}
	for _, name := range names {
		content, err := h.readKeyFile(fd, name)
		files = append(files, KeyFile{name, content, err})
	}
	return files, max(more, 0), "", nil
}

// unsafe says why something that is open does not count: it is not the administrator's, or others
// than its owner may change it.
func (h *Hosts) unsafe(fd int) (ignored string, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&0o022 != 0 {
		return fmt.Sprintf("its mode %04o lets others than its owner change it: chmod go-w it", st.Mode&0o7777), nil
	}
	return h.foreign(st.Uid)
}

// readKeyFile reads a file in a directory.
func (h *Hosts) readKeyFile(dir int, name string) ([]byte, error) {
	fd, err := openRead(dir, name, unix.O_NONBLOCK)
	switch err {
	case nil:
	case unix.EACCES:
		return nil, fmt.Errorf("permission denied: let uid %d, as which sniproxy runs, read it, but not others: chgrp it, and chmod it to 0640", unix.Geteuid())
	default: // a symlink has another error on each system
		var st unix.Stat_t
		if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return nil, errors.New("it is a symlink: put the file itself there")
		}
		return nil, fmt.Errorf("cannot open it: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("it is no regular file: remove it")
	}
	ignored, err := h.unsafe(fd)
	if err != nil {
		return nil, err
	}
	if ignored != "" {
		return nil, errors.New(ignored)
	}
	b := make([]byte, 0, maxKeyFile+1)
	for len(b) < cap(b) {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read it: %w", err)
		}
		if n == 0 {
			return slices.Clone(b), nil
		}
		b = b[:len(b)+n]
	}
	return nil, fmt.Errorf("it has more than %d KiB: a key file has some hundred bytes", maxKeyFile>>10)
}

// openRead opens something in a directory, but never what a symlink there leads to, nor does it
// wait for the other end of a FIFO.
func openRead(dir int, name string, flags int) (fd int, err error) {
	for {
		fd, err = unix.Openat(dir, name, flags|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
