package hostdir_test

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// Goal: a datagram socket is told apart from a stream socket, both ways, and is connected with a
// socket of the caller's, again and again; a seqpacket socket is neither. No descriptor is lost.
func TestDatagram(t *testing.T) {
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			chdir(t)
			h := open(t)
			if w.paths {
				h.UsePaths()
			} else if err := h.PathsOnly(); err != nil {
				t.Skip(err)
			}
			bind(t, "a.datagram", unix.SOCK_DGRAM)
			bind(t, "b.datagram", unix.SOCK_DGRAM)
			must(t, os.WriteFile(dirName("b.datagram")+"/send-proxy-v2", nil, 0o644))
			listen(t, "stream", 1)
			names := []string{"a.datagram", "b.datagram", "stream", "a.datagram"}
			if runtime.GOOS == "linux" {
				bind(t, "packets", unix.SOCK_SEQPACKET)
				names = append(names, "packets")
			}
			sender, err := hostdir.NewDatagram()
			must(t, err)
			defer unix.Close(sender)
			wait := w.name != "now"
			withDialer(t, h, func(d *hostdir.Dialer) {
				before := descriptors(t)
				for _, name := range names {
					_, err := d.Find([]byte(name), wait)
					must(t, err)
					b, err := d.Connect(wait)
					if name == "stream" {
						if err != nil || b.Datagram {
							t.Errorf("%s: %+v, error %v", name, b, err)
						}
						unix.Close(b.FD)
					} else if b.FD != -1 || err != hostdir.Datagram {
						t.Errorf("%s as a stream: %+v, error %v", name, b, err)
					}
					b, err = d.ConnectDatagram(sender, wait)
					switch name {
					case "stream", "packets":
						if b.FD != -1 || err != hostdir.Stream {
							t.Errorf("%s as a datagram socket: %+v, error %v", name, b, err)
						}
					default:
						proxy := map[string]uint8{"b.datagram": 2}[name]
						if err != nil || b != (hostdir.Backend{FD: sender, Datagram: true, Proxy: proxy}) {
							t.Errorf("%s: %+v, error %v", name, b, err)
						}
					}
				}
				d.Release()
				if n := descriptors(t); n > before {
					t.Errorf("%d descriptors, %d before", n, before)
				}
				d.Leave()
			})
		})
	}
}

// Goal: what a failure to send means is told like a failure to connect.
func TestSendError(t *testing.T) {
	for errno, want := range map[unix.Errno]failure{
		unix.EAGAIN:       backlogFull,
		unix.ENOBUFS:      backlogFull,
		unix.ETOOMANYREFS: backlogFull,
		unix.ECONNREFUSED: nobodyListens,
		unix.EACCES:       notPermitted,
		unix.EMSGSIZE:     failure(hostdir.Other),
	} {
		if got := problem(hostdir.SendError(errno)); got != want {
			t.Errorf("%v: problem %v, want %v", errno, got, want)
		}
	}
}
