package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// How a look-up that has to wait is tried again. sniproxy tries more often: see limits.Redial.
const (
	redialMin = time.Millisecond      // the first pause before another try; it doubles each time
	redialMax = 64 * time.Millisecond // the longest pause
)

// A verdict is a line of output, and whether the host that it is about can be served.
type verdict struct {
	line string
	ok   bool
}

// A checker looks hosts up.
type checker struct {
	hosts     *hostdir.Hosts
	root      string // its path
	eyes      eyes   // whom it answers for
	tls       bool   // to make a handshake with each backend
	logAll    bool   // the connections of all hosts are logged
	keys      bool   // there are keys for Encrypted Client Hello
	allowance allowance
	dead      atomic.Bool // the hosts directory itself did not answer

	dir *os.File // the hosts directory, to list it; nil if it is not open yet

	// For names that have no entry.
	listOnce  sync.Once
	listed    []string
	spellings map[string][]string // entries by the name that they are another spelling of
}

// newDialer returns a Dialer. Without a handshake its connections take nothing that backends send
// or pass: closing a passed descriptor may take any time.
func (c *checker) newDialer() (*hostdir.Dialer, error) {
	d, err := c.hosts.NewDialer()
	if err == nil {
		d.Deaf = !c.tls
	}
	return d, err
}

// verdicts looks the hosts up, some at a time. It sends a channel for each, in their order, that
// will have the verdict.
func (c *checker) verdicts(n int, get func(int) host) <-chan chan verdict {
	type task struct {
		host host
		said chan verdict
	}
	coming, tasks := make(chan chan verdict, atOnce), make(chan task)
	for range min(n, atOnce) {
		go func() {
			var w *worker
			for t := range tasks {
				if w == nil {
					w = c.newWorker()
				}
				v, stuck := w.judge(t.host)
				if stuck {
					w = nil
				}
				t.said <- v
			}
			if w != nil {
				close(w.next)
			}
		}()
	}
	go func() {
		defer close(coming)
		defer close(tasks)
		for i := range n {
			t := task{get(i), make(chan verdict, 1)}
			coming <- t.said
			tasks <- t
		}
	}()
	return coming
}

// A worker has a thread that makes look-ups. Once that is stuck, the worker is of no use any more.
type worker struct {
	checker *checker
	next    chan host
	limit   chan time.Duration // for the look-up that it makes
	said    chan verdict
	owner   uint32 // of the entry, once there is a limit
}

func (c *checker) newWorker() *worker {
	w := &worker{checker: c, next: make(chan host), limit: make(chan time.Duration, 1), said: make(chan verdict, 1)}
	go func() {
		runtime.LockOSThread() // for good: the thread has a working directory of its own
		d, err := c.newDialer()
		if err == nil {
			defer d.Close()
		}
		for h := range w.next {
			if err != nil {
				w.limit <- 0
				w.said <- h.verdict(false, err.Error())
				continue
			}
			w.said <- w.look(d, h)
		}
	}()
	return w
}

// noAnswer says why a look at the hosts directory does not end.
const noAnswer = "the hosts directory does not answer: its file system hangs, or a process of somebody who may change it keeps it locked"

// judge returns the verdict on a host, and whether the worker is stuck.
func (w *worker) judge(h host) (v verdict, stuck bool) {
	if h.wrong != "" && !h.listed {
		return h.verdict(false, h.wrong), false
	}
	const hangs = "the look-up has waited for a file system until the time limit: "
	if w.checker.dead.Load() {
		return h.verdict(false, hangs+noAnswer), false
	}
	w.next <- h
	limit, shake := lookupLimit, time.Duration(0)
	if w.checker.tls {
		shake = handshakeLimit
	}
	select {
	case limit = <-w.limit:
	case <-time.After(lookupLimit):
		w.checker.dead.Store(true)
		return h.verdict(false, hangs+noAnswer), true
	}
	select {
	case v := <-w.said:
		return v, false
	case <-time.After(limit + min(limit, shake) + time.Second): // finding out why takes time as well
		w.checker.allowance.spent(w.owner)
		text := "what the entry, or its socket, leads to does not answer"
		if w.checker.tls {
			text += ", or its backend does not let go"
		}
		if limit != lookupLimit {
			text += " " + limitWords(limit)
		}
		return h.verdict(false, hangs+text), true
	}
}

// look looks a host up and connects to its backend.
func (w *worker) look(d *hostdir.Dialer, h host) verdict {
	c := w.checker
	if h.wrong != "" {
		return w.lookStranger(h)
	}
	found, passedOver := hostdir.Entry{Name: h.entry}, []string(nil)
	if h.name != nil {
		found, passedOver, _ = c.hosts.Find(h.name, true)
	} else {
		e, _ := d.FindEntry(h.entry, false)
		found.Owner = e.Owner
		d.Leave()
	}
	entry := string(found.Name)
	w.owner = found.Owner
	limit := c.allowance.limit(w.owner)
	w.limit <- limit

	if own := string(h.entry); h.listed && slices.Contains(passedOver, own) && odd(own) != "" {
		return h.verdict(true, discounted(c.hosts, own))
	}
	elsewhere := limit > 0 && onAnother(entry)
	b, slow, shaken, err := w.try(d, h, limit)
	d.Leave()
	if what := odd(entry); err != nil && h.listed && what != "" {
		return h.verdict(true, err.Error()+": it is "+what+noFault+"only a directory, or a symlink to one, can be a host")
	}
	if limit == 0 && err != nil { // finding out why may wait as well
		return h.verdict(false, unwaited(err))
	}
	var remarks []string
	remark := func(format string, args ...any) { remarks = append(remarks, fmt.Sprintf(format, args...)) }
	if entry != "" {
		remarks = misspelt(entry)
		if c.hosts.Overflow(found.Owner) {
			remark("it cannot be told whose it is (uid %d), and it shares its limits with all such entries", found.Owner)
		}
	}
	if !c.eyes.own && entry != "" {
		if v, final := c.byModes(h, entry, err, remarks); final {
			return v
		}
	}
	if err != nil {
		return h.verdict(false, c.explain(h.name, entry, passedOver, limit, err), remarks...)
	}
	if shaken.fault != "" {
		return h.verdict(false, shaken.fault, append(remarks, shaken.remarks...)...)
	}
	remarks = append(remarks, shaken.remarks...)
	if b.Datagram && c.keys && !c.tls {
		remark("%s", noECH)
	}
	if own := string(h.entry); slices.Contains(passedOver, own) && odd(own) == "" {
		text := fmt.Sprintf("it does not count, %s serves its clients: %s", starred(h, entry), chown(c.hosts, own))
		return h.verdict(false, text, remarks...)
	}
	for _, e := range passedOver {
		remark("%s %s", starred(h, e), discounted(c.hosts, e))
	}
	if _, err := os.Lstat(entry + "/log-connections"); err == nil && !b.Log {
		remark("log-connections does not count: %s", chown(c.hosts, entry+"/log-connections"))
	}
	if entry != string(h.entry) && entry != "" {
		if same, _ := c.neighbours(h.name); len(same) > 0 {
			remark("%s is never looked up, as that is not the canonical form of the name", strings.Join(same, ", "))
		}
	}
	if at, _, link, err := c.eyes.walkLinks(entry + "/tls-socket"); err == nil && link != "" {
		remark("the symlink %s leads to %s, which a chroot or sandbox must show too", show(link), show(at))
	}
	if slow && elsewhere {
		remark("it leads to another file system, which may keep look-ups waiting")
	}
	return h.verdict(true, c.served(h, entry, b), remarks...)
}

// try connects to the backend of a host, and makes a handshake if that is asked for.
func (w *worker) try(d *hostdir.Dialer, h host, limit time.Duration) (b hostdir.Backend, slow bool, shaken handshake, err error) {
	c := w.checker
	b, slow, err = dial(d, h, limit)
	switch {
	case isWaiting(err) && limit > 0:
		c.allowance.spent(w.owner)
	case err == nil && !c.tls:
		unix.Close(b.FD)
	case err == nil:
		start := time.Now()
		if shaken = c.shakeHands(d, h, b, limit); shaken.late {
			c.allowance.spent(w.owner)
		} else {
			c.allowance.took(w.owner, time.Since(start))
		}
	}
	return b, slow, shaken, err
}

// byModes returns the verdict of modes and ACLs on a host, for a user whom the process cannot be.
// It is final unless they let that user in, and the look-up, whose error err is, can tell more.
func (c *checker) byModes(h host, entry string, err error, remarks []string) (v verdict, final bool) {
	why, unseen := c.eyes.closed(entry+"/tls-socket", h.isWildcard(entry))
	switch {
	case why != "":
		return h.verdict(false, hostdir.DeniedTo(c.eyes.uid)+": "+why, remarks...), true
	case unseen != nil:
		return h.verdict(false, fmt.Sprintf("it cannot be told for %v: you may not look at all that it leads through; ask its owner or root to run this", &c.eyes), remarks...), true
	case isNotPermitted(err):
		return h.verdict(true, c.ok()+", but you may not connect, so whether anybody listens cannot be told", remarks...), true
	}
	return verdict{}, false
}

// ok says that a host can be served, and on what that rests if it is not the look-up alone.
func (c *checker) ok() string {
	if c.eyes.own {
		return "ok"
	}
	return fmt.Sprintf("ok for %v as far as %s tell", &c.eyes, byModes)
}

// served says how a host is served, and by which entry if it is not its own.
func (c *checker) served(h host, entry string, b hostdir.Backend) string {
	text := c.ok()
	if b.Datagram {
		text += ", handed over"
	}
	if b.Proxy > 0 {
		text += fmt.Sprintf(", PROXY v%d", b.Proxy)
	}
	if b.Log || c.logAll {
		text += ", logged"
	}
	if entry != string(h.entry) && entry != "" {
		text += ", served by " + starred(h, entry)
	}
	return text
}

// noFault introduces why something has no effect on the exit status.
const noFault = "; no fault: "

// lookStranger looks at an entry that no client can ask for. It is a fault if it is laid out as a
// host is, since then somebody means it to be one.
func (w *worker) lookStranger(h host) verdict {
	entry := string(h.entry)
	var st unix.Stat_t
	w.owner = math.MaxUint32
	if unix.Lstat(entry, &st) == nil {
		w.owner = st.Uid
	}
	limit := w.checker.allowance.limit(w.owner)
	w.limit <- limit
	if what := odd(entry); what != "" {
		return h.verdict(true, h.wrong+noFault+"it is "+what)
	}
	if limit == 0 {
		return h.verdict(true, h.wrong+noFault+"whether it holds a tls-socket is not looked for, as many others have kept this waiting")
	}
	if _, err := os.Lstat(entry + "/tls-socket"); err != nil {
		return h.verdict(true, h.wrong+noFault+"no tls-socket is seen in it")
	}
	return h.verdict(false, h.wrong)
}

// isWildcard reports whether the entry that serves a host is a wildcard.
func (h host) isWildcard(entry string) bool {
	return entry != string(h.entry) || len(h.name) > 0 && h.name[0] == '*'
}

func isNotPermitted(err error) bool {
	e, ok := errors.AsType[*hostdir.Error](err)
	return ok && e.Problem == hostdir.NotPermitted
}

// verdict returns the line about a host.
func (h host) verdict(ok bool, text string, remarks ...string) verdict {
	return verdict{h.label + ": " + strings.Join(append([]string{text}, remarks...), "; "), ok}
}

// discounted says why a wildcard does not count.
func discounted(hosts *hostdir.Hosts, entry string) string {
	if what := odd(entry); what != "" {
		return fmt.Sprintf("does not count: it is %s, and must be a directory or a symlink", what)
	}
	return "does not count: " + chown(hosts, entry)
}

// odd says what an entry is, if it is neither a directory nor a symlink, and "" otherwise.
func odd(entry string) string {
	info, err := os.Lstat(entry)
	if err != nil || info.IsDir() || info.Mode()&fs.ModeSymlink != 0 {
		return ""
	}
	return kindOf(info)
}

// onAnother reports whether the directory or the socket of an entry is on another file system than
// the hosts directory, and one that may keep look-ups waiting: not in memory. It also brings the
// socket into the kernel's cache: a look-up that has to wait afterwards always has to, and not only
// the first time.
func onAnother(entry string) bool {
	var hosts unix.Stat_t
	unix.Stat(".", &hosts)
	another := false
	for _, path := range []string{entry, entry + "/tls-socket"} {
		var st unix.Stat_t
		another = unix.Stat(path, &st) == nil && st.Dev != hosts.Dev && !inMemory(path) || another
	}
	return another
}

// starred returns the name of a wildcard that a host may be served by, given its entry.
func starred(h host, entry string) string {
	_, rest, _ := strings.Cut(string(h.name), ".")
	for _, name := range []string{"*." + rest, "*"} {
		if string(hostdir.AppendName(nil, []byte(name))) == entry {
			return name
		}
	}
	return entry
}

// dial looks a host up as sniproxy does, and reports whether that was slow: sniproxy would leave it
// to a thread that may wait. The connection is the caller's to close, unless there is an error.
func dial(d *hostdir.Dialer, h host, limit time.Duration) (b hostdir.Backend, slow bool, err error) {
	try := func(wait bool) func() (hostdir.Backend, error) {
		return func() (b hostdir.Backend, err error) {
			if h.name != nil {
				_, err = d.Find(h.name, wait)
			} else {
				_, err = d.FindEntry(h.entry, wait)
			}
			if err == nil {
				b, err = d.Connect(wait)
			}
			if err == hostdir.Datagram {
				b, err = connectDatagram(d, wait)
			}
			return b, err
		}
	}
	b, err = redial(try(false), limit)
	if err == hostdir.MayWait && limit > 0 {
		slow = true
		b, err = redial(try(true), limit)
	}
	return b, slow, err
}

// connectDatagram connects to what is a datagram socket, and sends nothing.
func connectDatagram(d *hostdir.Dialer, wait bool) (hostdir.Backend, error) {
	fd, err := hostdir.NewDatagram()
	if err != nil {
		return hostdir.Backend{FD: -1}, hostdir.NoRoom
	}
	b, err := d.ConnectDatagram(fd, wait)
	if err != nil {
		unix.Close(fd)
	}
	if err == hostdir.Stream {
		err = hostdir.NotStreamSocket()
	}
	return b, err
}

// redial tries again while the backlog is full or the directory is exchanged, as sniproxy does, but
// less often.
func redial(try func() (hostdir.Backend, error), limit time.Duration) (hostdir.Backend, error) {
	deadline := time.Now().Add(limit)
	for wait := redialMin; ; wait = min(2*wait, redialMax) {
		b, err := try()
		if !isWaiting(err) || time.Now().Add(wait).After(deadline) {
			return b, err
		}
		time.Sleep(wait)
	}
}

// isWaiting reports whether to try a host again.
func isWaiting(err error) bool { return err == hostdir.BacklogFull || err == hostdir.Exchanged }
