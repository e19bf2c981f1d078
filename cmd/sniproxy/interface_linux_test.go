package main

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: as TestWrongStdin, for files that only Linux has or opens in this way.
func TestWrongStdinLinux(t *testing.T) {
	t.Run("terminal", func(t *testing.T) {
		master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Skipf("no terminals: %v", err)
		}
		defer master.Close()
		hostdirtest.Must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
		n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
		if err != nil {
			t.Fatal(err)
		}
		terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Skipf("no terminals: %v", err)
		}
		defer terminal.Close()
		launch(t, terminal, hostdirtest.Dir(t)).expectRefusal("a terminal")
	})
	t.Run("seqpacket", func(t *testing.T) {
		launch(t, socketFD(t, unix.AF_UNIX, unix.SOCK_SEQPACKET, nil), hostdirtest.Dir(t)).expectRefusal("Unix socket")
	})
	t.Run("netlink", func(t *testing.T) {
		launch(t, socketFD(t, unix.AF_NETLINK, unix.SOCK_RAW, nil), hostdirtest.Dir(t)).expectRefusal("another kind")
	})
}
