package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// urge sends a byte out of band.
func urge(c syscall.Conn, b byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	failed := raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), []byte{b}, unix.MSG_OOB, nil)
		return sent != unix.EAGAIN
	})
	return errors.Join(failed, sent)
}

// An urgent byte is at a place in a stream, which is what comes before it and after it.
type urgent struct {
	before, after int
	end           bool // there is an end behind it
}

var urgentPlaces = []urgent{
	{0, 100, true}, {100, 100, true}, {100, 0, true}, {0, 0, true}, {100, 100, false},
	{64 << 10, 64 << 10, true}, {3 << 20, 1 << 20, true}, {3 << 20, 1 << 20, false}, {0, 3 << 20, true}, {3 << 20, 0, true},
}

func (u urgent) String() string {
	return fmt.Sprintf("%d before, %d after, end %v", u.before, u.after, u.end)
}

// send sends the stream from one end to the other, and reports what is wrong about what arrives:
// the urgent byte may be there or not. All the rest must be, or else the end that looks like one
// must not.
func (u urgent) send(from, to halfConn) error {
	const mark = '!'
	all := randomBytes(u.before + u.after)
	for i := range all {
		all[i] |= 0x80 // no mark
	}
	var sender sync.WaitGroup
	var sendErr error
	sender.Go(func() {
		_, err := from.Write(all[:u.before])
		if err == nil {
			err = urge(from.(syscall.Conn), mark)
		}
		if err == nil {
			_, err = from.Write(all[u.before:])
		}
		if err == nil && u.end {
			err = from.CloseWrite()
		}
		sendErr = err
	})
	defer sender.Wait()
	to.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
	var got bytes.Buffer
	var err error
	if u.end {
		_, err = got.ReadFrom(to)
	} else {
		_, err = got.ReadFrom(io.LimitReader(to, int64(len(all))))
	}
	switch rest := bytes.ReplaceAll(got.Bytes(), []byte{mark}, nil); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		// The urgent byte may be left out, and it may be one of those that were waited for.
		return fmt.Errorf("after %d of %d bytes: %w", got.Len(), len(all), err)
	case !bytes.HasPrefix(all, rest):
		return fmt.Errorf("the %d bytes that arrived are not those that were sent", got.Len())
	case err != nil && !isReset(err):
		return err
	case err == nil && len(rest) < len(all)-1, err == nil && u.end && len(rest) < len(all):
		return fmt.Errorf("%d of %d bytes, and then a clean end", len(rest), len(all))
	}
	to.SetReadDeadline(time.Now().Add(4 * hostdirtest.Patience))
	sender.Wait()
	if sendErr != nil && !isReset(sendErr) {
		return fmt.Errorf("sending: %w", sendErr)
	}
	return nil
}

// Goal: a byte that is sent out of band, anywhere in a stream, costs at most itself, or else the
// connection. A stream that was cut never looks whole.
func TestEndsUrgent(t *testing.T) {
	d := start(t)
	l := d.host("urgent.example")
	base := d.fds()
	for _, u := range urgentPlaces {
		for _, way := range []string{"up", "down"} {
			t.Run(way+", "+u.String(), func(t *testing.T) {
				client, backend := d.pair(l, "urgent.example")
				var err error
				if way == "up" {
					err = u.send(client, backend)
				} else {
					err = u.send(backend, client)
				}
				if err != nil {
					t.Error(err)
				}
				client.Close()
				backend.Close()
				d.awaitFds(base)
			})
		}
	}
}

// Goal: a connection stays usable, both ways, after many urgent bytes in bulk.
func TestEndsUrgentOften(t *testing.T) {
	d := start(t)
	l := d.host("urgent.example")
	for _, way := range []string{"up", "down"} {
		t.Run(way, func(t *testing.T) {
			client, backend := d.pair(l, "urgent.example")
			from, to := halfConn(client), halfConn(backend)
			if way == "down" {
				from, to = backend, client
			}
			for range 20 {
				hostdirtest.Must(t, (urgent{1 << 20, 1 << 16, false}).send(from, to))
				// What is left of it, since the urgent byte may have come as well.
				to.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				io.Copy(io.Discard, to)
				to.SetReadDeadline(time.Now().Add(4 * hostdirtest.Patience))
			}
			ping(t, to, from)
		})
	}
}

// Goal: a client with an urgent byte in its hello is served or gets an alert.
func TestEndsUrgentHello(t *testing.T) {
	d := start(t)
	d.serve("a.example", hostdirtest.Greet)
	base := d.fds()
	h := snitest.Hello("a.example")
	for _, at := range []int{0, 1, 5, 100, len(h) - 1} {
		c := d.dial()
		say(t, c, h[:at])
		hostdirtest.Must(t, urge(c, h[at]))
		say(t, c, h[at+1:])
		c.CloseWrite()
		// Without that byte, which may be left out, it is another hello, or not complete.
		got, err := io.ReadAll(c)
		if err != nil || alert(got) < 0 && string(got) != "this is a.example" && !bytes.HasPrefix(got, []byte("error: ")) {
			t.Errorf("byte %d is urgent: got %q, error %v", at, got, err)
		}
		c.Close()
	}
	d.awaitFds(base)
}

// Goal: what a backend says after it has shut down its reading side reaches the client, all of it,
// and then the end, whatever the client sends meanwhile; or else the client gets a reset.
func TestEndsBackendDeaf(t *testing.T) {
	for _, tt := range []struct {
		name         string
		size         int
		pause        time.Duration // between the pieces that it says
		client       int           // bytes that the client sends meanwhile
		piece        time.Duration // every so often
		clientCloses bool          // its sending side
	}{
		{"client is silent", 20_000, 20 * time.Millisecond, 0, 0, false},
		{"client has ended", 20_000, 20 * time.Millisecond, 0, 0, true},
		{"client sends", 20_000, 20 * time.Millisecond, 1000, 10 * time.Millisecond, false},
		{"client sends once", 20_000, 20 * time.Millisecond, 1000, time.Hour, false},
		{"client sends much", 20_000, 20 * time.Millisecond, 1 << 20, 10 * time.Millisecond, false},
		{"backend says much", 4 << 20, time.Millisecond, 0, 0, false},
		{"both", 4 << 20, time.Millisecond, 1 << 20, 10 * time.Millisecond, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := start(t)
			l := d.host("deaf.example")
			base := d.fds()
			client, backend := d.pair(l, "deaf.example")
			want := randomBytes(tt.size)
			backend.CloseRead()
			over := make(chan struct{})
			var all sync.WaitGroup
			defer all.Wait()
			defer close(over)
			all.Go(func() {
				if tt.clientCloses {
					client.CloseWrite()
				}
				for b := make([]byte, tt.client); len(b) > 0; {
					if _, err := client.Write(b); err != nil {
						return
					}
					select {
					case <-time.After(tt.piece):
					case <-over:
						return
					}
				}
			})
			all.Go(func() {
				defer backend.Close()
				for rest := want; len(rest) > 0; {
					n := min(len(rest), max(len(want)/20, 1))
					if _, err := backend.Write(rest[:n]); err != nil {
						return // the client must get a reset then
					}
					rest = rest[n:]
					<-time.After(tt.pause)
				}
			})
			client.SetReadDeadline(time.Now().Add(hostdirtest.Patience))
			got, err := io.ReadAll(client)
			switch {
			case !bytes.HasPrefix(want, got):
				t.Errorf("the %d bytes that arrived are not those that were sent", len(got))
			case err == nil && len(got) < len(want):
				t.Errorf("%d of %d bytes, and then a clean end", len(got), len(want))
			case err != nil && !isReset(err):
				t.Errorf("after %d of %d bytes: %v", len(got), len(want), err)
			}
			t.Logf("%d of %d bytes, error %v", len(got), len(want), err)
			client.SetDeadline(time.Now())
			client.Close()
			d.awaitFds(base)
		})
	}
}
