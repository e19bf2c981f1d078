package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
)

// Limits that sniproxy has as well.
const (
	lookupLimit = 10 * time.Second      // for a backend to be connected
	redialMin   = time.Millisecond      // first wait before a backend whose backlog is full is tried again; it doubles each time
	redialMax   = 64 * time.Millisecond // longest such wait
)

// A verdict is a line of output, and whether the host that it is about can be served.
type verdict struct {
	line string
	ok   bool
}

// judge returns what there is to say of a host.
func judge(h host) verdict {
	if h.wrong != "" {
		return verdict{line: h.label + ": " + h.wrong}
	}
	said := make(chan verdict, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread may get a working directory of its own
		said <- look(h)
	}()
	select {
	case v := <-said:
		return v
	case <-time.After(lookupLimit + time.Second): // to say why takes time as well
		return verdict{line: h.label + ": the look-up has waited for a file system until the time limit: what the entry, or its socket, leads to does not answer"}
	}
}

// look looks a host up and connects to its backend.
func look(h host) verdict {
	entry, ignored := string(h.entry), []string(nil)
	if h.name != nil {
		entry, ignored = hostdir.Deciding(h.name)
	}
	elsewhere := onAnother(entry)
	marks, slow, err := dial(h)
	var remarks []string
	remark := func(format string, args ...any) { remarks = append(remarks, fmt.Sprintf(format, args...)) }
	if entry != "" {
		remarks = misspelt(entry)
	}
	say := func(ok bool, text string) verdict {
		return verdict{h.label + ": " + strings.Join(append([]string{text}, remarks...), "; "), ok}
	}

	if err != nil {
		return say(false, explain(entry, ignored, err))
	}
	if slices.Contains(ignored, string(h.entry)) {
		return say(false, fmt.Sprintf("it does not count, %s serves its clients: %s", starred(h, entry), chown(string(h.entry))))
	}
	for _, e := range ignored {
		remark("%s does not count: %s", starred(h, e), chown(e))
	}
	if _, err := os.Lstat(entry + "/log-connections"); err == nil && !marks.Log {
		remark("log-connections does not count: %s", chown(entry+"/log-connections"))
	}
	if slow && elsewhere {
		remark("it leads to another file system, which may keep look-ups waiting")
	}
	text := "ok"
	if marks.Proxy > 0 {
		text += fmt.Sprintf(", PROXY v%d", marks.Proxy)
	}
	if marks.Log || hostdir.LogAll() {
		text += ", logged"
	}
	if entry != string(h.entry) && entry != "" {
		text += ", served by " + starred(h, entry)
	}
	return say(true, text)
}

// onAnother tells whether the socket of an entry is on another file system than the hosts directory. After it the system
// has what there is to know of the socket in its cache, so that it does not have to be waited for just once.
func onAnother(entry string) bool {
	var hosts, socket unix.Stat_t
	return unix.Stat(entry+"/tls-socket", &socket) == nil && unix.Stat(".", &hosts) == nil && socket.Dev != hosts.Dev
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

// redial connects, as sniproxy does: while the backlog of the backend is full, or the directory is exchanged, it tries
// again. The connection is closed.
func redial(dial func([]byte) (int, hostdir.Marks, error), what []byte) (hostdir.Marks, error) {
	deadline := time.Now().Add(lookupLimit)
	for wait := redialMin; ; wait = min(2*wait, redialMax) {
		fd, marks, err := dial(what)
		if err == nil {
			unix.Close(fd)
		}
		again := isProblem(err, hostdir.BacklogFull) || isProblem(err, hostdir.Exchanged)
		if !again || time.Now().Add(wait).After(deadline) {
			return marks, err
		}
		time.Sleep(wait)
	}
}

func isProblem(err error, p hostdir.Problem) bool {
	var e *hostdir.Error
	return errors.As(err, &e) && e.Problem == p
}
