package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// Goal: a terminal is not shown the private key. It is told to redirect the output.
func TestTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Log(err)
		hostdirtest.Missing(t, "/dev/ptmx")
	}
	defer master.Close()
	hostdirtest.Must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	hostdirtest.Must(t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Log(err)
		hostdirtest.Missing(t, "/dev/pts")
	}
	defer terminal.Close()

	cmd := hostdirtest.Command(t, runMain+"=1", "public.example")
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = terminal, &stderr
	cmd.Run()
	waiting, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCINQ)
	if status := cmd.ProcessState.ExitCode(); status != 1 || err != nil || waiting != 0 || !strings.Contains(stderr.String(), ">FILE") || strings.Count(stderr.String(), "\n") != 1 {
		t.Errorf("exit status %d, stderr %q, %d bytes on the terminal, error %v; want one line and nothing there", status, stderr.String(), waiting, err)
	}
}
