package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// The proxy, and its group, in these tests; alice, a tenant; and somebody else.
const (
	proxyUID = 998
	aliceUID = 1000
	otherUID = 1001
)

var proxyArg = fmt.Sprintf("%d:%d", proxyUID, proxyUID)

// printAccess prints what the system says to this process: a line for each path, with the
// permissions it has.
func printAccess(paths []string) {
	for _, path := range paths {
		var has uint32
		for _, bit := range []uint32{unix.R_OK, unix.W_OK, unix.X_OK} {
			if unix.Access(path, bit) == nil {
				has |= bit
			}
		}
		fmt.Println(has)
	}
}

// Goal: what is told from modes and ACLs is what the kernel does, mask included, for a user in some
// groups: the owner, one that the ACL names, one of its groups, and any other.
func TestAllowed(t *testing.T) {
	hostdirtest.NeedRoot(t)
	setfacl := hostdirtest.Need(t, "setfacl")
	dir := hostdirtest.Dir(t)
	e := eyes{uid: proxyUID, groups: []uint32{proxyUID, 500, 501}}
	r := rand.New(rand.NewPCG(1, 2))
	perm := func() string {
		return fmt.Sprintf("%c%c%c", "-r"[r.IntN(2)], "-w"[r.IntN(2)], "-x"[r.IntN(2)])
	}
	var paths []string
	var restore strings.Builder
	const many = 600
	for i := range many {
		path := filepath.Join(dir, fmt.Sprint(i))
		must(t, os.Mkdir(path, 0o700))
		paths = append(paths, path)
		owner, group := []int{aliceUID, otherUID, proxyUID}[r.IntN(10)/4], []int{500, 600, proxyUID}[r.IntN(3)]
		fmt.Fprintf(&restore, "# file: %d\n# owner: %d\n# group: %d\nuser::%s\n", i, owner, group, perm())
		extended := i%4 != 0
		if extended {
			for _, id := range []int{aliceUID, proxyUID, otherUID}[r.IntN(3):] {
				fmt.Fprintf(&restore, "user:%d:%s\n", id, perm())
			}
		}
		fmt.Fprintf(&restore, "group::%s\n", perm())
		if extended {
			for _, id := range []int{500, 501, 700}[r.IntN(4):] {
				fmt.Fprintf(&restore, "group:%d:%s\n", id, perm())
			}
			mask := perm()
			if r.IntN(5) == 0 {
				mask = "---"
			}
			fmt.Fprintf(&restore, "mask::%s\n", mask)
		}
		fmt.Fprintf(&restore, "other::%s\n\n", perm())
	}
	cmd := exec.Command(setfacl, "--restore=-")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(restore.String())
	runSetfacl(t, cmd)
	ask := user{proxyUID}.command(self(t), paths...)
	ask.Env = append(ask.Env, "SNIPROXY_CHECK_ACCESS=1")
	ask.SysProcAttr.Credential.Groups = e.groups
	stdout, stderr, _ := hostdirtest.Run(t, ask)
	lines := strings.Fields(stdout)
	if len(lines) != many || stderr != "" {
		t.Fatalf("%d answers, stderr %q", len(lines), stderr)
	}
	acls, masked := 0, 0
	for i, path := range paths {
		var says uint32
		for _, bit := range []uint32{unix.R_OK, unix.W_OK, unix.X_OK} {
			if e.may(path, bit) == nil {
				says |= bit
			}
		}
		if fmt.Sprint(says) != lines[i] {
			text, _ := exec.Command("getfacl", "-n", path).Output()
			t.Errorf("it says %d, the kernel %s, of\n%s", says, lines[i], text)
		}
		acl, err := readACL(path)
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		if len(acl) > 0 {
			acls++
		}
		if ok, m := e.allowed(st.Mode, st.Uid, st.Gid, acl, unix.X_OK); !ok && m {
			masked++
		}
	}
	if acls < many/2 || masked < many/50 {
		t.Errorf("only %d of %d have an ACL, and the mask matters in %d", acls, many, masked)
	}
	if root := (&eyes{uid: 0}); root.may(paths[0], unix.W_OK) != nil {
		t.Error("root may not")
	}
}

func runSetfacl(t *testing.T, setfacl *exec.Cmd) {
	t.Helper()
	out, err := setfacl.CombinedOutput()
	if strings.Contains(string(out), "Operation not supported") {
		hostdirtest.Missing(t, "a file system with ACLs")
	}
	if err != nil {
		t.Fatalf("setfacl: %v: %s", err, out)
	}
}

// runProxy starts a sniproxy in a hosts directory, as a user in some groups.
func runProxy(t *testing.T, hosts string, uid uint32, attr syscall.SysProcAttr, groups ...uint32) (pid int) {
	t.Helper()
	l := hostdirtest.ListenTCP(t, "tcp4", "127.0.0.1:0")
	stdin, err := l.File()
	must(t, err)
	defer stdin.Close()
	var log hostdirtest.Lines
	cmd := exec.Command(build(t, "sniproxy", ""))
	attr.Credential = &syscall.Credential{Uid: uid, Gid: uid, Groups: groups}
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = hosts, stdin, &log, &log, &attr
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	log.Await(t, "listening on ")
	return cmd.Process.Pid
}

// grant gives things to a user and a group, with a mode.
func grant(t *testing.T, path string, uid, gid int, mode os.FileMode) {
	t.Helper()
	must(t, os.Lchown(path, uid, gid))
	must(t, os.Chmod(path, mode))
}

// Goal: root, without an option, is told what the user of the sniproxy that runs in this directory
// may do, with the groups that it has, and nothing of root's own rights or groups. A sniproxy
// elsewhere, and another program here, do not matter.
func TestEyesOfRunning(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	path := func(name string) string { return filepath.Join(hosts, entryOf(name)) }
	for _, name := range []string{"closed.example", "roots.example", "socket.example", "extra.example", "open.example"} {
		good(t)(path(name))
	}
	grant(t, path("closed.example"), aliceUID, aliceUID, 0o700)
	grant(t, path("roots.example"), 0, 0, 0o710)
	grant(t, path("socket.example")+"/tls-socket", aliceUID, aliceUID, 0o755)
	grant(t, path("extra.example"), aliceUID, 4321, 0o710)
	names := []string{hosts, "closed.example", "roots.example", "socket.example", "extra.example", "open.example"}
	runProxy(t, hostdirtest.Dir(t), otherUID, syscall.SysProcAttr{})
	lines := func(stdout string) string {
		var short []string
		for line := range strings.Lines(stdout) {
			line, _, _ = strings.Cut(strings.TrimSuffix(line, "\n"), " (mode ")
			short = append(short, line)
		}
		return strings.Join(short, "\n")
	}
	denied := func(uid int, extra string) string {
		return strings.NewReplacer("UID", fmt.Sprint(uid)).Replace(
			"closed.example: permission denied for uid UID: x is missing on the directory " + entryOf("closed.example") +
				"\nroots.example: permission denied for uid UID: x is missing on the directory " + entryOf("roots.example") +
				"\nsocket.example: permission denied for uid UID: w is missing on the socket " + entryOf("socket.example") + "/tls-socket" +
				"\nextra.example: " + extra + "\nopen.example: ok")
	}
	pid := runProxy(t, hosts, proxyUID, syscall.SysProcAttr{}, 4321)
	// A static program changes the users of its threads itself, others leave that to the C library.
	for _, program := range []string{self(t), build(t, "sniproxy-check", "")} {
		stdout, stderr, status := hostdirtest.Run(t, user{0}.command(program, names...))
		if want := denied(proxyUID, "ok"); lines(stdout) != want || stderr != "" || status != 1 {
			t.Errorf("it says\n%s\nand %q, exit status %d, want\n%s", stdout, stderr, status, want)
		}
	}
	// One more of the same user changes nothing, one of another user is answered for as well.
	runProxy(t, hosts, proxyUID, syscall.SysProcAttr{}, 4321)
	other := runProxy(t, hosts, otherUID, syscall.SysProcAttr{})
	stdout, stderr, status := checkFor(t, user{0}, hosts)
	if hostdir.Hashed {
		return
	}
	blocks := strings.Split(stdout, "For uid ")
	if len(blocks) != 3 || stderr != "" || status != 1 {
		t.Fatalf("it says %q and %q, exit status %d", stdout, stderr, status)
	}
	for _, b := range blocks[1:] {
		first, rest, _ := strings.Cut(b, ":\n")
		switch {
		case first == fmt.Sprintf("%d, as process %d runs", otherUID, other) && strings.Contains(rest, "extra.example: permission denied for uid 1001: "):
		case strings.HasPrefix(first, fmt.Sprintf("%d, as process ", proxyUID)) && strings.Contains(rest, "extra.example: ok\n"):
		default:
			t.Errorf("a block %q, with process %d", b, pid)
		}
	}
}

// Goal: nobody can make root answer for any number of users.
func TestEyesOfMany(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	for i := range uint32(watchersMost + 1) {
		runProxy(t, hosts, 2000+i, syscall.SysProcAttr{})
	}
	runProxy(t, hosts, 0, syscall.SysProcAttr{})
	stdout, stderr, status := checkFor(t, user{0}, "", hosts, "one.example")
	if strings.Count(stdout, "For uid ") != watchersMost || !strings.HasPrefix(stdout, "For uid 0, ") || strings.Count(stdout, "\none.example: no directory: ") != watchersMost || status != 1 ||
		!strings.HasPrefix(stderr, "sniproxy-check: 6 users run a sniproxy in this directory; these answers are for 4 of them, ") {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}

// Goal: who starts a program of root's under the name sniproxy does not make root answer for root.
func TestEyesImpostors(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	sleep := hostdirtest.Need(t, "sleep")
	hosts, dir := hostdirtest.Dir(t), hostdirtest.Dir(t)
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	for name, uid := range map[string]uint32{"symlink": 0, "set-user-ID": aliceUID} {
		path := filepath.Join(dir, name, "sniproxy")
		must(t, os.Mkdir(filepath.Dir(path), 0o755))
		if uid == 0 {
			must(t, os.Symlink(sleep, path)) // as if it were sudo
		} else {
			hostdirtest.CopyProgram(t, sleep, path)
			must(t, os.Chmod(path, 0o755|os.ModeSetuid))
		}
		cmd := exec.Command(path, "1000")
		cmd.Dir, cmd.SysProcAttr = hosts, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		must(t, cmd.Start())
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
	runProxy(t, hosts, proxyUID, syscall.SysProcAttr{})
	stdout, stderr, status := checkFor(t, user{0}, "", hosts, "one.example")
	if stdout != "one.example: ok\n" || status != 0 || strings.Count(stderr, "\n") != 2 ||
		!strings.Contains(stderr, ": it runs a set-user-ID program, which is no sniproxy\n") ||
		!strings.Contains(stderr, " is called sniproxy, but runs another program as root: it does not count\n") {
		t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
}

// Goal: if the sniproxy that runs sees other files, that is said.
func TestEyesElsewhere(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	for _, c := range []struct {
		attr func(dir string) syscall.SysProcAttr
		want bool
	}{
		{func(string) syscall.SysProcAttr { return syscall.SysProcAttr{} }, false},
		{func(string) syscall.SysProcAttr { return syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS} }, true},
	} {
		hosts := hostdirtest.Dir(t)
		good(t)(filepath.Join(hosts, entryOf("one.example")))
		pid := runProxy(t, hosts, proxyUID, c.attr(hosts))
		stdout, stderr, status := checkFor(t, user{0}, "", hosts, "one.example")
		said := strings.HasPrefix(stderr, fmt.Sprintf("sniproxy-check: process %d, a sniproxy in this directory, sees other files than you: ", pid))
		if stdout != "one.example: ok\n" || status != 0 || said != c.want || !c.want && stderr != "" {
			t.Errorf("stdout %q, stderr %q, exit status %d", stdout, stderr, status)
		}
	}
}

// Goal: without a sniproxy that runs, the answer is for the user sniproxy, with the groups of that
// user; and without such a user for who asks, with a remark.
func TestEyesOfUser(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	hostdirtest.OwnMounts(t)
	hosts, etc := hostdirtest.Dir(t), hostdirtest.Dir(t)
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	grant(t, filepath.Join(hosts, entryOf("one.example")), aliceUID, 4321, 0o710)
	install := func(passwd, group string) {
		for name, text := range map[string]string{"passwd": passwd, "group": group} {
			path := filepath.Join(etc, name)
			must(t, os.WriteFile(path, []byte(text), 0o644))
		}
	}
	install("root:x:0:0::/:/bin/sh\n", "root:x:0:\n")
	for _, name := range []string{"passwd", "group"} {
		hostdirtest.Mount(t, filepath.Join(etc, name), "/etc/"+name, "", unix.MS_BIND, "")
	}
	stdout, stderr, status := checkFor(t, user{0}, "", hosts, "one.example")
	if stdout != "one.example: ok\n" || status != 0 || !strings.HasPrefix(stderr, "sniproxy-check: no sniproxy is seen to run in this directory, and there is no user sniproxy: these answers are for uid 0, who asks; ") {
		t.Errorf("without the user: stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
	const passwd = "root:x:0:0::/:/bin/sh\nsniproxy:x:998:998::/:/bin/sh\nother:x:1001:1001::/:/bin/sh\n"
	install(passwd, "sniproxy:x:998:\nhosts:x:4321:sniproxy\n")
	for _, args := range []string{"", "-u sniproxy", "-u 998", "-u 998:hosts", "-u sniproxy:998,4321", "-u 998:998,4321", "-u=sniproxy"} {
		stdout, stderr, status := checkFor(t, user{0}, "", append(strings.Fields(args), hosts, "one.example")...)
		if stdout != "one.example: ok\n" || stderr != "" || status != 0 {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d", args, stdout, stderr, status)
		}
	}
	for _, args := range []string{"-u other", "-u sniproxy:sniproxy", "-u 998:998"} {
		stdout, stderr, status := checkFor(t, user{0}, "", append(strings.Fields(args), hosts, "one.example")...)
		if !strings.HasPrefix(stdout, "one.example: permission denied for uid ") || stderr != "" || status != 1 {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d", args, stdout, stderr, status)
		}
	}
	for args, want := range map[string]string{
		"-u nobody-here":     `there is no user "nobody-here" here`,
		"-u 4000":            "there is no user with the number 4000 here: give the groups as well, as in -u 4000:GROUP,GROUP",
		"-u 998:nobodies":    `there is no group "nobodies"`,
		"-u 998:":            `there is no group ""`,
		"-u nobody-here:998": `there is no user "nobody-here" here`,
	} {
		stdout, stderr, status := checkFor(t, user{0}, "", append(strings.Fields(args), hosts)...)
		if stdout != "" || stderr != "sniproxy-check: -u: "+want+"\n" || status != 2 {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d", args, stdout, stderr, status)
		}
	}
}

// Goal: a tenant is told what modes and ACLs say of sniproxy's user, along the whole path, and
// never a plain ok; and what cannot be told, since the tenant may not look there.
func TestEyesOfTenant(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	setfacl := hostdirtest.Need(t, "setfacl")
	hosts, others := hostdirtest.Dir(t), hostdirtest.Dir(t)
	path := func(name string) string { return filepath.Join(hosts, entryOf(name)) }
	own := func(name string, dirMode, socketMode os.FileMode, group int, acls ...string) {
		t.Helper()
		good(t)(path(name))
		grant(t, path(name), aliceUID, group, dirMode)
		grant(t, path(name)+"/tls-socket", aliceUID, group, socketMode)
		for _, acl := range acls {
			at := path(name)
			if a, ok := strings.CutPrefix(acl, "socket "); ok {
				at, acl = at+"/tls-socket", a
			}
			runSetfacl(t, exec.Command(setfacl, "-m", acl, at))
		}
	}
	const let = "ok for uid 998 as far as modes and ACLs tell"
	const denied = "permission denied for uid 998: "
	want := map[string]string{}
	own("open.example", 0o755, 0o666, aliceUID)
	want["open.example"] = let
	own("group.example", 0o710, 0o666, proxyUID)
	want["group.example"] = let
	own("acl.example", 0o700, 0o666, aliceUID, "u:998:x")
	want["acl.example"] = let
	own("closed.example", 0o700, 0o666, aliceUID)
	want["closed.example"] = denied + "x is missing on the directory ENTRY (mode 0700, uid 1000): setfacl -m u:998:x it, or chmod"
	own("socket.example", 0o755, 0o755, aliceUID)
	want["socket.example"] = denied + "w is missing on the socket ENTRY/tls-socket (mode 0755, uid 1000): a chmod lasts until the backend starts again, so have it make the socket with mode 0666: nginx does, "
	own("masked.example", 0o700, 0o666, aliceUID, "u:998:rx", "m::r")
	want["masked.example"] = denied + "x is missing on the directory ENTRY (mode 0740, uid 1000), since the mask of its ACL takes away what an entry gives (a chmod sets the mask too): setfacl -m m::rx it"
	own("masked-socket.example", 0o755, 0o600, aliceUID, "socket u:998:rw", "socket m::r")
	want["masked-socket.example"] = denied + "w is missing on the socket ENTRY/tls-socket (mode 0640, uid 1000), since the mask of its ACL takes away what an entry gives (a chmod sets the mask too): setfacl -m m::rw it; a chmod lasts"
	locked := filepath.Join(others, "locked")
	serve(t, filepath.Join(locked, "inner"))
	grant(t, locked, aliceUID, aliceUID, 0o700)
	symlink(t, filepath.Join(locked, "inner"))(path("through.example"))
	want["through.example"] = denied + "x is missing on the directory " + locked + " (mode 0700, uid 1000): "
	own("dead.example", 0o755, 0o666, aliceUID)
	must(t, os.Remove(path("dead.example")+"/tls-socket"))
	hostdirtest.Abandon(t, path("dead.example"))
	want["dead.example"] = nobodyListens + ": start the backend, "
	own("dead-closed.example", 0o755, 0o755, aliceUID)
	must(t, os.Remove(path("dead-closed.example")+"/tls-socket"))
	hostdirtest.Abandon(t, path("dead-closed.example"))
	grant(t, path("dead-closed.example")+"/tls-socket", aliceUID, aliceUID, 0o755)
	want["dead-closed.example"] = denied + "w is missing on the socket "
	own("marked.example", 0o755, 0o666, aliceUID)
	hostdirtest.Touch(t, path("marked.example")+"/send-proxy-v1")
	want["marked.example"] = let + ", PROXY v1"
	good(t)(path("anothers.example"))
	grant(t, path("anothers.example"), otherUID, proxyUID, 0o710)
	want["anothers.example"] = "it cannot be told for uid 998: you may not look at all that it leads through; "
	good(t)(path("anothers-closed.example"))
	grant(t, path("anothers-closed.example"), otherUID, otherUID, 0o700)
	want["anothers-closed.example"] = denied + "x is missing on the directory ENTRY (mode 0700, uid 1001): "
	good(t)(path("anothers-socket.example"))
	grant(t, path("anothers-socket.example")+"/tls-socket", otherUID, proxyUID, 0o660)
	want["anothers-socket.example"] = let + ", but you may not connect, so whether anybody listens cannot be told"
	want["absent.example"] = noDirectory + ": make one, "

	names := []string{}
	for name := range want {
		names = append(names, name)
	}
	stdout, stderr, status := checkFor(t, user{aliceUID}, "", append([]string{"-u", proxyArg, hosts}, names...)...)
	if stderr != "" || status != 1 {
		t.Errorf("stderr %q, exit status %d", stderr, status)
	}
	lines := byLabel(stdout)
	for name, begins := range want {
		begins = strings.ReplaceAll(begins, "ENTRY", entryOf(name))
		line := lines[name]
		if !strings.HasPrefix(line, begins) || strings.HasPrefix(begins, "ok") && line != begins {
			t.Errorf("%s: it says %q, want %q", name, line, begins)
		}
		// What modes say is what sniproxy does.
		asProxy, _, _ := checkFor(t, user{0}, "", "-u", proxyArg, hosts, name)
		ok := strings.HasPrefix(asProxy, name+": ok")
		if ok != strings.HasPrefix(begins, "ok") && !strings.HasPrefix(begins, "it cannot be told") {
			t.Errorf("%s: for the user itself it says %q", name, asProxy)
		}
	}
	for _, c := range []struct {
		name string
		want int
	}{{"open.example", 0}, {"closed.example", 1}, {"anothers.example", 1}, {"anothers-socket.example", 0}} {
		if _, _, status := checkFor(t, user{aliceUID}, "", "-u", proxyArg, hosts, c.name); status != c.want {
			t.Errorf("%s: exit status %d, want %d", c.name, status, c.want)
		}
	}
}

// Goal: root does not answer with rights that would stay, and where it cannot become a user it says
// so and tells what modes and ACLs say.
func TestEyesOfBoundRoot(t *testing.T) {
	hostdirtest.NeedRoot(t)
	t.Parallel()
	hosts := hostdirtest.Dir(t)
	good(t)(filepath.Join(hosts, entryOf("one.example")))
	setpriv := hostdirtest.Need(t, "setpriv")
	cmd := user{0}.command(setpriv, "--securebits", "+no_setuid_fixup", self(t), "-u", proxyArg, hosts, "one.example")
	stdout, stderr, status := hostdirtest.Run(t, cmd)
	if stdout != "" || stderr != "sniproxy-check: cannot become uid 998: rights of root would stay\n" || status != 1 {
		t.Errorf("with securebits: stdout %q, stderr %q, exit status %d", stdout, stderr, status)
	}
	cmd = user{0}.command(self(t), "-u", proxyArg, hosts, "one.example")
	mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping}
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespace: %v", err)
	}
	cmd.Wait()
	if out.String() != "one.example: ok for uid 998 as far as modes and ACLs tell\n" ||
		!strings.HasPrefix(messages.String(), "sniproxy-check: cannot become uid 998: ") || !strings.HasSuffix(messages.String(), "; so it tells what modes and ACLs say\n") {
		t.Errorf("in a user namespace: stdout %q, stderr %q", out.String(), messages.String())
	}
}
