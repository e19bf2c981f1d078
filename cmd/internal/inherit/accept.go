package inherit

import (
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/socket"
)

// Pollable returns a file for the socket fd that Go's poller knows. Its descriptor takes the place
// of fd. The poller refuses a file that is blocking, and whoever shares the socket can make it so
// at any time; hence the loop.
func Pollable(fd *int) (*os.File, error) {
	for {
		dup, err := unix.FcntlInt(uintptr(*fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		if err := unix.SetNonblock(dup, true); err != nil {
			unix.Close(dup)
			return nil, err
		}
		f := os.NewFile(uintptr(dup), "socket")
		if f.SetDeadline(time.Time{}) == nil {
			unix.Close(*fd)
			*fd = dup
			return f, nil
		}
		f.Close()
	}
}

// Accept waits for a client at a listener that [Pollable] has returned, and accepts it. The address
// of the client comes with it, also if the client is gone. The error is [os.ErrClosed] once the
// listener was closed. EMFILE and ENFILE mean that a client waits.
func Accept(listener *os.File) (client int, from socket.Address, err error) {
	raw, err := listener.SyscallConn()
	if err != nil {
		return -1, from, os.ErrClosed
	}
	closed := raw.Read(func(fd uintptr) bool {
		err = unix.EINTR
		for err == unix.EINTR {
			// Whoever shares the socket can make it blocking, as systemd does whenever it starts
			// something with it: even between these two calls, but SO_RCVTIMEO bounds that wait.
			if err = unix.SetNonblock(int(fd), true); err == nil {
				client, from, err = accept(int(fd))
			}
		}
		if err == unix.EMFILE || err == unix.ENFILE {
			return socket.Events(int(fd)) != 0 // accept(2) says so before it looks for a client
		}
		return err != unix.EAGAIN
	})
	if closed != nil {
		return -1, from, os.ErrClosed
	}
	return client, from, err
}
