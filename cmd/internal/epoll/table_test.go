//go:build linux

package epoll

import (
	"testing"
)

// Goal: an event for a connection that has ended is not taken for the next one with its number, and
// a connection that moves to another loop leaves its number to others.
func TestTable(t *testing.T) {
	var table, next table
	a := table.add()
	first := token{a.number, a.generation << 1}
	if table.find(first) != a {
		t.Fatal("a new connection is not found")
	}
	table.release(a)
	b := table.add()
	if b.number != first.number {
		t.Errorf("the number %d is not used again, but %d", first.number, b.number)
	}
	if c := table.find(first); c != nil {
		t.Errorf("an event for a connection that has ended finds %+v", c)
	}
	second := token{b.number, b.generation<<1 | int32(backend)}
	if table.find(second) != b {
		t.Error("an event on the side of the backend does not find its connection")
	}

	table.take(b)
	if c := table.find(second); c != nil {
		t.Errorf("an event for a connection that has moved finds %+v", c)
	}
	next.add()
	next.put(b)
	if next.find(token{b.number, b.generation << 1}) != b || b.number != 1 {
		t.Errorf("the connection that has moved is not found as number %d", b.number)
	}
	if c := table.add(); c == b || c.number != second.number {
		t.Errorf("got number %d, want that of the connection that has moved, %d", c.number, second.number)
	}
}

// Goal: a name is that of the relay, until another one takes its place.
func TestNames(t *testing.T) {
	var table table
	var names names
	a := table.add()
	if got := names.of(a); got != nil {
		t.Errorf("got %q before there was a name", got)
	}
	names.put(a, []byte("a.example"))
	if got := names.of(a); string(got) != "a.example" {
		t.Errorf("got %q", got)
	}
	names.put(a, nil)
	if got := names.of(a); got == nil || len(got) > 0 {
		t.Errorf("got %q for a client that named no host", got)
	}
	table.release(a)
	b := table.add()
	if got := names.of(b); got != nil {
		t.Errorf("got %q, the name of a relay that has ended", got)
	}
	names.put(b, []byte("b.example"))
	later := conn{number: b.number + recentNames}
	names.put(&later, []byte("c.example"))
	if got := names.of(b); got != nil {
		t.Errorf("got %q, the name of a later relay", got)
	}
}

// Goal: a generation never runs over the bit of the side.
func TestGeneration(t *testing.T) {
	const last = 1<<30 - 1
	if g := nextGeneration(last); g != 0 {
		t.Errorf("after the last generation comes %d, want 0", g)
	}
	if detail := int32(last)<<1 | int32(backend); detail>>1&last != last || detail&1 != 1 {
		t.Errorf("generation %d does not fit into an event", last)
	}
}

// Goal: a queue is in the order of its deadlines, whoever leaves it.
func TestQueue(t *testing.T) {
	var q queue
	if q.due() != 0 {
		t.Errorf("an empty queue is due at %d", q.due())
	}
	conns := make([]conn, 4)
	for i := range conns {
		q.push(&conns[i], int64(i+1))
	}
	conns[0].leaveQueue()
	conns[2].leaveQueue()
	conns[2].leaveQueue() // it is in no queue any more
	if q.due() != 2 || q.first.next != &conns[3] || q.last != &conns[3] {
		t.Errorf("due at %d, want 2, and then the last one", q.due())
	}
	conns[3].leaveQueue()
	conns[1].leaveQueue()
	if q.due() != 0 || q.last != nil {
		t.Error("a queue that all have left is not empty")
	}
}

// Goal: what a flow cannot send is taken out of the pipe, byte for byte, and the pipe is empty
// then.
func TestPipeDrain(t *testing.T) {
	p, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	if n, errno := write(p.in, []byte("some bytes")); n != 10 || errno != 0 {
		t.Fatalf("wrote %d bytes, error %v", n, errno)
	}
	if got := p.drain(10); string(got) != "some bytes" {
		t.Errorf("got %q", got)
	}
	if got := p.drain(1); got != nil || p.in == 0 {
		t.Errorf("got %q from an empty pipe, which is %+v now", got, p)
	}
	closeFd(p.in)
	closeFd(p.out)
}
