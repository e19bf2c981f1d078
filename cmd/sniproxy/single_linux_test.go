package main

import (
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni/snitest"
)

// Goal: a single client whose host leads into a file system that never answers gets its alert, and
// the daemon ends although the look-up does not.
func TestSingleStuck(t *testing.T) {
	t.Parallel()
	hostdirtest.OwnMounts(t)
	hosts := hostdirtest.Dir(t)
	fs := hostdirtest.MountUserFS(t, hostdirtest.Dir(t), unix.S_IFDIR)
	symlink(t, filepath.Join(fs.Dir, "x"), hostDir(hosts, "stuck.example"))
	d, client := startSingle(t, hosts)
	say(t, client, snitest.Hello("stuck.example"))
	if got := readAll(t, client); alert([]byte(got)) != 90 {
		t.Errorf("got %x, want alert 90", got)
	}
	client.Close()
	d.expectExit(0)
}
