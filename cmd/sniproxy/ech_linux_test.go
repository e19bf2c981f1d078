package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

// Goal: a client that waits for a backend whose backlog is full is served as soon as there is room,
// with its inner hello, also if the outer one came in pieces.
func TestECHRedial(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	hostdirtest.Must(t, os.RemoveAll(d.hostDir("hidden.example")))
	l, filling := d.deafHost("hidden.example")
	hello := seal(snitest.NewSealer(d.key.ConfigList()), "hidden.example")
	whole, cut := d.dial(), d.dial()
	say(t, whole, hello)
	sendSlowly(t, cut, hello[:20])
	say(t, cut, hello[20:])
	hostdirtest.Await(t, "both clients to be read", func() bool {
		sockets := d.sockets(nil)
		return len(sockets) == 2 && sockets[0].unread+sockets[1].unread == 0
	})
	for _, c := range filling {
		c.Close()
	}
	want := innerStream("hidden.example", 1)
	for served := 0; served < 2; {
		c, err := l.AcceptUnix()
		hostdirtest.Must(t, err)
		got, err := io.ReadAll(io.LimitReader(c, int64(len(want))))
		if len(got) > 0 {
			served++
			if !bytes.Equal(got, want) || err != nil {
				t.Errorf("got %x, error %v, want %x", got, err, want)
			}
		}
		c.Close()
	}
}

// Goal: early data of any length, more than a backend takes that does not read yet, keeps its place
// before the second hello.
func TestECHStalled(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()
	for size := 128 << 10; size <= 256<<10; size += 8 << 10 {
		k := d.talk(l, nil)
		var early []byte
		for part := range slices.Chunk(randomBytes(size), 16000) {
			early = append(early, snitest.Record(23, part...)...)
		}
		said := slices.Concat(early, seal(k.sealer, "hidden.example"), earlyData)
		written := make(chan error)
		go func() {
			_, err := k.client.Write(said)
			written <- err
		}()
		hostdirtest.Must(t, <-written)
		hostdirtest.Await(t, "the proxy to have read what it can", func() bool { return d.asleep() })
		k.passes(fmt.Sprintf("the request after %d bytes", size), k.backend, k.client, retryRequest)
		k.gets(k.backend, fmt.Sprintf("%d bytes of early data and the second hello", size),
			slices.Concat(early, innerStream("hidden.example", 3), earlyData))
		k.passes("what follows", k.client, k.backend, randomBytes(1000))
		k.client.Close()
		k.backend.Close()
	}
}

// Goal: one second hello that is refused leaves others their time limits.
func TestECHLateBesideRefused(t *testing.T) {
	t.Parallel()
	d := startHidden(t)
	l := d.hiddenBackend()
	var asked []*hiddenTalk
	for range 5 {
		k := d.talk(l, nil)
		k.passes("the request", k.backend, k.client, retryRequest)
		asked = append(asked, k)
	}
	for _, i := range []int{0, 2} {
		say(t, asked[i].client, withECH([]byte{1}))
		got, err := io.ReadAll(asked[i].client)
		expectRecord(t, got, err, sni.IllegalParameter)
		asked[i].client.Close()
	}
	for _, i := range []int{1, 3, 4} {
		got, err := io.ReadAll(asked[i].client)
		expectRecord(t, got, err, sni.UserCanceled)
	}
}
