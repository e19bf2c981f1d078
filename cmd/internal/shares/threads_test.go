package shares

import (
	"fmt"
	"testing"
	"time"

	"sniproxy/hostdir"
)

// threadsFor returns threads for an empty hosts directory.
func threadsFor(t *testing.T) *Threads {
	t.Helper()
	t.Chdir(t.TempDir())
	hosts, err := hostdir.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.Close)
	return newThreads(hosts)
}

// Goal: while the system has no room for another thread, the threads that there were at the start
// go on with whatever tasks come.
func TestThreadsNoRoom(t *testing.T) {
	s := threadsFor(t)
	s.mu.Lock()
	s.room = func() bool { return false }
	s.mu.Unlock()
	tenants := newTenants()
	// More tasks than threads at once, again and again: each round, some threads might end.
	for round := range 20 {
		const tasks = 8
		done := make(chan int, tasks)
		for i := range tasks {
			tenant := tenants.Unknown(fmt.Append(nil, i))
			s.Start(&Task{Tenant: tenant, Entry: tenant.entry, Do: func(*hostdir.Dialer) { done <- i }})
			tenant.Release()
		}
		for n := range tasks {
			select {
			case <-done:
			case <-time.After(30 * time.Second):
				t.Fatalf("in round %d nobody does more than %d tasks", round, n)
			}
		}
	}
}

// Goal: a task that waits behind others that are stuck is given up, and run if they are not.
func TestThreadsPatience(t *testing.T) {
	s := threadsFor(t)
	tenant := newTenants().Unknown([]byte("slow.example"))
	stuck := make(chan struct{})
	defer close(stuck)
	what := make(chan string)
	start := func(entry string, do func(*hostdir.Dialer)) {
		s.Start(&Task{Tenant: tenant, Entry: entry, Do: do, GiveUp: func() { go func() { what <- "given up" }() }})
	}
	for range 4 {
		start("a", func(*hostdir.Dialer) { <-stuck })
	}
	start("a", func(*hostdir.Dialer) { what <- "run" })
	if got := <-what; got != "given up" {
		t.Errorf("behind tasks that are stuck a task was %s", got)
	}
	start("b", func(*hostdir.Dialer) { what <- "run" })
	if got := <-what; got != "run" {
		t.Errorf("a task for another entry was %s", got)
	}
}

// Goal: when a thread that was left behind comes back it is not taken for one that has time: each
// task still gets a thread.
func TestThreadsComeBack(t *testing.T) {
	s := threadsFor(t)
	tenant := newTenants().Unknown([]byte("slow.example"))
	stuck := make(chan struct{})
	defer close(stuck)
	begun := make(chan struct{})
	start := func() {
		t.Helper()
		s.Start(&Task{Tenant: tenant, Do: func(*hostdir.Dialer) {
			begun <- struct{}{}
			<-stuck
		}})
		select {
		case <-begun:
		case <-time.After(30 * time.Second):
			t.Fatal("nobody does a task")
		}
	}
	start()
	left := Task{Tenant: tenant}
	s.LeaveBehind(&left)
	s.ComeBack(&left)
	start()
	start()
}
