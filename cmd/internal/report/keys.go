package report

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"sniproxy/cmd/internal/logline"
	"sniproxy/hostdir"
	"sniproxy/sni/ech"
)

// Keys has the keys for Encrypted Client Hello, which are in the directory .ech of the hosts
// directory. It is looked at at least once a second, by a goroutine of its own: whatever keeps that
// waiting keeps nobody else.
type Keys struct {
	hosts *hostdir.Hosts
	now   atomic.Pointer[[]*ech.Key] // nil if there are none

	// Of the goroutine.
	files   map[string]*keyFile
	ignored string // what was said last: why .ech does not count,
	failed  string // and why it could not be looked at
	more    int    // how many files beyond the limit there were
}

// A keyFile is a file in .ech, as it was last.
type keyFile struct {
	content []byte
	key     *ech.Key // what it held when it was good last, nil if it never was
	bad     string   // why it is not good now
}

// NewKeys returns Keys, once it has looked at the directory, if that does not take too long.
func NewKeys(hosts *hostdir.Hosts) *Keys {
	k := &Keys{hosts: hosts}
	first := make(chan error, 1)
	go func() {
		k.look()
		first <- nil
		for range time.Tick(acceptProxyPeriod) {
			k.look()
		}
	}()
	if err := atStart(first); err != nil {
		logline.Err(keysUnknown, err)
	}
	return k
}

const keysUnknown = "cannot look at .ech in the hosts directory, so its keys stay as they were: %v"

// Get returns the keys for a hello that comes now, none if Encrypted Client Hellos pass unchanged.
func (k *Keys) Get() []*ech.Key {
	if keys := k.now.Load(); keys != nil {
		return *keys
	}
	return nil
}

// look looks at the directory. Lines say what is new.
func (k *Keys) look() {
	files, more, ignored, err := k.hosts.KeyFiles()
	if err != nil {
		if text := err.Error(); text != k.failed {
			k.failed = text
			logline.Err(keysUnknown, err)
		}
		return
	}
	k.failed = ""
	if ignored != k.ignored && (ignored == "" || ignoredMarkers.Allow()) {
		if k.ignored = ignored; ignored != "" {
			logline.Err(".ech in the hosts directory does not count: %s", ignored)
		}
	}
	if more > 0 && k.more == 0 {
		logline.Err(".ech in the hosts directory has %d files, but only the first %d by name count: remove old keys", len(files)+more, hostdir.MaxKeys)
	}
	k.more = more
	k.read(files)
}

// read reads the keys in files.
func (k *Keys) read(files []hostdir.KeyFile) {
	was := k.files
	k.files = nil
	var keys []*ech.Key
	var names []string
	for _, f := range files {
		file := was[f.Name]
		if file == nil {
			file = &keyFile{}
		}
		file.update(f)
		if k.files == nil {
			k.files = map[string]*keyFile{}
		}
		k.files[f.Name] = file
		if key := file.key; key != nil && !slices.ContainsFunc(keys, key.Equal) {
			keys = append(keys, key)
			names = append(names, fmt.Sprintf("%s (public name %s, config id %d)", f.Name, key.PublicName(), key.ID()))
		}
	}
	if slices.EqualFunc(keys, k.Get(), (*ech.Key).Equal) {
		return
	}
	if len(keys) == 0 {
		k.now.Store(nil)
		logline.Err("no keys for Encrypted Client Hello are in use any more")
		return
	}
	k.now.Store(&keys)
	logline.Err("keys for Encrypted Client Hello in use: %s", strings.Join(names, ", "))
}

// update takes over what a file is now. One that is no good is named, and what it held before goes
// on.
func (f *keyFile) update(now hostdir.KeyFile) {
	err := now.Err
	if err == nil {
		if f.key != nil && f.bad == "" && bytes.Equal(now.Content, f.content) {
			return
		}
		var key *ech.Key
		if key, err = ech.ParseKey(now.Content); err == nil {
			f.key, f.content, f.bad = key, now.Content, ""
			return
		}
	}
	if f.bad == err.Error() {
		return
	}
	f.bad = err.Error()
	goes := "there is no key from before"
	if f.key != nil {
		goes = "the key that it held before stays in use"
	}
	logline.Err("key file .ech/%s in the hosts directory is no good: %s; %s", now.Name, f.bad, goes)
}
