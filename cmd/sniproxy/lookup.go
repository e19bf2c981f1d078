package main

import "sniproxy/hostdir"

// reach looks a host up, and connects to its backend. It waits for whatever there is to wait for. Found is whose the
// entry is that serves the name, for use until it is released, nil if there is none.
func reach(d *hostdir.Dialer, tenants *tenants, name []byte) (b hostdir.Backend, found *tenant, err error) {
	entry, err := d.Find(name, true)
	if err != nil {
		return hostdir.Backend{}, nil, err
	}
	b, err = d.Connect(true)
	return b, tenants.of(entry), err
}
