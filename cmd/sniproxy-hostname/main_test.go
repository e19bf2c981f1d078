package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
	"sniproxy/sni"
)

// With this in its environment, the test binary is sniproxy-hostname.
const runMain = "SNIPROXY_HOSTNAME_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	return hostdirtest.Command(t, runMain+"=1", args...)
}

// runProgram runs sniproxy-hostname to its end.
func runProgram(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	return hostdirtest.Run(t, program(t, args...))
}

// The hashes are those of Python's hashlib.blake2s and base64.urlsafe_b64encode.
var accepted = []struct{ arg, name, hash string }{
	{"A.Example.", "a.example", "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q"},
	{"A.Example。", "a.example", "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q"},
	{"A.Example．", "a.example", "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q"},
	{"A.Example｡", "a.example", "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q"},
	{"🕸💍.ws", "xn--sr8hvo.ws", "L7iMDmoKIBb0oI6qIDi7ga0_wVYHTpwtnGoIyPl1ScQ"},
	{"faß.de", "xn--fa-hia.de", "MM3Pl7QODBX9WOkEZtJDZWWKSt8tEQkxKqeDywK1y3g"},
	{"XN--FA-HIA.de", "xn--fa-hia.de", "MM3Pl7QODBX9WOkEZtJDZWWKSt8tEQkxKqeDywK1y3g"},
	{"ＥＸＡＭＰＬＥ.com", "example.com", "ceA51lG1FUJ-gCIICYcmzOsjls2JmL6BBz5LAHROpe0"},
	{"a。b.com", "a.b.com", "QuR1Ur8TqhFFtc8tJqmiDIev1IiJU7s-PdxKdL55D9c"},
	{"a_b.example", "a_b.example", "WbvIU_4uxp_LEdZGRLLGRM9VM5ecV1PpU9nduL4dPjE"},
	{"r3---sn-ab--cd-.example", "r3---sn-ab--cd-.example", "lo_fY1o3JHshjR9uGrBgkgY-URx-wOlHr-CxmmB1uXE"},
	{"a\u200db.example", "xn--ab-m1t.example", "DXQPsj9o70nt067N3V9KSLCdoqmSNqEogI7W0QemY3g"}, // a joiner
	{strings.Repeat("a", 63) + ".b", strings.Repeat("a", 63) + ".b", "bYm_pnk8yWd9WF3-ovqEdE4rlrjvVd_WKx-9cpPqSo8"},
	{strings.Repeat("a.", 127), strings.Repeat("a.", 126) + "a", "fFhUWsj7qDas0_o5zolXwEfjSDkBvYmxrxkafLeWUfg"}, // 253 bytes

	// Wildcards.
	{"*", "*", "THZAGiAyUnBitgkW8lL0G149daP6UKY3azrtufWdjJo"},
	{"*.Example.com", "*.example.com", "TVgeyCpe1FfRC9o4Wz7T5YQWYxS89Mv6YQnJ30Q2gVM"},
	{"*.b.example。", "*.b.example", "mNSbCUYgry5fuzaqOhyZ7sVCynlUxjfC7OpUO-tiZUo"},
	{"*.🕸💍.ws", "*.xn--sr8hvo.ws", "P1wJSdyS2yjzJFyvxMhP-iZvyxXDegD7-FZ-G4VNZ28"},
	{"*.אב", "*.xn--4dbc", "Yw8rPEE8qr93J4-x8mz-2iQWWU8Kpmil8gmDV0OX4po"},
	{"*.com", "*.com", "aNAw0PxQRRoqNX37h2Jz1um1B83gBblbNGbsctvsdeM"},
	{"*." + strings.Repeat("a.", 126)[:251], "*." + strings.Repeat("a.", 126)[:251], "9vp3kFbyUjsuo-oZdH1C0fU1bAtlJOh89WGBv385uP4"},
}

// Goal: every kind of name that is accepted gives exactly the line that the proxy of this build
// expects.
func TestAccepted(t *testing.T) {
	for _, c := range accepted {
		want := c.name
		if hostdir.Hashed {
			want = c.hash
		}
		stdout, stderr, status := runProgram(t, c.arg)
		if stdout != want+"\n" || stderr != "" || status != 0 {
			t.Errorf("%q: stdout %q, stderr %q, exit status %d; want stdout %q", c.arg, stdout, stderr, status, want+"\n")
		}
	}
}

var refused = []struct{ arg, reason string }{
	{"a..b", "empty label"},
	{"", "empty"},
	{"exa mple", "control character"},
	{strings.Repeat("a", 64), "longer than 63 bytes"},
	{strings.Repeat("ü", 60) + ".de", "longer than 63 bytes"},
	{"xn--a.com", "not a valid internationalized name"},
	{"a/b", "URL"},
	{"..", "empty label"},
	{"-a.example", "begins with a hyphen"},
	{"\xff.com", "not valid UTF-8"},

	{".", "empty"},
	{".a", "empty label"},
	{"a..", "ends with two dots"},
	{"a.。", "ends with two dots"},
	{"-x", "begins with a hyphen"},
	{"--", "begins with a hyphen"},
	{"--help", "begins with a hyphen"},
	{"a℀b.com", "URL"}, // U+2100 stands for a/c
	{"a@b.com", "character other than"},
	{"2001:db8::1", "IPv6 address"},
	{"[2001:db8::1]", "IPv6 address"},
	{"[a.example]", "brackets"},
	{"a\nb.com", "control character"},
	{"127.0.0.1:443", "port behind"},
	{"xn--.com", "empty label"},
	{"xn--abc-.com", "not a valid internationalized name"}, // ASCII in disguise
	{"א1b.com", "not a valid internationalized name"},      // RFC 5893, the Bidi rule
	{"ℵa.com", "not a valid internationalized name"},       // which becomes the letter
	{"\u202e.com", "not a valid internationalized name"},   // right-to-left override
	{strings.Repeat("a.", 126) + "aa", "longer than 253 bytes"},
	{strings.Repeat("a.", 200) + "a", "longer than 254 bytes"},

	{"*.", "empty"},
	{"*..", "empty"},
	{"*..a", "empty label"},
	{"**", "asterisk"},
	{"*a.example", "asterisk"},
	{"a*.example", "asterisk"},
	{"a.*.example", "asterisk"},
	{"a.*", "asterisk"},
	{"*.*", "asterisk"},
	{"*.*.example", "asterisk"},
	{"*.-a", "begins with a hyphen"},
	{"*./a", "URL"},
	{"＊.example", "asterisk"}, // U+FF0A, which would become an asterisk
	{"*。example", "asterisk"},
	{"*.xn--a.com", "not a valid internationalized name"},
	{"*." + strings.Repeat("a.", 125) + "aa", "longer than 253 bytes"},
	{"*." + strings.Repeat("a", 64), "longer than 63 bytes"},
}

// Goal: every kind of name that is refused gives no directory name, exit status 1, and one line
// with the program, the argument in a form that is safe to print, and the reason.
func TestRefused(t *testing.T) {
	for _, c := range refused {
		stdout, stderr, status := runProgram(t, c.arg)
		if stdout != "" || status != 1 {
			t.Errorf("%q: stdout %q, exit status %d; want none, and 1", c.arg, stdout, status)
		}
		line, rest, _ := strings.Cut(stderr, "\n")
		reason, ok := strings.CutPrefix(line, "sniproxy-hostname: "+quoted(c.arg)+": ")
		if !ok || !strings.Contains(reason, c.reason) || rest != "" {
			t.Errorf("%q: stderr %q; want one line with the argument in quotes and %q", c.arg, stderr, c.reason)
		}
	}
}

// quoted escapes what could harm a terminal; every other character stands for itself.
func quoted(s string) string {
	return `"` + strings.NewReplacer("\n", `\n`, "\xff", `\xff`, "\u202e", `\u202e`).Replace(s) + `"`
}

// Goal: a refused name does not keep the others from being printed, in order, and the exit status
// is 1.
func TestSeveral(t *testing.T) {
	first, second := "a.example", "a.b.com"
	if hostdir.Hashed {
		first, second = "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q", "QuR1Ur8TqhFFtc8tJqmiDIev1IiJU7s-PdxKdL55D9c"
	}
	stdout, stderr, status := runProgram(t, "a.example", "a..b", "a.b.com", "a/b")
	if want := first + "\n" + second + "\n"; stdout != want || status != 1 {
		t.Errorf("stdout %q, exit status %d; want %q and 1", stdout, status, want)
	}
	if strings.Count(stderr, "\n") != 2 || !strings.Contains(stderr, `"a..b"`) || !strings.Contains(stderr, `"a/b"`) {
		t.Errorf("stderr %q; want a line each for a..b and a/b", stderr)
	}
	if stdout, stderr, status := runProgram(t, "a.example", "a.b.com"); status != 0 || stderr != "" {
		t.Errorf("without refused names: stdout %q, stderr %q, exit status %d; want 0", stdout, stderr, status)
	}
}

// Goal: without a name there is the usage on stderr, and exit status 2. Only a hashed build says
// that it is one. With -h the usage is on stdout, and the exit status 0. Both have the version.
func TestUsage(t *testing.T) {
	asked, messages, status := runProgram(t, "-h", "a.example")
	if messages != "" || status != 0 || !strings.Contains(asked, "\nThis is version ") {
		t.Errorf("-h: stdout %q, stderr %q, exit status %d; want the usage and 0", asked, messages, status)
	}
	stdout, stderr, status := runProgram(t)
	if stdout != "" || status != 2 || !strings.HasPrefix(stderr, "usage: sniproxy-hostname NAME") || stderr != asked {
		t.Errorf("stdout %q, stderr %q, exit status %d; want the usage and 2", stdout, stderr, status)
	}
	if got := strings.Contains(stderr, "hashed build"); got != hostdir.Hashed {
		t.Errorf("usage %q mentions a hashed build: %t; want %t", stderr, got, hostdir.Hashed)
	}
}

// Goal: output that cannot be written gives a line on stderr and exit status 1, so that no script
// takes an empty output for a name.
func TestOutputLost(t *testing.T) {
	outputs := map[string]func(t *testing.T) *os.File{
		"not open for writing": func(t *testing.T) *os.File {
			return open(t, os.DevNull, os.O_RDONLY)
		},
		"pipe that nobody reads": func(t *testing.T) *os.File {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			return w
		},
		"full disk": func(t *testing.T) *os.File {
			if _, err := os.Stat("/dev/full"); err != nil {
				t.Skip(err) // only Linux and some BSDs have it
			}
			return open(t, "/dev/full", os.O_WRONLY)
		},
	}
	for name, output := range outputs {
		t.Run(name, func(t *testing.T) {
			cmd := program(t, "a.example")
			stdout := output(t)
			defer stdout.Close()
			var stderr strings.Builder
			cmd.Stdout, cmd.Stderr = stdout, &stderr
			err := cmd.Run()
			if status := cmd.ProcessState.ExitCode(); status != 1 {
				t.Errorf("%v; want exit status 1", err)
			}
			if !strings.HasPrefix(stderr.String(), "sniproxy-hostname: write ") || strings.Count(stderr.String(), "\n") != 1 {
				t.Errorf("stderr %q; want one line that tells of the write", stderr.String())
			}
		})
	}
}

func open(t *testing.T, path string, flag int) *os.File {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Goal: whatever is printed is a name that the proxy looks up as it is, and gives itself when it is
// the argument.
func FuzzHostname(f *testing.F) {
	for _, c := range accepted {
		f.Add(c.arg)
	}
	for _, c := range refused {
		f.Add(c.arg)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		name, err := hostname.Parse(arg)
		if err != nil {
			return
		}
		// A wildcard serves names that have another label in place of the asterisk.
		host := bytes.Replace(name, []byte("*"), []byte("a"), 1)
		if onWire, err := sni.AppendCanonical(nil, host); err != nil || !bytes.Equal(onWire, host) {
			t.Errorf("%q gives %q; the proxy takes %q for %q, %v", arg, name, host, onWire, err)
		}
		if again, err := hostname.Parse(string(name)); err != nil || !bytes.Equal(again, name) {
			t.Errorf("%q gives %q, and that gives %q, %v", arg, name, again, err)
		}
	})
}
