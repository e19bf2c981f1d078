package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/acme"

	"sniproxy/cmd/internal/logline"
)

// Package autocert, which does much of this, makes an order when a client comes, up to two for each
// failure, and more for clients that know no ECDSA; tries again after a minute each time, for which
// ACME servers stop answering; and does not say why a validation failed. So this uses what is below
// it, package acme.

const (
	// orderTimeout is how long an order may take.
	orderTimeout = 5 * time.Minute

	// ordersAtOnce is how many orders are under way at a time.
	ordersAtOnce = 4

	// sleepMost is the longest sleep: the clock may have been set, or the machine suspended.
	sleepMost = time.Hour

	// slowMost is how much later than the ACME server's this machine's clock may be.
	slowMost = 10 * time.Minute

	// nonceTries is how often a request is made again because the server does not take its nonce.
	nonceTries = 10
)

// After a failure, an order is made again after a pause, which doubles each time. Let's Encrypt
// allows five failed validations of a name in an hour. Tests shorten them.
var (
	pauseFirst = time.Minute
	pauseMost  = time.Hour
)

// orders get a certificate for each NAME from an ACME server, and renew it.
type orders struct {
	server string // the URL of its directory
	email  string
	state  *state
	files  *files // while there are such, nothing is ordered
	hosts  map[string]*ordered
	slots  chan struct{}

	mu         sync.Mutex
	challenges map[string]*tls.Certificate // by NAME, while the server validates it
}

// An ordered is a NAME and its certificate.
type ordered struct {
	name  string
	cert  atomic.Pointer[tls.Certificate] // nil: there is none yet
	tried chan struct{}                   // closed after the first order
}

func newOrders(server, email string, state *state, files *files) *orders {
	o := &orders{
		server: server, email: email, state: state, files: files,
		hosts:      make(map[string]*ordered),
		slots:      make(chan struct{}, ordersAtOnce),
		challenges: make(map[string]*tls.Certificate),
	}
	for _, name := range files.names {
		if o.hosts[name] == nil {
			o.hosts[name] = &ordered{name: name, tried: make(chan struct{})}
		}
	}
	return o
}

// start begins to order and renew.
func (o *orders) start() {
	for _, h := range o.hosts {
		go o.keep(h)
	}
}

// get returns the certificate of a NAME. If the first order is under way, it waits for that.
func (o *orders) get(ctx context.Context, name string) (*tls.Certificate, error) {
	h := o.hosts[name]
	cert := h.cert.Load()
	if !valid(cert) {
		select {
		case <-h.tried:
		case <-ctx.Done():
		}
		cert = h.cert.Load()
	}
	if !valid(cert) {
		return nil, fmt.Errorf("no certificate for %s yet", name)
	}
	return cert, nil
}

// valid reports whether a certificate can be served. The clock of this machine may be a little
// slow.
func valid(cert *tls.Certificate) bool {
	now := time.Now()
	return cert != nil && !now.Add(slowMost).Before(cert.Leaf.NotBefore) && !now.After(cert.Leaf.NotAfter)
}

// renewal returns when a certificate is to be renewed: when two thirds of its time are over.
func renewal(cert *tls.Certificate) time.Time {
	if !valid(cert) {
		return time.Time{}
	}
	return cert.Leaf.NotAfter.Add(-lifetime(cert) / 3)
}

func lifetime(cert *tls.Certificate) time.Duration {
	return cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
}

// keep has a good certificate for a NAME, for as long as the program runs.
func (o *orders) keep(h *ordered) {
	attempted := sync.OnceFunc(func() { close(h.tried) })
	failures := 0
	for {
		if o.files.pair.Load() != nil {
			attempted()
			time.Sleep(rereadEvery)
			continue
		}
		// Another process may have renewed it.
		if kept := o.state.load(h.name); valid(kept) && (!valid(h.cert.Load()) || kept.Leaf.NotAfter.After(h.cert.Load().Leaf.NotAfter)) {
			h.cert.Store(kept)
		}
		if wait := time.Until(renewal(h.cert.Load())); wait > 0 {
			attempted()
			time.Sleep(min(jitter(wait), sleepMost))
			continue
		}
		cert, err := o.order(h.name)
		if err == nil {
			h.cert.Store(cert)
			attempted()
			failures = 0
			logline.Err("%s: new certificate, valid until %s", h.name, date(cert.Leaf.NotAfter))
			// A server that gives out what is to be renewed at once is not asked at once.
			time.Sleep(jitter(min(pauseFirst, lifetime(cert)/3)))
			continue
		}
		attempted()
		failures++
		wait := pauseAfter(failures, h.cert.Load(), err)
		logline.Err("%s: cannot get a certificate: %s; %s; next try in %v", h.name, describe(err), remaining(h.cert.Load()), wait.Round(time.Second))
		time.Sleep(wait)
	}
}

// pauseAfter returns how long to wait after so many failures, of which the last is err. A
// certificate that is still valid leaves time for three more tries, unless the server forbids that.
func pauseAfter(failures int, cert *tls.Certificate, err error) time.Duration {
	wait := min(pauseFirst<<min(failures-1, 20), pauseMost)
	if valid(cert) {
		wait = max(min(wait, time.Until(cert.Leaf.NotAfter)/4), min(pauseFirst, wait))
	}
	if limit, ok := acme.RateLimit(err); ok {
		wait = max(wait, limit)
	}
	return wait + jitter(wait/10)
}

// remaining tells what clients get in the meantime.
func remaining(cert *tls.Certificate) string {
	if !valid(cert) {
		return "clients are refused until then"
	}
	return "the old one is valid until " + date(cert.Leaf.NotAfter)
}

// jitter returns a little less than d, so that programs that were started together, and hosts of
// one, do not all come at the same moment.
func jitter(d time.Duration) time.Duration {
	if d < 20 {
		return d
	}
	return d - mathrand.N(d/20)
}

// order gets a certificate, and keeps it in the state directory.
func (o *orders) order(name string) (*tls.Certificate, error) {
	o.slots <- struct{}{}
	defer func() { <-o.slots }()
	ctx, cancel := context.WithTimeout(context.Background(), orderTimeout)
	defer cancel()
	client, err := o.register(ctx)
	if err != nil {
		return nil, err
	}
	order, err := client.AuthorizeOrder(ctx, acme.DomainIDs(name))
	if err != nil {
		return nil, err
	}
	for _, uri := range order.AuthzURLs {
		if err := o.authorize(ctx, client, name, uri); err != nil {
			return nil, err
		}
	}
	if order, err = client.WaitOrder(ctx, order.URI); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	request := &x509.CertificateRequest{DNSNames: []string{name}}
	if len(name) <= 64 { // the longest common name
		request.Subject = pkix.Name{CommonName: name}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, request, key)
	if err != nil {
		return nil, err
	}
	chain, _, err := client.CreateCertFromOrder(ctx, order, csr, true)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	for _, der := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	cert, err := tls.X509KeyPair(text, text)
	if err == nil {
		err = cert.Leaf.VerifyHostname(name)
	}
	if err == nil && !valid(&cert) {
		err = fmt.Errorf("it is valid from %s to %s: is the clock right?", date(cert.Leaf.NotBefore), date(cert.Leaf.NotAfter))
	}
	if err != nil {
		return nil, fmt.Errorf("the ACME server gave one that is no good: %w", err)
	}
	if err := o.state.store(name, text); err != nil {
		logline.Err("%s: cannot keep the new certificate, so the next start orders another: %v", name, err)
	}
	return &cert, nil
}

// register returns a client for the account, which it makes if there is none yet. There is a new
// client for each order: so it finds out if the server has forgotten the account, or has moved.
func (o *orders) register(ctx context.Context) (*acme.Client, error) {
	key, err := o.state.account()
	if err != nil {
		return nil, err
	}
	client := &acme.Client{
		Key:          key,
		DirectoryURL: o.server,
		UserAgent:    "sniproxy-tls",
		HTTPClient:   &http.Client{Timeout: time.Minute},
		RetryBackoff: backoff,
	}
	account := &acme.Account{}
	if o.email != "" {
		account.Contact = []string{"mailto:" + o.email}
	}
	switch _, err := client.Register(ctx, account, acme.AcceptTOS); err {
	case nil:
		return client, nil
	case acme.ErrAccountAlreadyExists:
	default:
		return nil, err
	}
	if o.email != "" {
		known, err := client.GetReg(ctx, "")
		if err == nil && !slices.Equal(known.Contact, account.Contact) {
			_, err = client.UpdateReg(ctx, account)
		}
		if err != nil {
			logline.Err("the ACME server does not take %q as the address of the account: %s", o.email, describe(err))
		}
	}
	return client, nil
}

// backoff tells when a request is made again: soon, if just its nonce was too old. All else is a
// failed order, after which there is a pause.
func backoff(n int, _ *http.Request, res *http.Response) time.Duration {
	if res.StatusCode == http.StatusBadRequest && n <= nonceTries { // otherwise it is not asked
		return 10 * time.Millisecond
	}
	return -1
}

// authorize shows the server that the name leads here.
func (o *orders) authorize(ctx context.Context, client *acme.Client, name, uri string) error {
	authorization, err := client.GetAuthorization(ctx, uri)
	if err != nil {
		return err
	}
	if authorization.Status == acme.StatusValid {
		return nil
	}
	i := slices.IndexFunc(authorization.Challenges, func(c *acme.Challenge) bool { return c.Type == "tls-alpn-01" })
	if i < 0 {
		return errors.New("the ACME server does not offer the challenge tls-alpn-01")
	}
	challenge := authorization.Challenges[i]
	cert, err := client.TLSALPN01ChallengeCert(challenge.Token, name)
	if err != nil {
		return err
	}
	o.setChallenge(name, &cert)
	defer o.setChallenge(name, nil)
	if _, err := client.Accept(ctx, challenge); err != nil {
		return err
	}
	_, err = client.WaitAuthorization(ctx, uri)
	return err
}

func (o *orders) setChallenge(name string, cert *tls.Certificate) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if cert == nil {
		delete(o.challenges, name)
		return
	}
	o.challenges[name] = cert
}

// challenge returns the certificate for a connection that validates the name, nil if nobody has
// asked for that.
func (o *orders) challenge(name string) *tls.Certificate {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.challenges[name]
}

// describe says why an order failed, and what to do.
func describe(err error) string {
	if failed, ok := errors.AsType[*acme.AuthorizationError](err); ok {
		var reasons []string
		for _, reason := range failed.Errors {
			reasons = append(reasons, detail(reason))
		}
		return fmt.Sprintf("the ACME server cannot validate the name: %s: does the name lead to this machine, and port 443 to sniproxy?", printable(strings.Join(reasons, "; ")))
	}
	if failed, ok := errors.AsType[*acme.OrderError](err); ok && failed.Problem != nil {
		err = failed.Problem
	}
	if refused, ok := errors.AsType[*acme.Error](err); ok {
		return "the ACME server refuses: " + printable(detail(refused))
	}
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, context.DeadlineExceeded) {
		return "cannot reach the ACME server: " + printable(err.Error())
	}
	return printable(err.Error())
}

// detail returns what an ACME server says of an error.
func detail(err error) string {
	e, ok := errors.AsType[*acme.Error](err)
	if !ok || e.Detail == "" {
		return err.Error()
	}
	details := []string{e.Detail}
	for _, sub := range e.Subproblems {
		details = append(details, sub.Detail)
	}
	return strings.Join(details, "; ")
}
