package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/hostdir"
	"sniproxy/sni"
)

// names are the NAMEs that are served, canonical. A client that names no host is served as the
// first.
type names []string

// parseNames returns the NAMEs of the arguments or, if there are none, that of the directory.
func parseNames(args []string, dir string) (names, error) {
	if len(args) == 0 {
		name, err := nameOf(dir)
		return names{name}, err
	}
	var all names
	for _, arg := range args {
		name, err := hostname.Parse(arg)
		if err != nil {
			return nil, fmt.Errorf("%q is no NAME: %w", arg, err)
		}
		all = append(all, string(name))
	}
	return all, nil
}

// nameOf returns the NAME that the host's directory has.
func nameOf(dir string) (string, error) {
	base := filepath.Base(dir)
	if hostdir.Hashed {
		return "", errors.New("give the NAME of the host: in a hashed build its directory does not tell")
	}
	if base == "*" || strings.HasPrefix(base, "*.") {
		return "", fmt.Errorf("give the NAMEs of the hosts: the directory %q is a wildcard's", base)
	}
	name, err := sni.AppendCanonical(nil, []byte(base))
	if err != nil || string(name) != base {
		return "", fmt.Errorf("go to the host's directory, or give the NAME of the host: the working directory, %q, is not called as a host", base)
	}
	return base, nil
}

// find returns the NAME that covers a host, which a client has named.
func (n names) find(host string) (name string, ok bool) {
	if host == "" {
		return n[0], true
	}
	canonical, err := sni.AppendCanonical(nil, []byte(host))
	if err != nil {
		return "", false
	}
	host = string(canonical)
	_, rest, dotted := strings.Cut(host, ".")
	for _, name := range n {
		if name == host || name == "*" || dotted && name == "*."+rest {
			return name, true
		}
	}
	return "", false
}

// wildcard returns the first NAME that is a wildcard, "" if there is none.
func (n names) wildcard() string {
	for _, name := range n {
		if strings.HasPrefix(name, "*") {
			return name
		}
	}
	return ""
}
