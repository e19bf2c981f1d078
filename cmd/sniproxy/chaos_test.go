package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/cmd/internal/limits"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
	"sniproxy/sni/snitest"
)

var (
	chaosTime = flag.Duration("chaos", 3*time.Second, "how long TestChaos goes on")
	chaosSeed = flag.Uint64("chaos-seed", 0, "the seed of the first conversation of TestChaos, 0 for any")
)

// Goal: whatever clients, backends and the hosts directory do, nobody gets a wrong byte, takes a
// cut stream for a whole one, or waits for ever, and the daemon keeps nothing of it. A second
// daemon on the same hosts directory is short of descriptors.
func TestChaos(t *testing.T) {
	t.Parallel() // it waits for those whose backend does not accept
	const round, width = 512, 64
	ch := &chaos{t: t, hosts: chaosHosts}
	for _, prepare := range chaosActors {
		prepare(ch)
	}
	// Where there are loops, those of one daemon move relays all the time.
	d := start(t, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "SNIPROXY_TEST_SHARE=1") })
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	poor := startOn(t, l, d.dir, limitFiles(48))
	l.Close()
	ch.daemons = [2]*daemon{d, poor}
	ch.makeHosts()
	d.serve("greet.example", hostdirtest.Greet)

	seed := *chaosSeed
	if seed == 0 {
		seed = rand.Uint64() >> 16
	}
	t.Logf("the first seed is %d", seed)
	bases, memory := [2]int{d.fds(), poor.fds()}, [2]int{}
	for end := time.Now().Add(*chaosTime); ; seed += round {
		// Where others may change the hosts directory, threads look for what the kernel does not
		// know.
		hostdirtest.Must(t, unix.Chmod(d.dir, []uint32{0o755, 0o1777}[seed/round%2]))
		deaf := d.shortBacklog("deaf.example")
		stops := []func(){ch.shuffleHosts()}
		for _, act := range ch.actors {
			stops = append(stops, act())
		}
		inParallel(round, width, func(i int) { ch.converse(seed + uint64(i)) })
		for _, stop := range slices.Backward(stops) {
			stop()
		}
		deaf.Close()
		for i, d := range ch.daemons {
			d.awaitFds(bases[i])
		}
		hostdirtest.Await(t, "the backends to end", func() bool { return ch.backends.Load() == 0 })
		ch.judge()
		if memory[0] == 0 {
			memory = [2]int{d.rss(), poor.rss()}
		}
		if t.Failed() || time.Now().After(end) {
			break
		}
	}
	t.Logf("%d conversations, %d of them whole, %d without a backend", ch.all, ch.whole, ch.alone)
	for i, d := range ch.daemons {
		d.expectGrowth(memory[i], 16<<20)
		if err := d.greeted("greet.example"); err != nil {
			t.Error(err)
		}
		d.signal(syscall.SIGTERM)
		if status := d.wait(); status != 0 {
			t.Errorf("exit status %d", status)
		}
		for line := range strings.Lines(d.err.String()) {
			if !chaosLine.MatchString(line) {
				t.Errorf("standard error has %q", line)
			}
		}
	}
}

// chaosLine is what the daemons may print.
var chaosLine = regexp.MustCompile(`^sniproxy: (refused [0-9.:]+( for [a-z0-9.]+)?: .* \(alert \d+, [a-z_]+\)|` +
	`.* to make room.*|.*passed.*descriptor.*|\d+ more such lines( about .*)? were left out|` +
	`(the backend of [a-z0-9.]+|a backend of [A-Za-z0-9.*_ -]+) has closed [0-9.:]+ without an answer; .*|` +
	`cannot accept connections for the moment: too many open files)\n$`)

// chaos is what all conversations share.
type chaos struct {
	t         *testing.T
	daemons   [2]*daemon   // the second is the poor one
	elsewhere string       // a directory of hosts
	running   sync.Map     // *conversation by seed, of this round
	backends  atomic.Int64 // connections that backends deal with
	hosts     []chaosHost
	actors    []func() (stop func()) // what else goes on during a round

	all, whole, alone int // conversations
}

// chaosActors prepare what only some systems have, before the daemons are started: hosts, and
// actors.
var chaosActors []func(*chaos)

// A chaosHost is an entry of the hosts directory, and what may become of clients whom it serves.
type chaosHost struct {
	name string // of a wildcard each client makes its own
	fate chaosFate
}

var chaosHosts = []chaosHost{
	{"plain.example", relayed}, {"plain.example", relayed}, {"marked.example", relayed}, {"switched.example", relayed},
	{"moved.example", relayedOrRefused}, {"absent.example", refused}, {"rude.example", dropped}, {"deaf.example", ignored},
	{"plain.example", relayed}, {"marked.example", relayed}, {"switched.example", relayed}, {"moved.example", relayedOrRefused},
	{"*.plain.example", relayed}, {"*.plain.example", relayed}, {"*.marked.example", relayed}, {"*.marked.example", relayed},
	{"deaf.example", ignored}, {"dying.example", careless},
}

type chaosFate int

const (
	relayed          chaosFate = iota
	relayedOrRefused           // its directory comes and goes
	refused
	dropped  // the backend closes without a word
	ignored  // the backend does not accept
	maybe    // its look-up hangs or takes time, so its clients may be refused for that
	careless // its backend does what breaks a connection, at any moment
)

func (ch *chaos) makeHosts() {
	dir := ch.daemons[0].dir
	ch.serve(dir, "plain.example", "plain.example", false)
	ch.serve(dir, "marked.example", "marked.example", true)
	ch.serve(dir, "*.plain.example", "*.plain.example", false)
	ch.serve(dir, "*.marked.example", "*.marked.example", true)
	// Two directories that take turns as moved.example.
	ch.serve(dir, "moved.example", "moved.example", false)
	ch.serve(dir, "spare.example", "moved.example", true)
	// Two directories that the symlink switched.example points to in turn.
	ch.elsewhere = hostdirtest.Dir(ch.t)
	ch.serve(ch.elsewhere, "green", "switched.example", false)
	ch.serve(ch.elsewhere, "blue", "switched.example", true)
	ch.daemons[0].serveHanded("handed.example", greetHanded)
	ch.actors = append(ch.actors, ch.die, ch.hand)
	hostdirtest.Serve(ch.t, hostDir(dir, "rude.example"), func(c *net.UnixConn) { c.Read(make([]byte, rand.IntN(400))) })
}

// serve makes a host whose backend takes part in conversations of those who ask for an entry.
func (ch *chaos) serve(hosts, name, entry string, marker bool) {
	hostdirtest.Serve(ch.t, hostDir(hosts, name), ch.backend(entry, marker))
	if marker {
		hostdirtest.Touch(ch.t, hostPath(ch.t, hosts, name, "send-proxy-v1"))
	}
}

func (ch *chaos) backend(entry string, marker bool) func(*net.UnixConn) {
	return func(c *net.UnixConn) {
		ch.backends.Add(1)
		defer ch.backends.Add(-1)
		ch.answer(c, entry, marker)
	}
}

// hand has clients ask for a host whose connections are handed over, and who must reach it, and for
// another one whose backend takes few of them, and dies with the others.
func (ch *chaos) hand() (stop func()) {
	d := ch.daemons[0]
	over := make(chan struct{})
	var hosts sync.WaitGroup
	hosts.Go(func() {
		for {
			begun := time.Now()
			got, err := d.exchange(snitest.Hello("handed.example"))
			if (err != nil || string(got) != "this is handed.example") && !starved(alert(got), time.Since(begun)) {
				ch.t.Errorf("a client that is to be handed over got %q, error %v", got, err)
			}
			select {
			case <-over:
				return
			default:
			}
		}
	})
	hosts.Go(func() {
		for {
			l := d.bindDatagram("lazy.example")
			crowd := d.crowd(rand.IntN(20), snitest.Hello("lazy.example"))
			for range rand.IntN(5) {
				l.SetReadDeadline(time.Now().Add(rand.N(20 * time.Millisecond)))
				if c, _, err := hostdirtest.Receive(l); err == nil {
					c.Close()
				}
			}
			l.Close()
			for _, c := range crowd {
				c.Close()
			}
			select {
			case <-over:
				return
			default:
			}
		}
	})
	return func() {
		close(over)
		hosts.Wait()
	}
}

// die has a backend listen and die, again and again, with clients that are served, that wait to be
// accepted, and that there is no room for.
func (ch *chaos) die() (stop func()) {
	d := ch.daemons[0]
	over := make(chan struct{})
	var dying sync.WaitGroup
	dying.Go(func() {
		for {
			path := hostPath(ch.t, d.dir, "dying.example", "tls-socket")
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err == nil {
				err = os.Chmod(path, 0o777)
			}
			if err != nil {
				ch.t.Error(err)
				return
			}
			l.SetUnlinkOnClose(false)
			if raw, err := l.SyscallConn(); err == nil {
				raw.Control(func(fd uintptr) { unix.Listen(int(fd), rand.IntN(3)) })
			}
			l.SetDeadline(time.Now().Add(rand.N(20 * time.Millisecond)))
			for {
				c, err := l.AcceptUnix()
				if err != nil {
					break
				}
				time.AfterFunc(rand.N(20*time.Millisecond), func() { c.Close() })
			}
			l.Close()
			select {
			case <-over:
				os.Remove(path)
				return
			case <-time.After(rand.N(20 * time.Millisecond)):
			}
			os.Remove(path)
		}
	})
	return func() {
		close(over)
		dying.Wait()
	}
}

// shuffleHosts switches the symlink and moves directories until stop is called.
func (ch *chaos) shuffleHosts() (stop func()) {
	dir := ch.daemons[0].dir
	moved, spare, aside := hostDir(dir, "moved.example"), hostDir(dir, "spare.example"), filepath.Join(dir, "aside")
	point := func(word string) error {
		next := filepath.Join(dir, "next")
		if err := errors.Join(os.Symlink(hostDir(ch.elsewhere, word), next), os.Rename(next, hostDir(dir, "switched.example"))); err != nil {
			return err
		}
		<-time.After(switchPause)
		return nil
	}
	steps := []func() error{
		func() error { return point("green") },
		func() error { return os.Rename(moved, aside) },
		func() error { return os.Rename(spare, moved) },
		func() error { return point("blue") },
		func() error { return os.Rename(aside, spare) },
	}
	steps[0]()
	done := make(chan struct{})
	var shuffler sync.WaitGroup
	shuffler.Go(func() {
		for {
			for _, step := range steps {
				if err := step(); err != nil {
					ch.t.Error(err)
				}
				if rand.IntN(4) == 0 { // otherwise the next step follows at once
					<-time.After(rand.N(3 * time.Millisecond))
				}
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	return func() {
		close(done)
		shuffler.Wait()
	}
}

// A conversation is one client's connection, and that of a backend if it gets that far.
// What they do and say comes from the seed alone, which the client sends behind its hello.
type conversation struct {
	seed   uint64
	entry  string // of the hosts directory, which must serve it
	host   string
	fate   chaosFate
	poor   bool
	begin  []byte // the hello, or junk instead, and the seed
	daemon *daemon
	addr   netip.AddrPort
	took   time.Duration

	scripts [2]chaosScript // of the client, the backend
	reports [2]atomic.Pointer[chaosReport]
}

// answerBegin is what a backend says first. An alert begins otherwise.
const answerBegin = "ok"

func (ch *chaos) newConversation(seed uint64) *conversation {
	r := rand.New(rand.NewPCG(seed, 0))
	host := ch.hosts[r.IntN(len(ch.hosts))]
	v := &conversation{seed: seed, entry: host.name, host: host.name, fate: host.fate, poor: r.IntN(4) == 0}
	if rest, wildcard := strings.CutPrefix(host.name, "*"); wildcard {
		v.host = strconv.FormatUint(r.Uint64()>>r.IntN(64), 36) + rest
	}

	message := padded(v.host, pick(r, 0, 200, 2000, 16000)).Bytes
	v.begin = snitest.Records(message, pick(r, 1<<14, 1<<14, 1<<14, 1+r.IntN(500)))
	if r.IntN(16) == 0 {
		v.begin = newChaosStream(nil, seed, 2).next(make([]byte, 1+r.IntN(3000)))
		v.begin[0] = pick(r, 22, v.begin[0])
	}
	v.begin = binary.BigEndian.AppendUint64(v.begin, seed)

	v.scripts = [2]chaosScript{newChaosScript(r, len(v.begin)), newChaosScript(r, len(answerBegin))}
	if one := r.IntN(6); one < 2 { // only one can wait for the other
		v.scripts[one].after = true
	}
	if up := &v.scripts[0]; v.fate == ignored && up.end == orderly {
		up.end = leave
	}
	return v
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// A chaosScript is what one end does.
type chaosScript struct {
	begin int           // bytes before the stream proper
	size  int           // bytes to send, those included, if it is not cut before
	write int           // the most bytes of a write
	read  int           // and of a read
	stall int           // it stops for a while at one of so many writes and reads
	after bool          // it sends the stream when the other end has ended
	end   chaosEnd      // how it ends
	wait  bool          // it ends when its life is over, not before
	life  time.Duration // unless it is orderly
}

type chaosEnd int

const (
	orderly chaosEnd = iota // sends all, half-closes, reads to the end
	leave                   // sends all, closes
	abandon                 // the same, with a reset, where there is such a thing
	ignore                  // leaves, and never reads
	deafen                  // the same, and says so
)

func newChaosScript(r *rand.Rand, begin int) chaosScript {
	s := chaosScript{
		begin: begin,
		write: pick(r, 4, 1500, 16<<10, 64<<10, 1<<20),
		read:  pick(r, 200, 4<<10, 64<<10, 512<<10),
		stall: pick(r, 3, 100, 1<<30),
		end:   pick(r, orderly, orderly, orderly, orderly, orderly, orderly, leave, abandon, ignore, deafen),
		wait:  r.IntN(2) == 0,
		life:  time.Duration(r.Int64N(int64(500 * time.Millisecond))),
	}
	s.size = begin + r.IntN(pick(r, 100, 10_000, 10_000, 200_000, 200_000, 4<<20))
	if s.write == 4 {
		s.size = min(s.size, begin+4<<10)
	}
	if r.IntN(12) == 0 {
		s.size = r.IntN(begin)
	}
	return s
}

// A chaosStream is what one end sends: what it begins with, then random bytes.
type chaosStream struct {
	begin []byte
	rest  *rand.ChaCha8
}

func newChaosStream(begin []byte, seed uint64, key byte) *chaosStream {
	k := [32]byte{key}
	binary.BigEndian.PutUint64(k[1:], seed)
	return &chaosStream{begin, rand.NewChaCha8(k)}
}

// next fills b.
func (s *chaosStream) next(b []byte) []byte {
	n := copy(b, s.begin)
	s.begin = s.begin[n:]
	s.rest.Read(b[n:])
	return b
}

// A chaosReport is how it went for one end.
type chaosReport struct {
	sent, got        int
	sendErr, recvErr error  // recvErr is io.EOF at a clean end, nil if nothing was read
	head             []byte // of what it got
	wrong            bool   // it got something else than the other end's stream
	early            bool   // it closed before all was sent and the other end had ended, or with a reset
	reset            bool
	unread           bool // something was left to read when it closed early
}

func (r *chaosReport) String() string {
	if r == nil {
		return "no report"
	}
	return fmt.Sprintf("sent %d (%v), got %d (%v) %x, wrong %v, early %v, reset %v, unread %v",
		r.sent, r.sendErr, r.got, r.recvErr, r.head, r.wrong, r.early, r.reset, r.unread)
}

// play does what the script says.
func (s chaosScript) play(c halfConn, out, in *chaosStream) *chaosReport {
	r := &chaosReport{}
	wrote, heard := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(wrote)
		p := newPace(s.stall)
		buf := make([]byte, s.write)
		for r.sent < s.size && r.sendErr == nil {
			limit := s.size - r.sent
			switch {
			case s.after && r.sent < s.begin:
				limit = min(limit, s.begin-r.sent)
			case s.after:
				<-heard
			}
			var n int
			n, r.sendErr = c.Write(out.next(buf[:min(limit, p.size(s.write))]))
			r.sent += n
			p.stall()
		}
	}()
	go func() {
		defer close(heard)
		p := newPace(s.stall)
		buf, want := make([]byte, s.read), make([]byte, s.read)
		for r.recvErr == nil && s.end != ignore && s.end != deafen {
			var n int
			n, r.recvErr = c.Read(buf[:p.size(s.read)])
			r.head = append(r.head, buf[:min(n, 8-len(r.head))]...)
			r.wrong = r.wrong || !bytes.Equal(buf[:n], in.next(want[:n]))
			r.got += n
			p.stall()
		}
	}()

	if s.end == deafen {
		c.CloseRead()
	}
	if s.end == orderly {
		<-wrote
		c.CloseWrite()
		<-heard
	} else {
		done := wrote
		if s.wait {
			done = nil
		}
		select {
		case <-done:
		case <-time.After(s.life):
		}
		c.SetDeadline(time.Unix(1, 0))
		<-wrote
		<-heard
		r.unread = unread(c)
		if tcp, ok := c.(*net.TCPConn); ok && s.end == abandon {
			r.reset = true
			tcp.SetLinger(0)
		}
		r.early = r.reset || r.recvErr != io.EOF || r.sent < s.size
	}
	c.Close()
	if r.recvErr == io.EOF && errors.Is(r.sendErr, unix.ECONNRESET) {
		r.recvErr = r.sendErr // Linux tells of a reset once, and who reads after that gets an EOF
	}
	return r
}

// unread tells whether there is something to read.
func unread(c halfConn) (yes bool) {
	if raw, err := c.(syscall.Conn).SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			n, _, _ := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
			yes = n > 0
		})
	}
	return yes
}

// A pace varies the sizes of reads and writes, and the time between them.
type pace struct {
	every int
	left  time.Duration // for stalling
}

func newPace(every int) *pace { return &pace{every, 300 * time.Millisecond} }

func (p *pace) size(most int) int { return 1 + rand.IntN(most) }

func (p *pace) stall() {
	if p.left > 0 && rand.IntN(p.every) == 0 {
		d := rand.N(20 * time.Millisecond)
		p.left -= d
		<-time.After(d)
	}
}

// converse is the client.
func (ch *chaos) converse(seed uint64) {
	v := ch.newConversation(seed)
	v.daemon = ch.daemons[0]
	if v.poor {
		v.daemon = ch.daemons[1]
	}
	begun := time.Now()
	c, err := net.DialTimeout("tcp", v.daemon.addr, hostdirtest.Patience)
	if err != nil {
		ch.t.Errorf("seed %d: %v", seed, err)
		return
	}
	defer c.Close()
	c.SetDeadline(begun.Add(hostdirtest.Patience))
	v.addr = localAddr(c)
	ch.running.Store(seed, v)
	v.reports[0].Store(v.scripts[0].play(c.(halfConn), newChaosStream(v.begin, seed, 0), newChaosStream([]byte(answerBegin), seed, 1)))
	v.took = time.Since(begun)
}

// answer is the backend.
func (ch *chaos) answer(c *net.UnixConn, entry string, marker bool) {
	c.SetDeadline(time.Now().Add(hostdirtest.Patience))
	header, begin, err := readBegin(c)
	if err != nil {
		return // the client sent no more, or its report will tell
	}
	seed := binary.BigEndian.Uint64(begin[len(begin)-8:])
	running, ok := ch.running.Load(seed)
	if !ok {
		ch.t.Errorf("a backend got the seed %d, which nobody sent", seed)
		return
	}
	v, want := running.(*conversation), ""
	if v.entry != entry {
		ch.t.Errorf("seed %d: a client that asked for %s got to the backend of %s", seed, v.host, entry)
	}
	if marker {
		want = fmt.Sprintf("PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n", v.addr.Port(), netip.MustParseAddrPort(v.daemon.addr).Port())
	}
	if header != want || !bytes.Equal(begin, v.begin) {
		ch.t.Errorf("seed %d: a backend got the header %q, want %q, or another hello than was sent", seed, header, want)
	}
	report := v.scripts[1].play(c, newChaosStream([]byte(answerBegin), seed, 1), newChaosStream(nil, seed, 0))
	report.got += len(begin)
	if !v.reports[1].CompareAndSwap(nil, report) {
		ch.t.Errorf("seed %d: two backends got it", seed)
	}
}

// readBegin reads what comes before a client's stream proper: the PROXY header, if there is
// one, the hello, in any number of records, and the seed.
func readBegin(r io.Reader) (header string, begin []byte, err error) {
	next := func(n int) []byte {
		b := make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(r, b)
		}
		return b
	}
	b := next(1)
	if b[0] == 'P' {
		for header = "P"; err == nil && !strings.HasSuffix(header, "\n"); {
			header += string(next(1))
		}
		b = next(1)
	}
	var message []byte
	for want := 4; err == nil && len(message) < want; {
		b = append(b, next(4)...)
		content := next(int(b[3])<<8 | int(b[4]))
		begin = slices.Concat(begin, b, content)
		if message = append(message, content...); len(message) >= 4 {
			want = 4 + int(binary.BigEndian.Uint32(message)&0xffffff)
		}
		b = next(1)
	}
	begin = slices.Concat(begin, b, next(7))
	return header, begin, err
}

// judge looks at what both ends of each conversation of a round have reported.
func (ch *chaos) judge() {
	ch.running.Range(func(_, value any) bool {
		v := value.(*conversation)
		c, b := v.reports[0].Load(), v.reports[1].Load()
		if why := v.verdict(c, b); why != "" {
			ch.t.Errorf("seed %d: %s\nhost %s, poor %v, took %v, hello and seed %d bytes\nclient %+v\n%v\nbackend %+v\n%v",
				v.seed, why, v.host, v.poor, v.took, len(v.begin), v.scripts[0], c, v.scripts[1], b)
		}
		ch.all++
		if b == nil {
			ch.alone++
		} else if !c.early && !b.early {
			ch.whole++
		}
		return true
	})
	ch.running.Clear()
}

// verdict returns what must not be, if anything. A connection whose one end has left early
// may end in any way at the other, but for an end that looks clean and is none.
func (v *conversation) verdict(c, b *chaosReport) string {
	late := func(r *chaosReport) bool {
		return !r.early && (errors.Is(r.recvErr, os.ErrDeadlineExceeded) || errors.Is(r.sendErr, os.ErrDeadlineExceeded))
	}
	broken := func(r *chaosReport) bool { return isReset(r.recvErr) || isReset(r.sendErr) }
	switch {
	case late(c):
		return "the client waited in vain"
	case b == nil:
		return v.unserved(c)
	case late(b):
		return "the backend waited in vain"
	case c.wrong || b.wrong || c.got > b.sent || b.got > c.sent:
		return "one got what the other did not send"

	case c.recvErr == io.EOF && (c.got < b.sent || !b.early && b.sent < v.scripts[1].size):
		return "what the client got is cut short"

	// The poor daemon may cut a relay to make room for another, which the client must see: its
	// clean end, if any, came before.
	case v.poor:

	// A Unix socket cannot be closed with a reset, so a client's reset may look clean. A
	// client that leaves what it was sent unread resets its connection.
	case b.recvErr == io.EOF && b.got < c.sent && !c.reset && !(c.early && b.sent > 0):
		return "what the backend got is cut short"
	case broken(b) && !c.early && !b.early:
		return "the backend's connection broke, and the client had not left"

	case c.recvErr == io.EOF && b.unread && v.scripts[1].end != deafen:
		return "the client got a clean end of a connection that the backend reset"
	case broken(c) && !b.early:
		return "the client's connection broke, and the backend had not left"
	}
	return ""
}

// starved tells whether a client may have got an alert since there was no processor for so long:
// its hello was late, or its look-up, which waited for others, was given up.
func starved(alert int, took time.Duration) bool {
	return alert == int(sni.UserCanceled) && took >= limits.Hello || alert == int(sni.InternalError) && took >= limits.TaskPatience
}

// unserved is the verdict on a client that no backend knows.
func (v *conversation) unserved(c *chaosReport) string {
	// What follows a hello that is cut short is read as if it belonged to it, unless it was sent
	// after the answer.
	size := min(c.sent, sni.MaxHello)
	if v.scripts[0].after {
		size = min(size, len(v.begin))
	}
	sent := make([]byte, size)
	newChaosStream(v.begin, v.seed, 0).next(sent)
	var p sni.Parser
	_, done, err := p.Parse(sent)
	got := alert(c.head)
	want := -1
	switch {
	case err != nil:
		want = int(err.(sni.Alert).Description)
	case !done && v.took >= limits.Hello:
		want = int(sni.UserCanceled) // it waited for an answer before it ended
	case !done:
		want = int(sni.DecodeError)
	case v.fate == refused, v.fate == relayedOrRefused && got >= 0:
		want = int(sni.UnrecognizedName)
	}
	switch {
	case c.early, v.fate == careless:
	case v.fate == maybe && (got == int(sni.InternalError) || got == int(sni.UserCanceled)):
	case v.poor && (c.got == 0 || got == int(sni.InternalError)):
	case starved(got, v.took):
	case want < 0 && c.sent >= len(v.begin) && (v.fate == relayed || v.fate == relayedOrRefused):
		return "the client was not served"
	case want >= 0 && c.got == 0 && isReset(c.recvErr) && (v.took >= limits.Linger || c.sent > limits.LingerSize):
		// It was still sending when the proxy's patience was over.
	case got != want, want < 0 && c.got > 0, want >= 0 && c.recvErr != io.EOF && c.sendErr == nil:
		return fmt.Sprintf("the client got the alert %d, want %d", got, want)
	}
	return ""
}
