//go:build hashed

package hostdir_test

import (
	"math/rand"
	"os/exec"
	"strings"
	"testing"

	"sniproxy/hostdir"
	"sniproxy/hostdir/hostdirtest"
)

// Goal: directory names are those of an independent implementation, python3:
//
//	import base64, hashlib
//	digest = hashlib.blake2s(name.encode()).digest()
//	print(base64.urlsafe_b64encode(digest).decode().rstrip("="))
//
// and, to the same result, OpenSSL:
//
//	printf %s NAME | openssl dgst -blake2s256 -binary | base64 | tr +/ -_ | tr -d =
func TestHash(t *testing.T) {
	label := strings.Repeat("a", 63)
	for name, want := range map[string]string{
		"a":                "Sg0SmHNAMDfCzZuQSCA2h_YjP7ZziVbgNJvUMg_sPpA",
		"_":                "PIlpiJi8aK_VKvZ_plHfpIGe52nqTmyUU4E6XNRx61E",
		"a.example":        "dubShENx2PXP14UbHi18ockHEbEhKSCurgY8QpDiH5Q",
		"xn--fa-hia.de":    "MM3Pl7QODBX9WOkEZtJDZWWKSt8tEQkxKqeDywK1y3g",
		"a_b.example":      "WbvIU_4uxp_LEdZGRLLGRM9VM5ecV1PpU9nduL4dPjE",
		label + ".example": "IE_9TmuMLQLk_8i-hqDWRTv6CrNdNz24F_eHdf3VTzI",
		// The longest name: 254 bytes.
		strings.Repeat(label+".", 3) + label[:62]: "unPkbUFr31ssTap7BwY4GEeVs4NNh38ef4iM6Ypq_qg",
	} {
		if got := string(hostdir.AppendName(nil, []byte(name))); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// Goal: the same for 100 random names of 1 to 254 bytes, which python3 computes now.
func TestHashPython(t *testing.T) {
	python := hostdirtest.Need(t, "python3")
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789-_."
	var names, dirs []string
	for range 100 {
		name := make([]byte, 1+rand.Intn(254))
		for i := range name {
			name[i] = letters[rand.Intn(len(letters))]
		}
		names = append(names, string(name))
		dirs = append(dirs, string(hostdir.AppendName(nil, name)))
	}
	cmd := exec.Command(python, "-c", `
import base64, hashlib, sys
for name in sys.stdin.read().split():
    print(base64.urlsafe_b64encode(hashlib.blake2s(name.encode()).digest()).decode().rstrip("="))
`)
	cmd.Stdin = strings.NewReader(strings.Join(names, "\n"))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(string(out))
	if len(want) != len(names) {
		t.Fatalf("python3 prints %d lines", len(want))
	}
	for i, name := range names {
		if dirs[i] != want[i] {
			t.Errorf("%s: got %s, want %s", name, dirs[i], want[i])
		}
	}
}
