package main

import (
	"fmt"
	"net"
	"testing"
	"time"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: a tenant with hundreds of hosts that take nothing of what they are handed has no more under way
// than he may, and clients of another tenant are all handed over; when his backends die, or take what
// they were handed, he can be handed connections again.
func TestHandedShares(t *testing.T) {
	hostdirtest.NeedRoot(t)
	const hosts, clients = 100, 8
	d := start(t)
	var deaf []*net.UnixConn
	for i := range hosts {
		name := fmt.Sprintf("deaf%d.example", i)
		deaf = append(deaf, d.bindDatagram(name))
		d.give(name, greedy)
	}
	d.serveHanded("modest.example", greetHanded)
	d.give("modest.example", modest)
	var crowd []interface{ Close() error }
	for i := range hosts {
		for _, c := range d.crowd(clients, snitest.Hello(fmt.Sprintf("deaf%d.example", i))) {
			crowd = append(crowd, c)
		}
	}
	most := 0
	for range 100 {
		if err := d.greeted("modest.example"); err != nil {
			t.Error(err)
		}
		if c := d.counters(); c.handed > most {
			most = c.handed
		}
	}
	// What the other tenant was handed is counted as well.
	if under := most - 100; under > 256 || under < 32 {
		t.Errorf("of a tenant who takes nothing %d connections are under way", under)
	}
	for _, c := range crowd {
		c.Close()
	}
	for _, l := range deaf {
		l.Close() // with what it was handed
	}
	l := d.bindDatagram("deaf0.example")
	client := d.dial()
	client.SetDeadline(time.Now().Add(2 * hostdirtest.Patience))
	client.Write(snitest.Hello("deaf0.example"))
	c, _ := receive(t, l)
	ping(t, client, c)
}
