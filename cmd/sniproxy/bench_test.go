package main

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// What matters is the cost for the daemon, so its processor time is reported beside the time
// that passes, in which backends and clients have a share. It is counted in hundredths of
// a second: benchmarks of under a second say little.

// daemonTime calls run, and returns how many seconds of processor time the daemon took.
func (d *daemon) daemonTime(b *testing.B, run func()) float64 {
	b.Helper()
	begin := d.cpu()
	b.ResetTimer()
	run()
	b.StopTimer()
	return (d.cpu() - begin).Seconds()
}

// The cost of a short connection: a hello, an answer, the end. Clients come one by one, when
// the daemon sleeps in between, or in a crowd.
func BenchmarkConnection(b *testing.B) {
	for _, width := range []int{1, 32} {
		b.Run(fmt.Sprintf("clients=%d", width), func(b *testing.B) {
			d := start(b)
			d.serve("short.example", hostdirtest.Greet)
			sent := snitest.Hello("short.example")
			used := d.daemonTime(b, func() {
				inParallel(b.N, width, func(int) {
					if got, err := d.exchange(sent); err != nil || string(got) != "this is short.example" {
						b.Errorf("got %q, error %v", got, err)
					}
				})
			})
			b.ReportMetric(used*1e6/float64(b.N), "daemon-µs/op")
		})
	}
}

// The cost of a short connection with keys for Encrypted Client Hello: one without it, one that is
// encrypted to a key of another's (as GREASE is), one that is opened, and one that is forged, so
// that it is decrypted in vain.
func BenchmarkECH(b *testing.B) {
	d := startHidden(b)
	const name = "short.example"
	d.serve(name, hostdirtest.Greet)
	seal := func(s *snitest.Sealer, outer string) []byte {
		return s.Seal(outer, snitest.Inner(name, nil), nil, nil).Stream()
	}
	foreign, forged := snitest.NewSealer(d.key.ConfigList()), snitest.NewSealer(d.key.ConfigList())
	foreign.ID++
	seal(forged, name) // what comes next is the second
	for _, kind := range []struct {
		name  string
		hello []byte
	}{
		{"plain", snitest.Named(name).Stream()},
		{"GREASE", seal(foreign, name)},
		{"accepted", seal(snitest.NewSealer(d.key.ConfigList()), "public.example")},
		{"forged", seal(forged, name)},
	} {
		b.Run(kind.name, func(b *testing.B) {
			used := d.daemonTime(b, func() {
				inParallel(b.N, 32, func(int) {
					if got, err := d.exchange(kind.hello); err != nil || string(got) != "this is "+name {
						b.Errorf("got %q, error %v", got, err)
					}
				})
			})
			b.ReportMetric(used*1e6/float64(b.N), "daemon-µs/op")
		})
	}
}

// The cost of a message and its answer, on 64 connections at once.
func BenchmarkPingPong(b *testing.B) {
	const conns, size = 64, 128
	d := start(b)
	d.serve("echo.example", hostdirtest.Echo)
	clients := d.crowd(conns, snitest.Hello("echo.example"))
	used := d.daemonTime(b, func() {
		var players sync.WaitGroup
		for i, c := range clients {
			players.Go(func() {
				message := make([]byte, size)
				for range (b.N + i) / conns { // b.N in all
					c.Write(message)
					if _, err := io.ReadFull(c, message); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		players.Wait()
	})
	b.ReportMetric(used*1e6/float64(b.N), "daemon-µs/op")
}

// What others have to bear when one client takes all it can get from the same loop: how long
// the slowest of a hundred messages on 64 connections takes there and back, without a bulk
// stream and beside one. A turn of the stream is bounded, so that this does not grow much.
func BenchmarkPingPongBesideBulk(b *testing.B) {
	for _, beside := range []string{"nothing", "download", "upload"} {
		b.Run(beside, func(b *testing.B) {
			d := start(b, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "GOMAXPROCS=1") })
			d.serve("echo.example", hostdirtest.Echo)
			clients := d.crowd(64, snitest.Hello("echo.example"))
			p := d.pairs(1)[0]
			switch beside {
			case "download":
				go io.Copy(p.backend, zeros{})
				go io.Copy(io.Discard, p.client)
			case "upload":
				go io.Copy(p.client, zeros{})
				go io.Copy(io.Discard, p.backend)
			}
			took := make([][]time.Duration, len(clients))
			b.ResetTimer()
			inParallel(len(clients), len(clients), func(i int) {
				message := make([]byte, 128)
				for range b.N/len(clients) + 1 {
					begin := time.Now()
					clients[i].Write(message)
					if _, err := io.ReadFull(clients[i], message); err != nil {
						b.Error(err)
						return
					}
					took[i] = append(took[i], time.Since(begin))
				}
			})
			all := slices.Sorted(slices.Values(slices.Concat(took...)))
			b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
		})
	}
}

// The cost of bulk in one direction, on one connection, alone and beside idle connections that
// have moved much before.
func BenchmarkBulk(b *testing.B) {
	bulk := func(b *testing.B, d *daemon, from, to net.Conn) {
		buf := make([]byte, 256<<10)
		b.SetBytes(int64(len(buf)))
		go func() {
			zeros := make([]byte, len(buf))
			for {
				if _, err := from.Write(zeros); err != nil {
					return
				}
			}
		}()
		used := d.daemonTime(b, func() {
			for range b.N {
				if _, err := io.ReadFull(to, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.ReportMetric(used/float64(b.N*len(buf))*(1<<30), "daemon-s/GiB")
	}
	for _, idle := range []int{0, 1000} {
		prepare := func(b *testing.B) (*daemon, pair) {
			d := start(b)
			for _, p := range d.pairs(descriptorsFor(b, idle)) {
				p.move(b, 1<<20)
			}
			return d, d.pairs(1)[0]
		}
		b.Run(fmt.Sprintf("download/idle=%d", idle), func(b *testing.B) {
			d, p := prepare(b)
			bulk(b, d, p.backend, p.client)
		})
		b.Run(fmt.Sprintf("upload/idle=%d", idle), func(b *testing.B) {
			d, p := prepare(b)
			bulk(b, d, p.client, p.backend)
		})
	}
}

// The memory of an idle connection, before it was used and after 60 kB each way. The time is
// of no interest.
func BenchmarkIdle(b *testing.B) {
	conns := descriptorsFor(b, 2000)
	var unused, used float64
	for range b.N {
		d := start(b) // one that has no memory from before
		n, u := d.idleMemory(conns)
		unused, used = unused+n, used+u
		d.cmd.Process.Kill()
		<-d.exited
	}
	b.ReportMetric(unused/float64(b.N), "B/unused-conn")
	b.ReportMetric(used/float64(b.N), "B/used-conn")
}
