//go:build linux

package hostdir_test

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// The time to look a host up and connect to it, by the function and by the Dialer of a thread.
// The backend's side, accept and close, is part of it.
func BenchmarkDial(b *testing.B) {
	b.Chdir(b.TempDir())
	name := []byte("www.example.com")
	dir := string(hostdir.AppendName(nil, name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: dir + "/tls-socket"}); err != nil {
		b.Fatal(err)
	}
	if err := unix.Listen(l, 1); err != nil {
		b.Fatal(err)
	}
	run := func(b *testing.B, dial func(name []byte) (int, hostdir.Marks, error)) {
		b.ReportAllocs()
		for b.Loop() {
			fd, _, err := dial(name)
			if err != nil {
				b.Fatal(err)
			}
			// Package unix would allocate for the address, which is not asked for.
			backend, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(l), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
			if errno != 0 {
				b.Fatal(errno)
			}
			unix.Close(fd)
			unix.Close(int(backend))
		}
	}
	b.Run("function", func(b *testing.B) { run(b, hostdir.Dial) })
	b.Run("dialer", func(b *testing.B) {
		// Never unlocked: the thread, whose working directory is its own, ends with
		// the goroutine.
		runtime.LockOSThread()
		run(b, hostdir.NewDialer().Dial)
	})
}
