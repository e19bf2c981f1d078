package hostdirtest

import (
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ListenDatagram makes a datagram socket.
func ListenDatagram(t testing.TB, dir string) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(bind(t, dir, unix.SOCK_DGRAM)), "tls-socket")
	defer f.Close()
	c, err := net.FilePacketConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// ServeDatagram calls handle, in a goroutine, for each connection that is handed over, with the
// bytes that came with it. The connection is closed when handle returns.
func ServeDatagram(t testing.TB, dir string, handle func(c *net.TCPConn, first []byte)) {
	t.Helper()
	l := ListenDatagram(t, dir)
	go func() {
		for {
			c, first, err := Receive(l)
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c, first)
			}()
		}
	}()
}

// Receive takes a connection that was handed over, and the bytes that came with it. It fails unless
// exactly one descriptor of a TCP connection came with the datagram, which is as accept(2) returns
// it, and nothing was cut off.
func Receive(l *net.UnixConn) (c *net.TCPConn, first []byte, err error) {
	b, control := make([]byte, 70_000), make([]byte, 1000)
	n, size, flags, _, err := l.ReadMsgUnix(b, control)
	if err != nil {
		return nil, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:size])
	if err != nil || len(messages) != 1 || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		return nil, nil, fmt.Errorf("flags %#x, %d control messages, error %v", flags, len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, nil, fmt.Errorf("descriptors %v, error %v", fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "client")
	defer f.Close()
	if err := plain(fds[0]); err != nil {
		return nil, nil, err
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		conn.Close()
		return nil, nil, fmt.Errorf("a connection of type %T", conn)
	}
	tcp.SetDeadline(time.Now().Add(4 * Patience))
	return tcp, b[:n], nil
}

// plain reports why a socket is not as accept(2) returns it: blocking, without time limits.
func plain(fd int) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		return fmt.Errorf("flags %#x, error %v, want a blocking socket", flags, err)
	}
	for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if v, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, name); err != nil || *v != (unix.Timeval{}) {
			return fmt.Errorf("socket option %d is %v, error %v, want none", name, v, err)
		}
	}
	return nil
}
