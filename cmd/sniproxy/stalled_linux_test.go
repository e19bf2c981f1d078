package main

import (
	"io"
	"net"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: when an upload is stalled, because the backend never read or has stopped reading, the
// daemon holds at most 128 KiB for each connection, wherever it keeps them.
func TestStalledUpload(t *testing.T) {
	const most = 128 << 10
	for _, tt := range []struct {
		name  string
		conns int
		reads int64 // what the backend reads
	}{
		{"nothing is read", 1, 0},
		{"nothing is read, of many", 50, 0},
		{"some is read", 1, 300 << 10},
		{"much is read", 1, 4 << 20},
		{"much is read, of many", 50, 4 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := start(t)
			l := d.host("stalled.example")
			base := d.fds()
			var clients []*net.TCPConn
			var backends []*net.UnixConn
			var sent []*atomic.Int64
			var all atomic.Int64
			for range tt.conns {
				client, backend := d.pair(l, "stalled.example")
				n := new(atomic.Int64)
				clients, backends, sent = append(clients, client), append(backends, backend), append(sent, n)
				raw, err := client.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					b := make([]byte, 64<<10)
					// Write would not tell of a part of what it was given before it has sent the
					// rest.
					raw.Write(func(fd uintptr) bool {
						for {
							k, err := unix.Write(int(fd), b)
							if err != nil {
								return err != unix.EAGAIN
							}
							n.Add(int64(k))
							all.Add(int64(k))
						}
					})
				}()
				go io.CopyN(io.Discard, backend, tt.reads)
			}
			awaitStill(t, &all)
			// What was read from the clients, and not written to the backends.
			var held int64
			if !hostdirtest.AwaitFor(hostdirtest.Patience, func() bool {
				held = d.held(clients, sent)
				return held <= int64(tt.conns*most)
			}) {
				t.Errorf("the daemon holds %d KiB for each of %d connections, want at most %d", held>>10/int64(tt.conns), tt.conns, most>>10)
			}
			t.Logf("the daemon holds %d KiB for each connection", held>>10/int64(tt.conns))
			for i, client := range clients {
				client.Close()
				backends[i].Close()
			}
			d.awaitFds(base)
		})
	}
}

// held returns how many bytes the daemon holds of what clients have sent, if nobody reads or writes
// just now.
func (d *daemon) held(clients []*net.TCPConn, sent []*atomic.Int64) (held int64) {
	d.t.Helper()
	sockets := make(map[string]procSocket) // by their clients
	// The table changes while it is read, so one may be missing, or be there twice.
	hostdirtest.Await(d.t, "the daemon's sockets", func() bool {
		for _, s := range d.sockets(nil) {
			sockets[s.peer] = s
		}
		return len(sockets) == len(clients)
	})
	for i, client := range clients {
		n := sent[i].Load()
		raw, err := client.SyscallConn()
		if err != nil {
			d.t.Fatal(err)
		}
		var unsent int
		raw.Control(func(fd uintptr) { unsent, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		if err != nil {
			d.t.Fatal(err)
		}
		held += n - int64(unsent) - sockets[procAddr(client.LocalAddr().String())].unread
	}
	return held + int64(len(clients)*len(snitest.Hello("stalled.example"))) - int64(d.counters().up)
}
