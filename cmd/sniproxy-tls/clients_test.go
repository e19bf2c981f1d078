package main

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// Goal: at the stop the server is told only when no client is in the handshake or sending the head
// of a request: it would drop them. It is told at the latest when the time is over.
func TestStopWaits(t *testing.T) {
	for name, coming := range map[string]func(*client){
		"handshake": func(c *client) { c.wait.Store(waitHandshake) },
		"head": func(c *client) {
			c.wait.Store(5)
			c.last.Store(7)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				set := newClients()
				p := newProxy(names{"one.example"}, &service{network: "tcp"}, set)
				c := set.admit(&net.TCPConn{})
				coming(c)
				told := make(chan struct{})
				p.server.RegisterOnShutdown(func() { close(told) })
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				go p.stop(ctx)
				select {
				case <-told:
					t.Error("the server was told while a client was coming")
				case <-time.After(9 * time.Second):
				}
				c.wait.Store(c.last.Load()) // idle
				select {
				case <-told:
				case <-time.After(time.Second / 2):
					t.Error("the server was not told although no client was coming")
				}
				synctest.Wait()
			})
		})
	}
}
