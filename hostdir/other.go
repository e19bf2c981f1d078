//go:build !linux

package hostdir

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// On other systems a Dialer works with paths.

// A directory is nothing here: entries are found by their paths.
type directory struct{}

func (h *Hosts) open() error {
	h.paths = errors.New("threads cannot have a working directory of their own on " + runtime.GOOS)
	return nil
}

func (h *Hosts) close() {}

// at returns the directory for system calls that take one.
func (h *Hosts) at() int { return unix.AT_FDCWD }

// askOwner asks for the owner of the hosts directory.
func (h *Hosts) askOwner() (uint32, error) {
	var st unix.Stat_t
	err := unix.Stat(".", &st)
	return st.Uid, err
}

// lstat tells about an entry of the hosts directory, whose name ends in a zero.
func (h *Hosts) lstat(entry []byte, _ bool) (status, error) { return h.look(entry, true) }

func (h *Hosts) look(entry []byte, _ bool) (status, error) {
	var st unix.Stat_t
	err := unix.Lstat(string(entry[:len(entry)-1]), &st)
	return status{owner: st.Uid, kind: uint32(st.Mode) & unix.S_IFMT}, err
}

// mayWait reports whether to look for an entry may wait for as long as somebody likes, who may
// change the hosts directory. On these systems that is not known.
func (h *Hosts) mayWait([]byte) bool { return false }

// socket takes two calls more than on Linux, since darwin has no flags for them. No program is
// started in between that could inherit the descriptor.
func (h *Hosts) socket(bool) (int, error) { return newSocket(unix.SOCK_STREAM) }

// NewDatagram returns a datagram socket for [Dialer.ConnectDatagram], non-blocking and
// close-on-exec.
func NewDatagram() (int, error) { return newSocket(unix.SOCK_DGRAM) }

func newSocket(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
	if err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connect connects a socket to a path. It can be shut down only once it is connected.
func connect(fd int, path string, deaf bool) error {
	err := unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if err == nil && deaf {
		unix.Shutdown(fd, unix.SHUT_RD) // if it fails the backend has gone
	}
	return err
}

// Release does nothing, since nothing is kept open.
func (d *Dialer) Release() bool { return false }

// Leave does nothing, since there is nothing to leave.
func (d *Dialer) Leave() {}

// The rest is never called, since Hosts.paths is never nil.

type workdir struct{}

func ownWorkdir() error { return nil }

func (d *Dialer) enter(_, _ bool) error { return absent }

func (d *Dialer) connectInside(int, bool) (Backend, error) { return none, absent }
