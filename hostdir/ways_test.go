package hostdir_test

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// open opens the working directory as the hosts directory.
func open(t testing.TB) *hostdir.Hosts {
	t.Helper()
	h, err := hostdir.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// withDialer calls do with a Dialer, on a thread that ends after it.
func withDialer(t testing.TB, h *hostdir.Hosts, do func(*hostdir.Dialer)) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the Dialer needs that
		if unix.Getpid() == gettid() {
			// The main thread does not end with its goroutine.
			withDialer(t, h, do)
			runtime.UnlockOSThread()
			close(done)
			return
		}
		defer close(done)
		d, err := h.NewDialer()
		if err != nil {
			done <- err
			return
		}
		defer d.Close()
		do(d)
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// dial finds a host and connects to it. It tries again while the host is exchanged.
func dial(d *hostdir.Dialer, name string, wait bool) (hostdir.Backend, error) {
	return again(d, wait, func() (hostdir.Entry, error) { return d.Find([]byte(name), wait) })
}

// again finds and connects until nothing was exchanged in between.
func again(d *hostdir.Dialer, wait bool, find func() (hostdir.Entry, error)) (b hostdir.Backend, err error) {
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		if _, err = find(); err == nil {
			b, err = d.Connect(wait)
		} else {
			b.FD = -1
		}
		if problem(err) != exchanged || time.Now().After(deadline) {
			return b, err
		}
	}
}

// A way is a way to connect to a host: with paths or not, with wait or not.
type way struct {
	name  string
	paths bool
	dial  func(d *hostdir.Dialer, name string) (hostdir.Backend, error)
}

// ways returns the ways that the system has.
func ways(t *testing.T) []way {
	t.Helper()
	later := func(d *hostdir.Dialer, name string) (hostdir.Backend, error) { return dial(d, name, true) }
	now := func(d *hostdir.Dialer, name string) (hostdir.Backend, error) {
		b, err := dial(d, name, false)
		if problem(err) == mayWait { // a symlink that is followed for the first time
			return dial(d, name, true)
		}
		return b, err
	}
	// Find with wait false, Connect with wait true.
	both := func(d *hostdir.Dialer, name string) (hostdir.Backend, error) {
		b, err := again(d, true, func() (hostdir.Entry, error) { return d.Find([]byte(name), false) })
		if problem(err) == mayWait {
			return dial(d, name, true)
		}
		return b, err
	}
	all := []way{{"paths", true, later}, {"paths, both", true, both}}
	if runtime.GOOS == "linux" {
		all = append(all, way{"later", false, later}, way{"now", false, now}, way{"both", false, both})
	}
	return all
}

// eachWay runs a test for each way, in a hosts directory of its own.
func eachWay(t *testing.T, test func(t *testing.T, w way, dial func(name string) (hostdir.Backend, error))) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if w.paths {
				h.UsePaths()
			} else if err := h.PathsOnly(); err != nil {
				t.Skip(err)
			}
			test(t, w, func(name string) (b hostdir.Backend, err error) {
				withDialer(t, h, func(d *hostdir.Dialer) {
					b, err = w.dial(d, name)
					d.Leave()
				})
				return b, err
			})
		})
	}
}

// marks returns what the markers say, without the descriptor.
func marks(b hostdir.Backend) hostdir.Backend {
	b.FD = 0
	return b
}
