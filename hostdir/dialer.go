package hostdir

import "golang.org/x/sys/unix"

// A Dialer connects to backends.
//
// On Linux its thread has a working directory of its own, and the Dialer makes each host's
// directory that working directory. So all that it looks at is in one directory, whatever takes the
// place of that meanwhile, and the path of the socket is short: a name of any length fits.
//
// Where threads cannot have that, on other systems and where a container engine forbids unshare(2),
// it works with paths. Then the address of a socket limits the length of names, and it makes no
// connection without waiting.
type Dialer struct {
	// Deaf connections take nothing that a backend sends or passes: they are shut down for reading
	// before they are made, or at once afterwards where the system allows only that.
	Deaf bool

	hosts *Hosts
	entry []byte // the last candidate, with a zero at its end
	buf   [nameMax + 2]byte
	found Entry // by the last Find
	err   error // of the last Find

	workdir workdir // of the thread, if it has its own
	path    path    // otherwise
}

// NewDialer returns a Dialer for the calling goroutine, which must be the only one to use it and,
// on Linux, must stay locked to its thread. It opens nothing.
func (h *Hosts) NewDialer() (*Dialer, error) {
	if h.paths == nil {
		if err := ownWorkdir(); err != nil {
			return nil, err
		}
	}
	return &Dialer{hosts: h, err: notFound(false)}, nil
}

// Close closes what the Dialer has open. The thread is of no use for anything else.
func (d *Dialer) Close() { d.Release() }

// Find finds the entry that serves the host with the canonical name, or the clients that name no
// host if name is empty. The name may also be a wildcard, which stands for any host that it serves.
//
// With wait false Find waits for no file system but that of the hosts directory. If the entry leads
// elsewhere, by a symlink or a mount, and the kernel does not know already what is there, the error
// is [MayWait]: then a thread that has the time can find it with wait true. A tenant's file system
// (FUSE, NFS) may never answer. The same goes for an entry that the kernel does not know, if others
// than the owner may change the hosts directory: they can keep it locked.
//
// The error is [Again] or an [*Error]. If it is about an entry, that is returned with it: its Name,
// its Owner, and the rest as far as it is known.
func (d *Dialer) Find(name []byte, wait bool) (Entry, error) {
	ignored := false
	for n := range candidates {
		entry := candidate(d.buf[:0], name, n)
		if entry == nil {
			continue
		}
		d.entry = append(entry, 0)
		d.err = d.try(n > 0, wait)
		if !isSkip(d.err) {
			return d.found, d.err
		}
		ignored = ignored || d.err == untrusted
	}
	d.found, d.err = Entry{}, notFound(ignored)
	return d.found, d.err
}

// FindEntry is like Find for an entry that is given by its own name in the hosts directory.
func (d *Dialer) FindEntry(entry []byte, wait bool) (Entry, error) {
	if len(entry) > nameMax {
		d.found, d.err = Entry{}, lookError(unix.ENAMETOOLONG)
		return d.found, d.err
	}
	d.entry = append(append(d.buf[:0], entry...), 0)
	if d.err = d.try(false, wait); isSkip(d.err) {
		d.found, d.err = Entry{}, notFound(false)
	}
	return d.found, d.err
}

// try finds out whether the candidate serves the host. The error is a skip if it does not.
func (d *Dialer) try(wildcard, wait bool) error {
	if d.hosts.paths != nil {
		return d.look(wildcard, wait)
	}
	return d.enter(wildcard, wait)
}

// Connect connects to tls-socket of the entry that the last Find found. Socket and markers are of
// one directory, also if another takes the place of the host's meanwhile, as when a symlink is
// switched.
//
// With wait false the error is [MayWait] if tls-socket leads to another file system. But whoever
// may write to the directory can exchange the socket for a symlink just between the look and the
// connect(2), and then it waits all the same.
//
// Connect neither waits for a backend whose backlog is full nor tries again: see [BacklogFull] and
// [Exchanged]. After [NoRoom] it may be called again. The error is [Again] or an [*Error].
func (d *Dialer) Connect(wait bool) (Backend, error) { return d.connect(-1, wait) }

// ConnectDatagram is like Connect, for a tls-socket that is a datagram socket, and connects a
// socket of the caller's, which stays his: see [NewDatagram]. It need not be new.
func (d *Dialer) ConnectDatagram(fd int, wait bool) (Backend, error) { return d.connect(fd, wait) }

// connect connects a datagram socket, or a new stream socket if there is none.
func (d *Dialer) connect(datagram int, wait bool) (b Backend, err error) {
	switch {
	case d.err != nil:
		return none, d.err
	case d.hosts.paths == nil:
		b, err = d.connectInside(datagram, wait)
	case !wait:
		return none, MayWait
	default:
		b, err = d.connectPath(datagram)
	}
	if err == Datagram && datagram >= 0 {
		err = Stream
	}
	return b, err
}

// none is no connection.
var none = Backend{FD: -1}
