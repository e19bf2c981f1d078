package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// byModes is what answers for a user whom the process cannot be.
const byModes = "modes and ACLs"

// runningEyes returns the users who run a sniproxy whose working directory is the hosts directory,
// as far as that may be seen. Each is in the list once for each process.
func runningEyes(dir string) (all []eyes, remarks []string) {
	hosts, err := place(dir)
	if err != nil {
		return nil, nil // to enter it fails as well
	}
	processes, err := os.Open("/proc")
	if err != nil {
		return nil, nil
	}
	defer processes.Close()
	names, _ := processes.Readdirnames(-1)
	slices.Sort(names)
	for _, pid := range names {
		proc := "/proc/" + pid
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		name, err := os.ReadFile(proc + "/comm")
		if err != nil || string(name) != "sniproxy\n" {
			continue
		}
		if at, err := place(proc + "/cwd"); err != nil || at != hosts {
			continue
		}
		status, err := os.ReadFile(proc + "/status")
		if err != nil {
			continue // it has ended
		}
		e, err := parseStatus(string(status))
		if err != nil {
			remarks = append(remarks, fmt.Sprintf("process %s: %v", pid, err))
			continue
		}
		// Such a program may have become root altogether, as sudo does.
		if exe, err := os.Readlink(proc + "/exe"); e.uid == 0 && (err != nil || !strings.HasPrefix(filepath.Base(exe), "sniproxy")) {
			remarks = append(remarks, fmt.Sprintf("process %s is called sniproxy, but runs another program as root: it does not count", pid))
			continue
		}
		e.why = "as process " + pid + " runs"
		all = append(all, e)
		if !sameView(proc) {
			remarks = append(remarks, fmt.Sprintf("process %s, a sniproxy in this directory, sees other files than you: it runs in a chroot, a sandbox or a container. Symlinks that leave the hosts directory may lead elsewhere for it; sniproxy-check in there, such as sniproxy-check.service, sees what it sees", pid))
		}
	}
	return all, remarks
}

// A position tells a directory from all others, and says that of no directory that only looks
// alike.
type position struct {
	major, minor uint32
	inode        uint64
}

// place returns the position of the directory at a path. It waits for no file system: any tenant
// can have a process whose directories are on one that does not answer.
func place(path string) (position, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	return position{st.Dev_major, st.Dev_minor, st.Ino}, err
}

// sameView reports whether a process sees the files that this one sees.
func sameView(proc string) bool {
	mounts, err1 := os.Readlink(proc + "/ns/mnt")
	own, err2 := os.Readlink("/proc/self/ns/mnt")
	root, err3 := place(proc + "/root")
	ownRoot, err4 := place("/")
	return err1 != nil || err2 != nil || err3 != nil || err4 != nil || mounts == own && root == ownRoot
}

// parseStatus reads who a process is from /proc/PID/status: see proc_pid_status(5). The fourth
// number is the one that counts for files.
func parseStatus(status string) (eyes, error) {
	numbers := func(key string) (all []uint32) {
		_, rest, _ := strings.Cut("\n"+status, "\n"+key+":")
		line, _, _ := strings.Cut(rest, "\n")
		for _, f := range strings.Fields(line) {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil
			}
			all = append(all, uint32(n))
		}
		return all
	}
	uids, gids := numbers("Uid"), numbers("Gid")
	if len(uids) != 4 || len(gids) != 4 {
		return eyes{}, fmt.Errorf("its status does not say which user it runs as")
	}
	// Whoever starts a set-user-ID program chooses its name and its working directory.
	if slices.Min(uids) != slices.Max(uids) || slices.Min(gids) != slices.Max(gids) {
		return eyes{}, fmt.Errorf("it runs a set-user-ID program, which is no sniproxy")
	}
	return eyes{uid: uids[3], groups: append([]uint32{gids[3]}, numbers("Groups")...)}, nil
}

// capable reports whether the process has a capability that takes effect.
func capable() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err != nil || data[0].Effective|data[1].Effective|data[0].Permitted|data[1].Permitted != 0
}

// readACL returns the ACL of what is at a path, none if it has only a mode.
func readACL(path string) ([]aclEntry, error) {
	buf := make([]byte, 64<<10) // the longest value that there is
	n, err := unix.Getxattr(path, "system.posix_acl_access", buf)
	switch err {
	case nil:
	case unix.ENODATA, unix.EOPNOTSUPP, unix.ENOSYS:
		return nil, nil
	default:
		return nil, err
	}
	return parseACL(buf[:n])
}

// parseACL reads the format of the kernel's include/uapi/linux/posix_acl_xattr.h.
func parseACL(b []byte) (acl []aclEntry, err error) {
	const header, entry, version = 4, 8, 2
	if len(b) < header || (len(b)-header)%entry != 0 || binary.LittleEndian.Uint32(b) != version {
		return nil, fmt.Errorf("an ACL of %d bytes in a format that is not known", len(b))
	}
	for b = b[header:]; len(b) > 0; b = b[entry:] {
		acl = append(acl, aclEntry{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])})
	}
	return acl, nil
}

// inMemory reports whether a path leads to a file system that exists only in memory, which keeps
// nobody waiting.
func inMemory(path string) bool {
	var fs unix.Statfs_t
	err := unix.Statfs(path, &fs)
	return err == nil && (uint32(fs.Type) == unix.TMPFS_MAGIC || uint32(fs.Type) == unix.RAMFS_MAGIC)
}
