package report

import (
	"sync"
	"time"

	"sniproxy/cmd/internal/logline"
	"sniproxy/hostdir"
)

// AcceptProxy knows whether connections must begin with a PROXY protocol header: whether there is
// an .accept-proxy of the administrator's in the hosts directory. It is asked at least once a
// second, also while there are no connections, so that the first one after a pause does not go by
// an old answer.
type AcceptProxy struct {
	asker
	hosts   *hostdir.Hosts
	ignored string // why a marker does not count, as it was said last
	err     error  // of the last try to find out
}

// acceptProxyPeriod is less than a second, since a tick may be late.
const acceptProxyPeriod = 900 * time.Millisecond

// NewAcceptProxy returns an AcceptProxy, once it has the first answer, if that does not take too
// long.
func NewAcceptProxy(hosts *hostdir.Hosts) *AcceptProxy {
	a := &AcceptProxy{hosts: hosts}
	first := make(chan error, 1)
	say := sync.OnceFunc(func() { first <- a.err })
	a.start(a.find, func() {
		say()
		a.busy.Store(false)
	})
	a.ask()
	if err := atStart(first); err != nil {
		logline.Err("cannot find out whether there is an .accept-proxy in the hosts directory, so PROXY protocol headers are refused until it can be found out: %v", err)
	}
	go func() {
		for range time.Tick(acceptProxyPeriod) {
			a.ask()
		}
	}()
	return a
}

// Yes tells whether a connection that is accepted now must begin with a PROXY protocol header.
func (a *AcceptProxy) Yes() bool { return a.yes.Load() }

var ignoredMarkers = logline.NewLimiter(10*time.Second, 5)

// find finds it out, and says so if there is a marker that does not count. Whoever may add hosts
// can make such a marker over and over, so the lines are limited.
func (a *AcceptProxy) find() (bool, error) {
	yes, ignored, err := a.hosts.AcceptProxy()
	a.err = err
	if err != nil || ignored == a.ignored {
		return yes, err
	}
	if ignored == "" {
		a.ignored = ""
	} else if ignoredMarkers.Allow() {
		a.ignored = ignored
		logline.Err(".accept-proxy in the hosts directory does not count: %s", ignored)
	}
	return yes, nil
}
