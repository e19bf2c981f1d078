//go:build linux

package epoll

import "sniproxy/sni"

// A table has the connections of a loop by their numbers.
type table struct {
	all  []*conn
	free []*conn
}

// find returns the connection that an event is about, nil if that has ended: its number may be used
// again, but not with the same generation.
func (t *table) find(k token) *conn {
	if c := t.all[k.number]; c.generation == k.generation() {
		return c
	}
	return nil
}

func (t *table) add() *conn {
	if n := len(t.free); n > 0 {
		c := t.free[n-1]
		t.free = t.free[:n-1]
		return c
	}
	c := &conn{number: int32(len(t.all))}
	t.all = append(t.all, c)
	return c
}

// release makes a connection that has ended available for a new one.
func (t *table) release(c *conn) {
	*c = conn{number: c.number, generation: nextGeneration(c.generation)}
	t.free = append(t.free, c)
}

// take removes a connection that goes elsewhere.
func (t *table) take(c *conn) {
	t.all[c.number] = &conn{number: c.number, generation: nextGeneration(c.generation)}
	t.free = append(t.free, t.all[c.number])
}

// put takes in a connection that comes from elsewhere.
func (t *table) put(c *conn) {
	place := t.add()
	c.number, c.generation = place.number, place.generation
	t.all[c.number] = c
}

// Names are those that the latest relays were begun with: a name is wanted if the backend does not
// answer, and until then not worth memory for each connection.
type names [recentNames]struct {
	number, next int32 // of the relay, and the generation after its own
	size         int16 // 0 for a client that named no host
	name         [sni.MaxName]byte
}

func (n *names) put(c *conn, name []byte) {
	r := &n[c.number%recentNames]
	r.number, r.next = c.number, c.generation+1
	r.size = int16(copy(r.name[:], name))
}

// of returns the name of c, nil if it is not known any more.
func (n *names) of(c *conn) []byte {
	r := &n[c.number%recentNames]
	if r.number != c.number || r.next != c.generation+1 {
		return nil
	}
	return r.name[:r.size]
}

// A queue is a list of connections in the order of their deadlines. They come in this order, since
// all have the same time.
type queue struct{ first, last *conn }

// due returns the first deadline, 0 if there is none.
func (q *queue) due() int64 {
	if q.first == nil {
		return 0
	}
	return q.first.deadline
}

func (q *queue) push(c *conn, deadline int64) {
	c.queue, c.prev, c.next, c.deadline = q, q.last, nil, deadline
	if q.last == nil {
		q.first = c
	} else {
		q.last.next = c
	}
	q.last = c
}

// leaveQueue takes c out of the queue that it is in, if any.
func (c *conn) leaveQueue() {
	q := c.queue
	if q == nil {
		return
	}
	if c.prev == nil {
		q.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		q.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.queue, c.prev, c.next = nil, nil, nil
}
