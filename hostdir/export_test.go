package hostdir

import "errors"

// UsePaths makes dialers work with paths, as where unshare(2) is forbidden.
func (h *Hosts) UsePaths() { h.paths = errors.New("this is a test") }

// PathsOnly returns why dialers work with paths, nil if they need not.
func (h *Hosts) PathsOnly() error { return h.paths }

// Administrator reports whether a user is the administrator.
func (h *Hosts) Administrator(uid uint32) bool { return h.isAdministrator(uid) }

// Unmapped reports whether the hosts directory belongs to the overflow uid.
func (h *Hosts) Unmapped() bool {
	owner, err := h.owner()
	return err == nil && h.Overflow(owner)
}
