package hostdir_test

import (
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// withDialer calls do with a Dialer of a thread that ends after it.
func withDialer(do func(*hostdir.Dialer)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		d := hostdir.NewDialer()
		defer d.Close()
		do(d)
	}()
	<-done
}

func TestDialNow(t *testing.T) {
	// Goal: hosts on the file system of the hosts directory are connected to at once; of
	// those that a symlink leads from there to one that is not on a block device, it is only
	// said that it may take time. With time all are connected to, without a descriptor left.
	chdir(t)
	var here, there unix.Stat_t
	must(t, unix.Stat(".", &here))
	if unix.Stat("/dev/shm", &there) != nil || unix.Major(there.Dev) != 0 || there.Dev == here.Dev {
		t.Skip("/dev/shm is no file system of its own")
	}
	elsewhere, err := os.MkdirTemp("/dev/shm", "hostdir")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(elsewhere) })
	listenAt := func(path string) {
		fd := socket(t, unix.SOCK_STREAM)
		must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
		must(t, unix.Listen(fd, 100))
	}
	listen(t, "plain", 100)
	must(t, os.Symlink(dirName("plain"), dirName("link")))
	must(t, os.Mkdir(dirName("socket-link"), 0o755))
	must(t, os.Symlink("../"+dirName("plain")+"/tls-socket", dirName("socket-link")+"/tls-socket"))
	long := strings.Repeat("a", 254)
	must(t, os.Symlink(dirName("plain"), dirName(long)))

	listenAt(elsewhere + "/tls-socket")
	must(t, os.WriteFile(elsewhere+"/send-proxy-v1", nil, 0o644))
	must(t, os.Symlink(elsewhere, dirName("elsewhere")))
	must(t, os.Mkdir(dirName("socket-elsewhere"), 0o755))
	must(t, os.Symlink(elsewhere+"/tls-socket", dirName("socket-elsewhere")+"/tls-socket"))
	// A marker is not followed.
	listen(t, "marker-elsewhere", 100)
	must(t, os.Symlink(elsewhere+"/send-proxy-v1", dirName("marker-elsewhere")+"/send-proxy-v1"))

	base := descriptors(t)
	withDialer(func(d *hostdir.Dialer) {
		for name, want := range map[string]struct {
			now, later hostdir.Problem
			proxy      uint8
		}{
			"plain":            {0, 0, 0},
			"link":             {0, 0, 0},
			"socket-link":      {0, 0, 0},
			long:               {0, 0, 0},
			"elsewhere":        {hostdir.MayWait, 0, 1},
			"socket-elsewhere": {hostdir.MayWait, 0, 0},
			"marker-elsewhere": {0, 0, 1},
			"absent":           {hostdir.NoDirectory, hostdir.NoDirectory, 0},
		} {
			for range 2 {
				// This comes first, as the first to follow a symlink has to note that.
				fd, marks, err := d.Dial([]byte(name))
				if got := problem(err); got != want.later || got == 0 && marks.Proxy != want.proxy {
					t.Errorf("%s, with time: problem %d, markers %+v, want %+v", name, got, marks, want)
				}
				if err == nil {
					unix.Close(fd)
				}
				fd, marks, err = d.DialNow([]byte(name))
				if got := problem(err); got != want.now || got == 0 && marks.Proxy != want.proxy {
					t.Errorf("%s, now: problem %d, markers %+v, want %+v", name, got, marks, want)
				}
				if err == nil {
					unix.Close(fd)
				}
			}
		}
		d.Leave()
	})
	if got := descriptors(t); got != base {
		t.Errorf("%d descriptors, %d before", got, base)
	}
}
