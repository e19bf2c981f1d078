package shares

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
)

// A sender hands connections over for a tenant, with a datagram socket that is connected to one of
// his backends after the other. The kernel charges each datagram to the socket that sent it until
// it is received, and refuses more than SO_SNDBUF allows. So a tenant whose backends take nothing
// uses up only his own share of the descriptors that may be under way (ETOOMANYREFS).
//
// Whoever has locked it may use the socket. A thread that hangs while it connects the socket keeps
// the lock, which keeps only that tenant's clients waiting.
type sender struct {
	mu   sync.Mutex   // only ever tried
	fd   atomic.Int64 // 0 if there is none
	used int64        // when, by the clock of limits

	// Threads that may wait connect sockets of their own, which are used once.
	onceMu sync.Mutex
	once   []int // whose datagram may be under way
	taken  int   // these, and those that have sent nothing yet
}

const (
	// A datagram is charged with at least so many bytes.
	datagramCharge = 768

	// senderWait is for how long to try to lock a sender: another loop has it for some
	// microseconds, unless it hangs.
	senderWait = 50 * time.Microsecond

	// senderIdle is how long a sender keeps its socket without use.
	senderIdle = time.Second
)

// underWayMost returns how many datagrams a tenant may have under way: from his sender's socket,
// and from others.
func underWayMost() (sender, others int) {
	most := min(limits.UnderWay, descriptors.Limit()/limits.UnderWayParts)
	return int(most - most/4), int(most / 4)
}

// Sender locks the sender of a tenant, and returns its socket. Call [Shares.Sent] when it has sent
// something, or will not. The error is [hostdir.BacklogFull] if somebody else has it, or
// [hostdir.NoRoom].
func (s *Shares) Sender(t *Tenant) (fd int, err error) {
	w := &t.sender
	if !w.mu.TryLock() {
		for late := limits.Now() + int64(senderWait); !w.mu.TryLock(); {
			if limits.Now() > late {
				return -1, hostdir.BacklogFull
			}
		}
	}
	w.used = limits.Now()
	if fd := w.fd.Load(); fd != 0 {
		return int(fd), nil
	}
	if fd, err = hostdir.NewDatagram(); err != nil {
		w.mu.Unlock()
		return -1, hostdir.NoRoom
	}
	most, _ := underWayMost()
	// The kernel doubles what it is told.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, most*datagramCharge/2)
	w.fd.Store(int64(fd))
	s.senders.Add(1)
	s.sweepLater()
	return fd, nil
}

// connectOnce connects a socket of its own to a datagram socket, and waits for whatever there is to
// wait for. Call [Shares.Sent] when it has sent something, or will not.
func (s *Shares) connectOnce(d *hostdir.Dialer, t *Tenant) (hostdir.Backend, error) {
	none := hostdir.Backend{FD: -1}
	w := &t.sender
	w.onceMu.Lock()
	s.closeReceived(w)
	_, most := underWayMost()
	full := w.taken >= most
	if !full {
		w.taken++
	}
	w.onceMu.Unlock()
	if full {
		return none, hostdir.BacklogFull
	}
	s.senders.Add(1)
	fd, err := hostdir.NewDatagram()
	if err != nil {
		s.giveBack(w)
		return none, hostdir.NoRoom
	}
	b, err := d.ConnectDatagram(fd, true)
	if err != nil {
		unix.Close(fd)
		s.giveBack(w)
	}
	return b, err
}

// giveBack undoes what connectOnce has taken.
func (s *Shares) giveBack(w *sender) {
	w.onceMu.Lock()
	w.taken--
	w.onceMu.Unlock()
	s.senders.Add(-1)
}

// Sent gives back a socket of [Shares.Sender] or [Shares.Connect], with which a datagram was
// sent or not.
func (s *Shares) Sent(t *Tenant, fd int, sent bool) {
	w := &t.sender
	switch {
	case w.fd.Load() == int64(fd):
		w.mu.Unlock()
	case sent:
		w.onceMu.Lock()
		w.once = append(w.once, fd)
		w.onceMu.Unlock()
		s.sweepLater()
	default:
		unix.Close(fd)
		s.giveBack(w)
	}
}

// closeReceived closes the sockets that were used once, and whose datagram was received. The caller
// has locked them.
func (s *Shares) closeReceived(w *sender) {
	w.once = slices.DeleteFunc(w.once, func(fd int) bool {
		if underWay(fd) {
			return false
		}
		unix.Close(fd)
		w.taken--
		s.senders.Add(-1)
		return true
	})
}

// sweepLater has sockets that nobody uses closed after a while.
func (s *Shares) sweepLater() {
	if !s.sweeping.Swap(true) {
		time.AfterFunc(senderIdle, func() {
			s.sweeping.Store(false)
			s.sweep(senderIdle)
			if s.senders.Load() > 0 {
				s.sweepLater()
			}
		})
	}
}

// sweep closes the sockets that have nothing under way and were not used for a time.
func (s *Shares) sweep(idle time.Duration) {
	for _, t := range s.Tenants.list() {
		w := &t.sender
		w.onceMu.Lock()
		s.closeReceived(w)
		w.onceMu.Unlock()
		if !w.mu.TryLock() {
			continue
		}
		if fd := int(w.fd.Load()); fd != 0 && limits.Now()-w.used >= int64(idle) && !underWay(fd) {
			w.fd.Store(0)
			unix.Close(fd)
			s.senders.Add(-1)
		}
		w.mu.Unlock()
	}
}

// inUse tells whether a sender has a socket.
func (w *sender) inUse() bool {
	w.onceMu.Lock()
	defer w.onceMu.Unlock()
	return w.fd.Load() != 0 || w.taken > 0
}

// Datagrams are the entries of a tenant that had a datagram socket the last time. Nobody tries a
// stream socket there first.
type datagrams struct {
	some    atomic.Bool
	mu      sync.Mutex
	entries map[string]struct{}
}

// datagramsMost is how many entries of a tenant are remembered at most.
const datagramsMost = 4096

// HasDatagrams tells whether any of his entries had a datagram socket the last time.
func (t *Tenant) HasDatagrams() bool { return t.datagrams.some.Load() }

// HasDatagram tells whether the tls-socket of an entry was a datagram socket the last time.
func (t *Tenant) HasDatagram(entry []byte) bool {
	d := &t.datagrams
	if !d.some.Load() {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	_, has := d.entries[string(entry)]
	return has
}

// SetDatagram remembers whether it is one now.
func (t *Tenant) SetDatagram(entry []byte, is bool) {
	d := &t.datagrams
	d.mu.Lock()
	defer d.mu.Unlock()
	if is {
		if d.entries == nil || len(d.entries) >= datagramsMost {
			d.entries = map[string]struct{}{}
		}
		d.entries[string(entry)] = struct{}{}
	} else {
		delete(d.entries, string(entry))
	}
	d.some.Store(len(d.entries) > 0)
}
