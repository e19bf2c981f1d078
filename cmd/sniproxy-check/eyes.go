package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	accounts "os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Eyes are the user for whom sniproxy-check answers: the one that sniproxy runs as.
type eyes struct {
	uid    uint32
	groups []uint32 // the first is the primary one
	why    string   // how the user was found, for people

	// own reports that the process runs as this user, so that the system answers. Otherwise modes
	// and ACLs do.
	own bool
}

// ours returns the eyes of the process itself.
func ours() eyes {
	e := eyes{uid: uint32(os.Geteuid()), groups: []uint32{uint32(os.Getegid())}, own: true}
	groups, _ := os.Getgroups()
	for _, g := range groups {
		e.groups = append(e.groups, uint32(g))
	}
	return e
}

func (e *eyes) String() string { return fmt.Sprintf("uid %d", e.uid) }

// argument returns the user as an argument of -u.
func (e *eyes) argument() string {
	var groups []string
	for _, g := range e.groups {
		groups = append(groups, strconv.Itoa(int(g)))
	}
	return fmt.Sprintf("%d:%s", e.uid, strings.Join(groups, ","))
}

// same reports whether two users may do the same.
func (e *eyes) same(other *eyes) bool {
	return e.uid == other.uid && slices.Equal(sorted(e.groups), sorted(other.groups))
}

func sorted(groups []uint32) []uint32 {
	return slices.Compact(slices.Sorted(slices.Values(groups)))
}

// proxyUser is the name of the user that sniproxy usually runs as.
const proxyUser = "sniproxy"

// watchersMost is how many users it answers for, of those who run a sniproxy in the hosts
// directory. Any tenant can run one.
const watchersMost = 4

// findEyes returns the users to answer for: the one that is asked for, else those who run sniproxy
// in the hosts directory, else the user sniproxy, else who asks. Remarks say what is odd about
// that.
func findEyes(asked, dir string) (all []eyes, remarks []string, err error) {
	self := ours()
	if asked != "" {
		e, err := parseEyes(asked)
		if err != nil {
			return nil, nil, err
		}
		return []eyes{e.orOwn(self)}, nil, nil
	}
	running, remarks := runningEyes(dir)
	for _, e := range running {
		if e = e.orOwn(self); !slices.ContainsFunc(all, func(other eyes) bool { return e.same(&other) }) {
			all = append(all, e)
		}
	}
	if len(all) > watchersMost {
		slices.SortStableFunc(all, func(a, b eyes) int { return rank(&a) - rank(&b) })
		remarks = append(remarks, fmt.Sprintf("%d users run a sniproxy in this directory; these answers are for %d of them, and -u asks for another", len(all), watchersMost))
		all = all[:watchersMost]
	}
	if len(all) > 0 {
		return all, remarks, nil
	}
	e, err := lookUpUser(proxyUser)
	if err == nil {
		return []eyes{e.orOwn(self)}, remarks, nil
	}
	remarks = append(remarks, fmt.Sprintf("no sniproxy is seen to run in this directory, and there is no user %s: these answers are for %v, who asks; -u USER asks for another", proxyUser, &self))
	return []eyes{self}, remarks, nil
}

// rank is low for a user who is likely to run the sniproxy that serves the clients.
func rank(e *eyes) int {
	if proxy, err := lookUpUser(proxyUser); err == nil && e.uid == proxy.uid {
		return 0
	} else if e.uid == 0 {
		return 1
	}
	return 2
}

// orOwn returns the eyes of the process if they are of the same user.
func (e eyes) orOwn(self eyes) eyes {
	if e.uid != self.uid {
		return e
	}
	self.why = e.why
	return self
}

// parseEyes reads an argument of -u: USER, or USER:GROUP,GROUP. Each is a name or a number.
func parseEyes(s string) (eyes, error) {
	name, list, explicit := strings.Cut(s, ":")
	uid, err := strconv.ParseUint(name, 10, 32)
	number := err == nil
	if !explicit {
		if number && int(uid) == os.Geteuid() {
			return ours(), nil
		}
		return lookUpUser(name)
	}
	e := eyes{uid: uint32(uid)}
	if !number {
		if e, err = lookUpUser(name); err != nil {
			return eyes{}, err
		}
		e.groups = nil
	}
	for g := range strings.SplitSeq(list, ",") {
		gid, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			found, err := accounts.LookupGroup(g)
			if err != nil {
				return eyes{}, fmt.Errorf("there is no group %q", g)
			}
			gid, _ = strconv.ParseUint(found.Gid, 10, 32)
		}
		e.groups = append(e.groups, uint32(gid))
	}
	return e, nil
}

// lookUpUser returns a user of the system, by name or number, with the groups that the system
// knows.
func lookUpUser(name string) (eyes, error) {
	u, err := accounts.Lookup(name)
	if err != nil {
		u, err = accounts.LookupId(name)
	}
	if err != nil {
		if _, err := strconv.ParseUint(name, 10, 32); err == nil {
			return eyes{}, fmt.Errorf("there is no user with the number %s here: give the groups as well, as in -u %s:GROUP,GROUP", name, name)
		}
		return eyes{}, fmt.Errorf("there is no user %q here", name)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return eyes{}, fmt.Errorf("the groups of the user %q: %v", name, err)
	}
	e := eyes{}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	for _, id := range slices.Concat([]string{u.Gid}, ids) {
		gid, groupErr := strconv.ParseUint(id, 10, 32)
		err = cmp.Or(err, groupErr)
		e.groups = append(e.groups, uint32(gid))
	}
	e.uid = uint32(uid)
	return e, err
}

// become makes the process that of the user, for good, so that whatever tenants have laid out is
// looked at without the rights of root. Package syscall does that for all threads.
func (e *eyes) become() error {
	groups := make([]int, len(e.groups))
	for i, g := range e.groups {
		groups[i] = int(g)
	}
	err := syscall.Setgroups(groups)
	if err == nil {
		err = syscall.Setgid(groups[0])
	}
	if err == nil {
		err = syscall.Setuid(int(e.uid))
	}
	if err != nil {
		return err
	}
	if os.Getuid() != int(e.uid) || os.Geteuid() != int(e.uid) || os.Getegid() != groups[0] || capable() {
		return errPrivileged
	}
	e.own = true
	return nil
}

// errPrivileged means that rights of root were kept, as with the securebits of capabilities(7).
var errPrivileged = errors.New("rights of root would stay")

// may tells whether the user may do something with what is at a path: X_OK, W_OK or R_OK. The error
// is EACCES if not, and errUnseen if this cannot be told.
func (e *eyes) may(path string, bit uint32) error {
	if e.own {
		return unix.Access(path, bit)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return unseen(err)
	}
	acl, err := readACL(path)
	if err != nil {
		return unseen(err)
	}
	if ok, _ := e.allowed(uint32(st.Mode), st.Uid, st.Gid, acl, bit); !ok {
		return unix.EACCES
	}
	return nil
}

// errUnseen means that a question cannot be answered since who asks may not look there.
var errUnseen = errors.New("you may not look there")

// unseen turns the error of looking at something, without being the user whom it is about, into
// errUnseen if the user himself may have no such error.
func unseen(err error) error {
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return errUnseen
	}
	return err
}

// An aclEntry is an entry of a POSIX access control list, see acl(5).
type aclEntry struct {
	tag  uint16
	perm uint16
	id   uint32 // of the user or group
}

// The tags of entries, as in the kernel's include/uapi/linux/posix_acl.h.
const (
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// allowed tells what mode and ACL say to the user, as Linux reads them in acl_permission_check and
// posix_acl_permission. masked reports that an entry allows it and the mask does not.
func (e *eyes) allowed(mode, uid, gid uint32, acl []aclEntry, want uint32) (ok, masked bool) {
	switch {
	case e.uid == 0: // of what is asked here, nothing is forbidden to root
		return true, false
	case e.uid == uid: // the ACL does not matter
		return mode>>6&want == want, false
	case len(acl) > 0 && mode&0o070 != 0: // if the mask is empty, Linux does not look at the ACL
		return e.allowedByACL(gid, acl, want)
	case slices.Contains(e.groups, gid):
		return mode>>3&want == want, false
	}
	return mode&want == want, false
}

func (e *eyes) allowedByACL(gid uint32, acl []aclEntry, want uint32) (ok, masked bool) {
	mask := ^uint16(0)
	for _, a := range acl {
		if a.tag == aclMask {
			mask = a.perm
		}
	}
	has := func(perm uint16) bool { return uint32(perm)&want == want }
	inGroup := false
	for _, a := range acl {
		switch {
		case a.tag == aclUser && a.id == e.uid:
			return has(a.perm & mask), has(a.perm)
		case a.tag == aclGroupObj && slices.Contains(e.groups, gid), a.tag == aclGroup && slices.Contains(e.groups, a.id):
			if inGroup = true; has(a.perm) {
				return has(a.perm & mask), true
			}
		case a.tag == aclOther:
			return !inGroup && has(a.perm), false
		}
	}
	return false, false
}
