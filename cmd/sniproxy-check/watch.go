package main

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"sniproxy/hostdir"
)

// With a handshake, a backend can pass descriptors, unless the kernel refuses them. A process in
// which the last descriptor of a file is closed whose file system does not answer never ends, not
// even when it is killed. So the work is done by a process that nobody waits for, once it has told
// its status.

// watchedName is the name by which the program calls itself to be that process.
const watchedName = "sniproxy-check: handshakes"

// statusFD is the descriptor on which that process tells its exit status, in one byte.
const statusFD = 3

// refusesDescriptors reports whether the kernel refuses descriptors that backends pass.
func refusesDescriptors() bool {
	hosts, err := hostdir.Open() // of whatever directory
	if err != nil {
		return false
	}
	defer hosts.Close()
	return hosts.RefusesDescriptors()
}

// watch has another process do the work, and returns its exit status. It is not ok if no such
// process can be started.
func watch(args []string, stdout, stderr io.Writer) (status int, ok bool) {
	told, tell, err := os.Pipe()
	if err != nil {
		return 0, false
	}
	defer told.Close()
	cmd := exec.Command(itself(), args...)
	cmd.Args[0] = watchedName
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, stderr // not /dev/null, which a sandbox may not have
	cmd.ExtraFiles = []*os.File{tell}                            // statusFD
	err = cmd.Start()
	tell.Close()
	if err != nil {
		return 0, false
	}
	var b [1]byte
	if n, _ := told.Read(b[:]); n == 1 {
		return int(b[0]), true
	}
	cmd.Wait() // it has died
	return 1, true
}

// itself returns a path of this program. A sandbox may have no /proc.
func itself() string {
	path, err := os.Executable()
	if err != nil && filepath.IsAbs(os.Args[0]) {
		return os.Args[0]
	}
	if _, err := os.Stat("/proc/self/exe"); err == nil {
		return "/proc/self/exe" // whatever the file is called by now
	}
	return path
}
