package main

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// swap exchanges what is at two paths, at once.
func swap(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}

// keepSwapping exchanges two entries of a directory again and again, until stop is called, at
// moments that nobody chooses.
func keepSwapping(t *testing.T, dir, a, b string) (stop func()) {
	t.Helper()
	// The directory may be where only the thread of the test sees it.
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var over atomic.Bool
	var swaps sync.WaitGroup
	swaps.Go(func() {
		defer unix.Close(fd)
		for !over.Load() {
			if err := unix.Renameat2(fd, a, fd, b, unix.RENAME_EXCHANGE); err != nil {
				t.Errorf("swap: %v", err)
				return
			}
		}
	})
	return func() {
		over.Store(true)
		swaps.Wait()
	}
}

// Goal: while the directory of a name, or of its wildcard, is exchanged for another under load, one
// or the other serves each client, with the header that its marker asks for.
func TestDirectoryExchanged(t *testing.T) {
	for _, entry := range []string{"a.example", "*.example", "*"} {
		t.Run(entry, func(t *testing.T) {
			d := start(t)
			backend := func(word, begin string) func(*net.UnixConn) {
				return func(c *net.UnixConn) {
					got := make([]byte, len(begin))
					if _, err := io.ReadFull(c, got); err == nil && string(got) != begin {
						io.WriteString(c, "the wrong header for ")
					}
					io.Copy(io.Discard, c)
					io.WriteString(c, word)
				}
			}
			d.serve(entry, backend("green", "\x16\x03"))
			other := filepath.Join(d.dir, ".other")
			hostdirtest.Must(t, os.Rename(d.hostDir(entry), other))
			d.serve(entry, backend("blue", "\r\n\r\n\x00\r\nQUIT\n"))
			hostdirtest.Touch(t, d.hostPath(entry, "send-proxy-v2"))
			counts := map[string]int{}
			swaps := 0
			var clients sync.WaitGroup
			answers := make(chan string)
			for range 4 {
				clients.Go(func() {
					for range 100 {
						got, err := d.tell(sayHello("a.example"), 1<<20, true)
						if err != nil {
							t.Error(err)
						}
						answers <- string(got)
					}
				})
			}
			go func() {
				clients.Wait()
				close(answers)
			}()
			for got := range answers {
				if counts[got]++; got != "green" && got != "blue" && counts[got] < 3 {
					t.Errorf("an answer is %q", got)
				}
				hostdirtest.Must(t, swap(d.hostDir(entry), other))
				swaps++
			}
			t.Logf("%d swaps, answers: %v", swaps, counts)
			if counts["green"] == 0 || counts["blue"] == 0 {
				t.Errorf("the answers are %v", counts)
			}
		})
	}
}

// Goal: where tenants may rename the administrator's wildcard, since the hosts directory has no
// sticky bit, exchanging it with their own gets them no client at any moment. That holds for
// directories and symlinks, also on a file system whose times have coarse steps.
func TestWildcardTenantExchanges(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	for _, kind := range []string{"directory", "symlink"} {
		for _, fs := range []string{"", "ramfs"} {
			t.Run(kind+" "+fs, func(t *testing.T) {
				hosts := hostdirtest.Dir(t)
				if fs != "" {
					hostdirtest.OwnMounts(t)
					hostdirtest.Mount(t, fs, hosts, fs, 0, "")
					hostdirtest.Must(t, os.Chmod(hosts, 0o777))
				}
				d := startOn(t, hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0"), hosts, ordinaryUser(t))
				d.serve("*", answering("everything"))
				mine, theirs := d.hostDir("*.example"), filepath.Join(d.dir, ".theirs")
				if kind == "directory" {
					d.serve("*.example", answering("theirs"))
					hostdirtest.Must(t, os.Rename(mine, theirs))
					d.serve("*.example", answering("mine"))
				} else {
					d.serve("mine", answering("mine"))
					d.serve("theirs", answering("theirs"))
					hostdirtest.Must(t, errors.Join(os.Symlink(hostDir("", "mine"), mine), os.Symlink(hostDir("", "theirs"), theirs)))
				}
				hostdirtest.Must(t, os.Lchown(theirs, lodger, lodger))
				stop := keepSwapping(t, d.dir, filepath.Base(mine), filepath.Base(theirs))
				defer stop()
				counts := map[string]int{}
				d.flows(300, []string{"a.example"}, func(_, got string) {
					if counts[got]++; got != "mine" && got != "everything" && counts[got] < 3 {
						t.Errorf("an answer is %q", got)
					}
				})
				t.Logf("answers: %v", counts)
				if counts["everything"] == 0 {
					t.Error("no client came while the tenant's was there")
				}
			})
		}
	}
}
