package hostdir_test

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

const soPassRights = 83 // of unix(7), since Linux 6.16

// forbid has the system refuse this process something, by a filter of system calls as container engines have: "unshare",
// as they do by default; "SO_PASSRIGHTS" or "openat2", as kernels do that do not have them.
func forbid(what string) {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	const number, architecture, level, option = 0, 4, 24, 32 // in struct seccomp_data, where bytes are in this order
	var filter []unix.SockFilter
	load := func(offset uint32) {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset})
	}
	// unless allows the call, if what is loaded is not a value.
	unless := func(value uint32) {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: value},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	}
	refuse := func(errno unix.Errno) {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)})
	}
	if what == "" {
		return
	}
	load(architecture)
	unless(arch)
	load(number)
	switch what {
	case "unshare":
		unless(unix.SYS_UNSHARE)
		refuse(unix.EPERM)
	case "SO_PASSRIGHTS":
		unless(unix.SYS_SETSOCKOPT)
		load(level)
		unless(unix.SOL_SOCKET)
		load(option)
		unless(soPassRights)
		refuse(unix.ENOPROTOOPT)
	case "openat2":
		unless(unix.SYS_OPENAT2)
		refuse(unix.ENOSYS)
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil && ok {
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
		if errno != 0 {
			err = errno
		}
	}
	if err != nil || !ok {
		fmt.Fprintln(os.Stderr, "no filter of system calls:", err)
		os.Exit(1)
	}
}
