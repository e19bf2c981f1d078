package hostdirtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A UserFS is a file system in user space (FUSE): the kernel asks this process what is in it, and
// waits for the answers. See fuse(4), and linux/fuse.h for the protocol. Set the fields before
// Serve.
type UserFS struct {
	Dir     string        // where it is mounted
	Delay   time.Duration // of look-ups, except of files that are in the root
	Lazy    bool          // the kernel keeps what is written until the last who has the file closes it
	Endless bool          // reading a directory never comes to an end
	Held    chan *Request // requests that are not answered

	dev    *os.File // where the kernel asks
	served sync.WaitGroup

	mu       sync.Mutex
	nodes    []node // by their numbers, which begin with 1
	validity uint64 // for how many seconds the kernel may remember answers
	entries  uint64 // that were read of an endless directory

	holding atomic.Uint64 // operations that are not answered, as bits
}

type node struct {
	parent uint64
	name   string
	mode   uint32
	target string // of a symlink
}

// RootNode is the number of the root's node.
const RootNode = 1

// MountUserFS mounts a file system whose root has a type, such as unix.S_IFDIR. The kernel gets no
// answer to anything until Serve is called.
func MountUserFS(t testing.TB, dir string, kind uint32, options ...string) *UserFS {
	t.Helper()
	// Non-blocking, so that it can be closed while somebody waits for something to read.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("/dev/fuse: %v", err)
	}
	all := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other", fd, kind)
	all = strings.Join(append([]string{all}, options...), ",") // the last of two counts
	err = unix.Mount("stuck", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, all)
	if err != nil {
		unix.Close(fd)
		t.Skipf("mount of a file system in user space: %v", err)
	}
	fs := &UserFS{
		Dir:   dir,
		Held:  make(chan *Request, 100),
		dev:   os.NewFile(uintptr(fd), "/dev/fuse"),
		nodes: []node{{mode: kind | 0o755}},
	}
	t.Cleanup(fs.Abort)
	return fs
}

// Add adds a file, and returns the number of its node.
func (fs *UserFS) Add(parent uint64, name string, mode uint32, target string) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.nodes = append(fs.nodes, node{parent, name, mode, target})
	return uint64(len(fs.nodes))
}

// find returns the number of the node of a file, 0 if there is none.
func (fs *UserFS) find(parent uint64, name string) uint64 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for i, n := range fs.nodes {
		if n.parent == parent && n.name == name {
			return uint64(i + 1)
		}
	}
	return 0
}

func (fs *UserFS) node(n uint64) node {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.nodes[n-1]
}

// Serve answers the kernel from now on, which may remember the answers for some time.
func (fs *UserFS) Serve(validity time.Duration) {
	fs.validity = uint64(validity / time.Second)
	fs.served.Go(func() {
		buf := make([]byte, 128<<10)
		for {
			n, err := fs.dev.Read(buf)
			switch {
			case errors.Is(err, unix.ENOENT): // what was asked has been withdrawn
			case err != nil:
				return
			default:
				r := parseRequest(buf[:n])
				switch {
				case fs.holding.Load()&(1<<r.Opcode) != 0:
					fs.Held <- r
				case fs.Delay > 0 && r.Opcode == opLookup && (r.Node != RootNode || fs.find(r.Node, r.name()) == 0):
					time.AfterFunc(fs.Delay, func() { fs.Answer(r) })
				default:
					fs.Answer(r)
				}
			}
		}
	})
}

// Hold leaves what is asked from now on without an answer.
func (fs *UserFS) Hold() { fs.holding.Store(^uint64(1<<opInit | 1<<opInterrupt)) }

// HoldWrites does so with what is written.
func (fs *UserFS) HoldWrites() { fs.holding.Store(1 << opWrite) }

// Ignore stops reading what is asked.
func (fs *UserFS) Ignore() {
	fs.dev.SetReadDeadline(time.Now())
	fs.served.Wait()
}

// Abort ends the file system: whoever waits for an answer gets an error.
func (fs *UserFS) Abort() {
	if fs.dev.Close() == nil {
		fs.served.Wait()
		unix.Unmount(fs.Dir, unix.MNT_DETACH|unix.MNT_FORCE)
	}
}

// Break ends the file system and leaves it mounted: looking into it fails with ENOTCONN.
func (fs *UserFS) Break(t testing.TB) {
	fs.dev.Close()
	fs.served.Wait()
	t.Cleanup(func() { unix.Unmount(fs.Dir, unix.MNT_DETACH|unix.MNT_FORCE) })
}

// What the kernel asks: enum fuse_opcode of linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opReadlink    = 5
	opMknod       = 8
	opOpen        = 14
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opAccess      = 34
	opInterrupt   = 36
	opBatchForget = 42
)

// FUSE_WRITEBACK_CACHE, and FUSE_PARALLEL_DIROPS: the kernel looks up several names at once.
const (
	writebackCache = 1 << 16
	parallelDirops = 1 << 18
)

// A Request is something that the kernel asks.
type Request struct {
	requestHeader
	body []byte
}

// The structures of linux/fuse.h.
type (
	requestHeader struct { // fuse_in_header
		Len, Opcode   uint32
		Unique, Node  uint64
		UID, GID, PID uint32
		_             uint32
	}
	answerHeader struct { // fuse_out_header
		Len    uint32
		Error  int32
		Unique uint64
	}
	initAnswer struct { // fuse_init_out
		Major, Minor, MaxReadahead, Flags  uint32
		MaxBackground, CongestionThreshold uint16
		MaxWrite, TimeGran                 uint32
		_                                  [9]uint32
	}
	attr struct { // fuse_attr
		Ino, Size, Blocks uint64
		Times             [3]uint64
		Nanoseconds       [3]uint32
		Mode, Links       uint32
		UID, GID, Rdev    uint32
		BlockSize, Flags  uint32
	}
	openAnswer struct { // fuse_open_out
		Handle uint64
		_      [2]uint32
	}
	writeAnswer struct { // fuse_write_out
		Size, _ uint32
	}
	attrAnswer struct { // fuse_attr_out
		Valid uint64
		_     [2]uint32
		attr
	}
	entryAnswer struct { // fuse_entry_out
		Node, Generation      uint64
		EntryValid, AttrValid uint64
		_                     [2]uint32
		attr
	}
)

func parseRequest(b []byte) *Request {
	r := new(Request)
	binary.Decode(b, binary.NativeEndian, &r.requestHeader)
	r.body = bytes.Clone(b[binary.Size(r.requestHeader):])
	return r
}

// name returns the name of a file in a request, which is a C string.
func (r *Request) name() string {
	b := r.body
	if r.Opcode == opMknod {
		b = b[16:] // fuse_mknod_in
	}
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

func (r *Request) String() string {
	if r.Opcode == opLookup {
		return "look-up of " + r.name()
	}
	return fmt.Sprintf("operation %d on node %d", r.Opcode, r.Node)
}

// Answer answers a request, such as one that was held.
func (fs *UserFS) Answer(r *Request) {
	entry := func(n uint64) any {
		return &entryAnswer{Node: n, EntryValid: fs.validity, AttrValid: fs.validity, attr: fs.attr(n)}
	}
	switch r.Opcode {
	case opForget, opBatchForget, opInterrupt:
		// These want no answer.
	case opInit:
		a := initAnswer{Major: 7, Minor: 31, MaxWrite: 4096}
		if fs.Lazy {
			a.Flags |= writebackCache
		}
		if fs.Delay > 0 {
			a.Flags |= parallelDirops
		}
		fs.write(r, 0, &a)
	case opLookup:
		if n := fs.find(r.Node, r.name()); n != 0 {
			fs.write(r, 0, entry(n))
		} else {
			fs.write(r, unix.ENOENT, nil)
		}
	case opStatfs:
		fs.write(r, 0, make([]byte, 80)) // fuse_statfs_out
	case opReaddir:
		fs.write(r, 0, fs.readDir(binary.NativeEndian.Uint32(r.body[16:]))) // fuse_read_in: the size
	case opOpen, opOpendir:
		fs.write(r, 0, &openAnswer{Handle: r.Node})
	case opWrite:
		in := r.body[16:] // fuse_write_in: the size comes behind the handle and the offset
		fs.write(r, 0, &writeAnswer{Size: binary.NativeEndian.Uint32(in)})
	case opGetattr, opSetattr:
		fs.write(r, 0, &attrAnswer{Valid: fs.validity, attr: fs.attr(r.Node)})
	case opReadlink:
		fs.write(r, 0, []byte(fs.node(r.Node).target))
	case opMknod:
		mode := binary.NativeEndian.Uint32(r.body)
		fs.write(r, 0, entry(fs.Add(r.Node, r.name(), mode, "")))
	case opAccess, opFlush, opRelease, opReleasedir:
		fs.write(r, 0, nil)
	default:
		fs.write(r, unix.ENOSYS, nil)
	}
}

// readDir returns the next entries of a directory, as many as fit: fuse_dirent. There are none
// unless it is endless.
func (fs *UserFS) readDir(size uint32) (entries []byte) {
	for fs.Endless && len(entries)+40 <= int(size) {
		fs.entries++
		name := fmt.Sprintf("file-%011d", fs.entries)
		entries = binary.NativeEndian.AppendUint64(entries, fs.entries+1) // the inode
		entries = binary.NativeEndian.AppendUint64(entries, fs.entries)   // where the next one is
		entries = binary.NativeEndian.AppendUint32(entries, uint32(len(name)))
		entries = binary.NativeEndian.AppendUint32(entries, unix.DT_REG)
		entries = append(entries, name...)
	}
	return entries
}

func (fs *UserFS) attr(n uint64) attr {
	return attr{Ino: n, Mode: fs.node(n).mode, Links: 1, BlockSize: 4096}
}

// write writes an answer. It fails if nobody waits for it any more.
func (fs *UserFS) write(r *Request, errno unix.Errno, body any) {
	var b bytes.Buffer
	h := answerHeader{Error: -int32(errno), Unique: r.Unique}
	h.Len = uint32(binary.Size(h))
	if body != nil {
		h.Len += uint32(binary.Size(body))
	}
	binary.Write(&b, binary.NativeEndian, h)
	if body != nil {
		binary.Write(&b, binary.NativeEndian, body)
	}
	fs.dev.Write(b.Bytes())
}
