package backend_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/backend"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: descriptors that are sent in bad faith and whose closing hangs stop no connection, however
// many they are, and take a bounded number of threads.
func TestIgnoredHangs(t *testing.T) {
	hostdirtest.NeedRoot(t)
	const sent = 300
	hostdirtest.OwnMounts(t)
	mount := hostdirtest.Dir(t)
	fs := hostdirtest.MountUserFS(t, mount, unix.S_IFDIR)
	fs.Add(hostdirtest.RootNode, "file", unix.S_IFREG|0o666, "")
	fs.Serve(0)
	file, err := unix.Open(filepath.Join(mount, "file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)

	dir := hostDir(t)
	l := listen(t, dir)
	s := newSender(t, dir)
	fs.Hold()
	for i := range sent {
		must(t, s.send([]byte("hello"), file))
		if i%10 > 0 { // or the queue is full
			continue
		}
		client := handOver(t, dir, "hello")
		if c := accept(t, l); c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), client.LocalAddr())
		}
	}
	left, running := backend.Ignored()
	t.Logf("%d threads are closing, %d descriptors are left to close", running, left)
	if running != 64 || left+running < sent-10 {
		t.Errorf("%d threads are closing and %d descriptors left, want 64 and the rest of %d", running, left, sent)
	}
	fs.Abort()
	unix.Close(file)
	hostdirtest.Await(t, "the rest to be closed", func() bool {
		left, running := backend.Ignored()
		return left == 0 && running == 0
	})
}

// Goal: a process without descriptors takes no connection from the queue, and loses none.
func TestNoDescriptors(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	s := newSender(t, dir)
	var clients []*net.TCPConn
	var fds []int
	for range 5 {
		client, fd := pair(t)
		clients, fds = append(clients, client), append(fds, fd)
	}

	// What earlier tests have left must not be closed in the middle of this one.
	// Pipes of splice(2) are closed by finalizers, two collections after their last use.
	for range 4 {
		done := make(chan struct{})
		runtime.SetFinalizer(new([64]byte), func(*[64]byte) { close(done) })
		runtime.GC()
		<-done
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))

	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	low.Cur = 256
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	var held []int
	release := func(n int) {
		for range min(n, len(held)) {
			unix.Close(held[len(held)-1])
			held = held[:len(held)-1]
		}
	}
	defer func() { release(len(held)) }()
	for {
		fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			break
		}
		held = append(held, fd)
	}

	accepted := make(chan net.Conn, len(fds))
	go func() {
		for range fds {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			accepted <- c
		}
	}()
	for i, fd := range fds {
		must(t, s.send([]byte("hello"), fd))
		must(t, unix.Dup3(s.fd, fd, unix.O_CLOEXEC)) // closes it, and frees none
		clients[i].SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := clients[i].Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("client %d: read %d bytes, error %v; want a connection that waits", i, n, err)
		}
	}
	if len(accepted) > 0 {
		t.Error("a connection was accepted without a descriptor")
	}
	for i := range clients { // each takes one, and one more for a moment
		release(2)
		c := <-accepted
		if c.RemoteAddr().String() != clients[i].LocalAddr().String() {
			t.Errorf("accepted %v, want %v", c.RemoteAddr(), clients[i].LocalAddr())
		}
		defer c.Close()
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Goal: there is no moment in which a program that is started could inherit a connection.
func TestCloseOnExecAtOnce(t *testing.T) {
	dir := hostDir(t)
	l := listen(t, dir)
	looked := 0
	backend.Recvmsg(t, func(fd int, data, control []byte, flags int) (int, int, int, unix.Sockaddr, error) {
		n, controls, received, from, err := unix.Recvmsg(fd, data, control, flags)
		if messages, bad := unix.ParseSocketControlMessage(control[:max(0, controls)]); err == nil && bad == nil && len(messages) == 1 {
			fds, err := unix.ParseUnixRights(&messages[0])
			must(t, err)
			if flags, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("the descriptor has flags %#x, error %v", flags, err)
			}
			looked++
		}
		return n, controls, received, from, err
	})
	handOver(t, dir, "hello")
	accept(t, l)
	if looked == 0 {
		t.Error("no descriptor was received")
	}
}

// Goal: one backend replaces another without a moment in which there is no socket, or one that
// nobody may use, as the system tells of the directory.
func TestReplaceAtOnce(t *testing.T) {
	dir := hostDir(t)
	listen(t, dir)
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	must(t, err)
	defer unix.Close(watch)
	_, err = unix.InotifyAddWatch(watch, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_ATTRIB)
	must(t, err)
	listen(t, dir)
	b := make([]byte, 4096)
	n, err := unix.Read(watch, b)
	must(t, err)
	var events []uint32 // of tls-socket
	for b = b[:n]; len(b) > 0; {
		mask, size := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
		name := b[unix.SizeofInotifyEvent:][:size]
		b = b[unix.SizeofInotifyEvent+size:]
		if string(bytes.TrimRight(name, "\x00")) == "tls-socket" {
			events = append(events, mask)
		}
	}
	if len(events) != 1 || events[0] != unix.IN_MOVED_TO {
		t.Errorf("events %#x, want one, %#x", events, unix.IN_MOVED_TO)
	}
}
