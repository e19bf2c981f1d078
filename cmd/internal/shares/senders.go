package shares

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/descriptors"
	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir"
)

// A sender hands connections over for a tenant: a datagram socket that sends them to his backends. The
// kernel charges a datagram to the socket that sent it until it is received, and so bounds how many a
// tenant has under way (SO_SNDBUF): they count among the descriptors of this user, and too many of one
// tenant's would keep the kernel from taking another's (ETOOMANYREFS).
//
// Whoever has locked a sender may send with it. A thread that hangs while it connects one keeps it
// locked, and only that tenant notices.
type sender struct {
	mu   sync.Mutex
	fd   int   // -1 if there is none
	used int64 // when it was last locked, by the clock of limits

	// Sockets of others that have sent one datagram each, which may be under way.
	sent []int
}

// Senders knows how many descriptors senders have.
type senders struct {
	open    atomic.Int64
	sweeper atomic.Bool // a sweep is due
	tenants *Tenants
}

const (
	// A datagram is charged at least so much, and the kernel doubles what SO_SNDBUF is set to.
	chargeLeast = 768

	// senderIdle is how long a sender keeps its socket without use.
	senderIdle = time.Second
)

// most returns how many datagrams a tenant may have under way.
func mostUnderWay() int64 { return min(limits.UnderWay, descriptors.Limit()/4) }

// Sender locks the socket with which connections are handed over for the tenant, and returns it. The
// error is [hostdir.BacklogFull] if somebody else has locked it.
func (s *Shares) Sender(t *Tenant) (fd int, err error) {
	w := &t.sender
	if !w.mu.TryLock() {
		return -1, hostdir.BacklogFull
	}
	w.used = limits.Now()
	if w.fd > 0 {
		return w.fd, nil
	}
	fd, err = hostdir.NewDatagram()
	if err == nil {
		// A part is left to the sockets of others, see Sent.
		size := (mostUnderWay() - limits.UnderWayOthers) * chargeLeast / 2
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, int(size))
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		w.mu.Unlock()
		return -1, hostdir.NoRoom
	}
	w.fd = fd
	s.senders.open.Add(1)
	s.sweepLater()
	return fd, nil
}

// Unlock lets others use the socket that Sender has returned.
func (t *Tenant) Unlock() { t.sender.mu.Unlock() }
