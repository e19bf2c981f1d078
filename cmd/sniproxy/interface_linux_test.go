package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"syscall"
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

// Goal: the daemon stops as PID 1, as in a container, just as it does elsewhere.
func TestStopFirstProcess(t *testing.T) {
	for _, s := range stopSignals {
		t.Run(unix.SignalName(s), func(t *testing.T) {
			d := start(t, firstProcess(t))
			d.serve("a.example", hostdirtest.Echo)
			c := openEcho(t, d, "a.example")
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
			if err != nil || !regexp.MustCompile(`(?m)^NSpid:.*\t1$`).Match(status) {
				t.Fatalf("the daemon is not PID 1, error %v:\n%s", err, status)
			}
			d.signal(s)
			d.out.Await(t, "got "+unix.SignalName(s)+", shutting down")
			c.works()
			c.Close()
			d.expectExit(0)
			if got := d.err.String(); got != "" {
				t.Errorf("standard error has %q", got)
			}
		})
	}
}

// firstProcess runs the daemon as PID 1 of a namespace of its own.
func firstProcess(t *testing.T) setup {
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if uid := os.Geteuid(); uid != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
	}
	may := exec.Command("/bin/true")
	may.SysProcAttr = attr
	if err := may.Run(); errors.Is(err, unix.EPERM) {
		t.Skip("there can be no PID namespace here")
	}
	return func(cmd *exec.Cmd) { cmd.SysProcAttr = attr }
}
