//go:build !linux

package hostdir

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// A place is nothing here: what is in the hosts directory is found by its path.
type place struct{}

func (h *Hosts) open() error {
	h.paths = errors.New("threads cannot have a working directory of their own on " + runtime.GOOS)
	return nil
}

func (h *Hosts) close() {}

// ask asks for the owner of the hosts directory.
func (h *Hosts) ask() (uint32, error) {
	var st unix.Stat_t
	err := unix.Stat(".", &st)
	return st.Uid, err
}

// lstat tells about an entry of the hosts directory, whose name ends in a zero.
func (h *Hosts) lstat(entry []byte, _ bool) (status, error) {
	var st unix.Stat_t
	err := unix.Lstat(string(entry[:len(entry)-1]), &st)
	return status{owner: st.Uid, kind: uint32(st.Mode) & unix.S_IFMT}, err
}

// socket takes two more calls than on Linux, since darwin has no flags for them.
// No other process is started that could inherit the descriptor in between.
func (h *Hosts) socket(bool) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
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

// connect connects a socket to a path. Only what is connected can be shut down.
func connect(fd int, path string, deaf bool) error {
	err := unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if err == nil && deaf {
		unix.Shutdown(fd, unix.SHUT_RD) // if it fails the backend has gone
	}
	return err
}

// A thread is nothing here.
type thread struct{}

func (thread) begin() error { return nil }

// enterOwn is never called, since PathsOnly is never nil.
func (d *Dialer) enterOwn(_, _ bool) error { return errAbsent }

// connectOwn is never called either.
func (d *Dialer) connectOwn(bool) (Backend, error) { return Backend{FD: -1}, errAbsent }

// Release does nothing, since nothing is kept open.
func (d *Dialer) Release() bool { return false }

// Leave does nothing either.
func (d *Dialer) Leave() {}
