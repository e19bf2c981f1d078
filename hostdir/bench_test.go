//go:build linux

package hostdir_test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// The time to find a host and connect to it: the same again and again, two in turn, and by path.
// The backend's accept and close are part of it.
func BenchmarkDial(b *testing.B) {
	b.Chdir(b.TempDir())
	names := []string{"www.example.com", "example.com"}
	var listeners []int
	for _, name := range names {
		dir := dirName(name)
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
		listeners = append(listeners, l)
	}
	for _, c := range []struct {
		name   string
		inTurn int
		paths  bool
	}{{"same", 1, false}, {"turns", 2, false}, {"paths", 1, true}} {
		b.Run(c.name, func(b *testing.B) {
			h := open(b)
			if c.paths {
				h.UsePaths()
			}
			withDialer(b, h, func(d *hostdir.Dialer) {
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					n := i % c.inTurn
					if _, err := d.Find([]byte(names[n]), c.paths); err != nil {
						b.Error(err)
						return
					}
					backend, err := d.Connect(c.paths)
					if err != nil {
						b.Error(err)
						return
					}
					// Package unix would allocate the address, which is not needed.
					peer, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(listeners[n]), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
					if errno != 0 {
						b.Error(errno)
						return
					}
					unix.Close(backend.FD)
					unix.Close(int(peer))
				}
			})
		})
	}
}
