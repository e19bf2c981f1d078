package hostdir_test

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir/hostdirtest"
)

// forbid has the kernel refuse this process something: "unshare", as container engines do by
// default; "SO_PASSRIGHTS" or "openat2", as kernels do that do not have them.
func forbid(what string) {
	var err error
	switch what {
	case "unshare":
		err = hostdirtest.Deny(unix.SYS_UNSHARE, nil, unix.EPERM)
	case "SO_PASSRIGHTS":
		args := map[int]uint32{1: unix.SOL_SOCKET, 2: hostdirtest.SOPassRights}
		err = hostdirtest.Deny(unix.SYS_SETSOCKOPT, args, unix.ENOPROTOOPT)
	case "openat2":
		err = hostdirtest.Deny(unix.SYS_OPENAT2, nil, unix.ENOSYS)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
