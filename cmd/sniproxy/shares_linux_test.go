package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Users that have hosts in tests of what each may have.
const (
	greedy = 64001
	modest = 64002
)

// give gives a tenant the entry of a host; of a symlink, the link itself.
func (d *daemon) give(name string, uid int) {
	d.t.Helper()
	hostdirtest.Must(d.t, os.Lchown(d.hostDir(name), uid, uid))
}

// A house is a daemon with few descriptors, and hosts of tenants, whose backends are like Echo.
type house struct {
	*daemon
	relays map[string]*atomic.Int64 // by host, as many as backends know of
}

// houseFiles is how many descriptors the daemon has, and fewRelays and manyRelays are numbers of
// relays that are fewer than it has room for and more. Of the descriptors an eighth, and those that
// are not for connections, are not for relays.
const (
	houseFiles = 200
	fewRelays  = 50
	manyRelays = 130
)

func newHouse(t *testing.T, tenants map[string]int, setups ...setup) *house {
	t.Helper()
	hostdirtest.NeedRoot(t)
	h := &house{start(t, append(setups, limitFiles(houseFiles))...), map[string]*atomic.Int64{}}
	for name, uid := range tenants {
		n := new(atomic.Int64)
		h.relays[name] = n
		h.serve(name, func(c *net.UnixConn) {
			n.Add(1)
			defer n.Add(-1)
			hostdirtest.Echo(c)
		})
		h.give(name, uid)
	}
	return h
}

// enter has a client ask for a host, and reports why it is not served.
func (h *house) enter(name string) (*net.TCPConn, error) {
	h.t.Helper()
	c := h.dial()
	return c, says(append(snitest.Hello(name), "ping"...))(c)
}

// echoes reports why what was sent last does not come back.
func echoes(c *net.TCPConn) error {
	got := make([]byte, 4)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "ping" {
		return fmt.Errorf("got %q, error %v", got, err)
	}
	return nil
}

// fill has clients ask for hosts until there is no room for more, and some more of them.
func (h *house) fill(names ...string) (clients []*net.TCPConn) {
	h.t.Helper()
	for i := range manyRelays {
		clients = append(clients, h.crowd(1, append(snitest.Hello(names[i%len(names)]), "ping"...))...)
	}
	hostdirtest.Await(h.t, "the descriptors to be taken", func() bool { return h.count(names...) >= fewRelays })
	return clients
}

// fillUp is fill with one client after the other, until there is no room, and nobody waits. So
// nobody else takes what is made.
func (h *house) fillUp(name string) {
	h.t.Helper()
	for waits := false; !waits; {
		relays := h.count(name)
		c := h.crowd(1, append(snitest.Hello(name), "ping"...))[0]
		if waits = !hostdirtest.AwaitFor(2*time.Second, func() bool { return h.count(name) > relays }); waits {
			c.Close()
		}
	}
	hostdirtest.Await(h.t, "the client to be told that there is no room", func() bool { return h.counters().waiting == 0 })
}

// count returns how many relays hosts have.
func (h *house) count(names ...string) (n int64) {
	for _, name := range names {
		n += h.relays[name].Load()
	}
	return n
}

// Goal: a tenant whose relays take all descriptors for relays keeps no other tenant's client from
// being served, and no hello from being read. That tenant alone makes room, as the log says, and
// only until both have as many. Each entry of root is a tenant of its own.
func TestSharesRelays(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		owners map[string]int
		full   []string // hosts of the tenant who has the relays
		told   string
	}{
		{"users", map[string]int{"a.example": greedy, "b.example": modest}, []string{"a.example"}, `uid 64001\b`},
		{"several hosts of one user", map[string]int{"a.example": greedy, "b.example": modest, "c.example": greedy, "d.example": greedy},
			[]string{"a.example", "c.example", "d.example"}, `uid 64001\b`},
		{"entries of root", map[string]int{"a.example": 0, "b.example": 0}, []string{"a.example"}, regexp.QuoteMeta(string(hostdir.AppendName(nil, []byte("a.example"))))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, tt.owners)
			base := h.fds()
			clients := h.fill(tt.full...)
			for i := range 30 {
				c, err := h.enter("b.example")
				if err == nil {
					err = echoes(c)
				}
				if err != nil {
					t.Fatalf("client %d of the other tenant: %v", i, err)
				}
				clients = append(clients, c)
				h.expectAlert(snitest.Hello("absent.example"), 112)
				if g, m := h.count(tt.full...), h.count("b.example"); g < m {
					t.Fatalf("the tenant that had all relays has %d, the other %d", g, m)
				}
			}
			for _, c := range clients[manyRelays:] {
				say(t, c, []byte("ping"))
				if err := echoes(c); err != nil {
					t.Errorf("a relay of the tenant who has fewer: %v", err)
				}
			}
			told := regexp.MustCompile(`(?m)^sniproxy: .*to make room.*` + tt.told)
			hostdirtest.Await(t, "a line about a relay that made room", func() bool { return told.MatchString(h.err.String()) })
			for _, c := range clients {
				c.Close()
			}
			h.awaitFds(base)
		})
	}
}

// Goal: a client of another tenant costs the tenant who has all relays just one of them, even where
// closing it takes a while, since the system does not refuse the descriptors that backends pass.
func TestSharesOneForOne(t *testing.T) {
	t.Parallel()
	const clients = 20
	for name, setups := range map[string][]setup{"closed at once": nil, "closed in another thread": {deny("passrights")}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, map[string]int{"a.example": greedy, "b.example": modest}, setups...)
			h.fillUp("a.example")
			before := h.counters().dropped
			for i := range clients {
				if _, err := h.enter("b.example"); err != nil {
					t.Fatalf("client %d of the other tenant: %v", i, err)
				}
			}
			if lost := h.counters().dropped - before; lost > clients+1 {
				t.Errorf("a tenant has lost %d relays for %d of another tenant", lost, clients)
			}
		})
	}
}

// Goal: clients of names that no host has cost nobody a relay, also where others than the owner may
// change the hosts directory. Then threads find out that there is no such host.
func TestSharesUnknownNames(t *testing.T) {
	t.Parallel()
	for _, mode := range []uint32{0o755, 0o1777} {
		t.Run(fmt.Sprintf("%o", mode), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, map[string]int{"a.example": greedy})
			hostdirtest.Must(t, unix.Chmod(h.dir, mode))
			h.fillUp("a.example")
			relays, dropped := h.count("a.example"), h.counters().dropped
			for i := range 20 {
				h.expectAlert(snitest.Hello(fmt.Sprintf("unknown%d.example", i)), 112)
			}
			if now := h.count("a.example"); now != relays || h.counters().dropped != dropped {
				t.Errorf("a tenant had %d relays, and %d then", relays, now)
			}
		})
	}
}

// Goal: however many clients of the other tenant come at once, and go on coming, the two end up
// with about as many relays each.
func TestSharesHalf(t *testing.T) {
	t.Parallel() // it waits for clients for whom there is no room
	h := newHouse(t, map[string]int{"greedy.example": greedy, "modest.example": modest})
	base := h.fds()
	clients := h.fill("greedy.example")
	g, m := h.relays["greedy.example"], h.relays["modest.example"]
	for round := 0; m.Load() < g.Load()-4; round++ {
		if round == 8 {
			t.Fatalf("after %d clients of the other tenant one has %d relays, the other %d", round*10, g.Load(), m.Load())
		}
		some := h.crowd(10, append(snitest.Hello("modest.example"), "ping"...))
		clients = append(clients, some...)
		for _, c := range some {
			c.SetReadDeadline(time.Now().Add(2 * time.Second))
			echoes(c) // unless it waits
		}
	}
	clients = append(clients, h.crowd(30, append(snitest.Hello("modest.example"), "ping"...))...)
	clients = append(clients, h.crowd(30, append(snitest.Hello("greedy.example"), "ping"...))...)
	h.expectAlert(snitest.Hello("absent.example"), 112)
	if g, m := g.Load(), m.Load(); g < m-8 || m < g-8 {
		t.Errorf("one tenant has %d relays, the other %d", g, m)
	}
	for _, c := range clients {
		c.Close()
	}
	h.awaitFds(base)
}

// Goal: no tenant loses a relay to a client of its own. When there is no room, the client waits, as
// for a full backlog, until there is, or until its ten seconds are over.
func TestSharesOwn(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		free bool // room is made
	}{
		{"room in time", true},
		{"no room", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, map[string]int{"greedy.example": greedy})
			base := h.fds()
			var relays []*net.TCPConn
			var last *net.TCPConn
			for last == nil {
				n := h.relays["greedy.example"].Load()
				c, err := h.enter("greedy.example")
				if err != nil {
					t.Fatal(err)
				}
				late := time.After(time.Second)
				for h.relays["greedy.example"].Load() == n && last == nil {
					select {
					case <-late:
						last = c
					case <-time.After(time.Millisecond):
					}
				}
				if last != nil {
					break
				}
				if err := echoes(c); err != nil {
					t.Fatalf("client %d: %v", n, err)
				}
				if relays = append(relays, c); len(relays) > houseFiles/2 {
					t.Fatalf("there are %d relays", len(relays))
				}
			}
			t.Logf("there is room for %d relays", len(relays))
			if len(relays) < fewRelays {
				t.Errorf("there is room for %d relays, want %d at least", len(relays), fewRelays)
			}
			h.expectAlert(snitest.Hello("absent.example"), 112)
			for _, c := range relays {
				say(t, c, []byte("ping"))
				if err := echoes(c); err != nil {
					t.Fatalf("a relay was lost: %v", err)
				}
			}
			if tt.free {
				relays[0].Close()
				if err := echoes(last); err != nil {
					t.Errorf("the client for whom there is room now: %v", err)
				}
			} else if got, err := io.ReadAll(last); alert(got) != 80 || err != nil {
				t.Errorf("the client for whom there was no room got %x, error %v, want alert 80", got, err)
			}
			for _, c := range append(relays, last) {
				c.Close()
			}
			h.awaitFds(base)
		})
	}
}

// Goal: while a tenant's relays hold all descriptors for relays, and silent clients that keep
// coming hold all others, clients of another tenant that say what they want are served.
func TestSharesSilent(t *testing.T) {
	h := newHouse(t, map[string]int{"greedy.example": greedy})
	h.serve("modest.example", hostdirtest.Greet)
	h.give("modest.example", modest)
	base := h.fds()
	clients := h.fill("greedy.example")
	var over atomic.Bool
	var silent sync.WaitGroup
	silent.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		var some []*net.TCPConn
		for !over.Load() {
			<-tick.C
			nc, err := net.DialTimeout("tcp", h.addr, hostdirtest.Patience)
			if err != nil {
				t.Error(err)
				break
			}
			some = append(some, nc.(*net.TCPConn))
		}
		for _, c := range some {
			c.Close()
		}
	})
	hostdirtest.Await(t, "the descriptors to be taken", func() bool { return h.allFds() >= houseFiles-houseFiles/20 })
	for i := range 100 {
		got, err := h.exchangeWithin(snitest.Hello("modest.example"), limits.Hello)
		if err != nil || string(got) != "this is modest.example" {
			t.Errorf("client %d: got %q, error %v", i, got, err)
			break
		}
	}
	over.Store(true)
	silent.Wait()
	for _, c := range clients {
		c.Close()
	}
	h.awaitFds(base)
}
