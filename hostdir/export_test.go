package hostdir

import "errors"

// UsePaths makes dialers work with paths, as where unshare(2) is forbidden.
func (h *Hosts) UsePaths() { h.paths = errors.New("this is a test") }
