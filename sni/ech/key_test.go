package ech

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"sniproxy/sni/snitest"
)

// example is the file in RFC 9934, Section 3.
const example = `-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VuBCIEICjd4yGRdsoP9gU7YT7My8DHx1Tjme8GYDXrOMCi8v1V
-----END PRIVATE KEY-----
-----BEGIN ECHCONFIG-----
AD7+DQA65wAgACA8wVN2BtscOl3vQheUzHeIkVmKIiydUhDCliA4iyQRCwAEAAEA
AQALZXhhbXBsZS5jb20AAA==
-----END ECHCONFIG-----
`

func TestParseKey(t *testing.T) {
	k, err := ParseKey([]byte(example))
	if err != nil {
		t.Fatal(err)
	}
	if k.ID() != 0xe7 || k.PublicName() != "example.com" || len(k.suites) != 1 {
		t.Errorf("id %#x, public name %s, suites %v", k.ID(), k.PublicName(), k.suites)
	}
	if got := string(k.MarshalPEM()); strings.ReplaceAll(got, "\n", "") != strings.ReplaceAll(example, "\n", "") {
		t.Errorf("written again it is\n%s", got)
	}
}

// TestGenerateKey tests that a new key survives its file, and that crypto/tls takes its config.
func TestGenerateKey(t *testing.T) {
	k, err := GenerateKey("public.example")
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseKey(append([]byte("# a comment\n"), k.MarshalPEM()...))
	if err != nil {
		t.Fatal(err)
	}
	if !k.Equal(again) || again.PublicName() != "public.example" {
		t.Error("the key that was read is not the one that was written")
	}
	if other, _ := GenerateKey("public.example"); k.Equal(other) {
		t.Error("two new keys are the same")
	}
	hello := snitest.HelloConfig(&tls.Config{ServerName: "hidden.example", EncryptedClientHelloConfigList: k.ConfigList()})
	if !bytes.Contains(hello, []byte("public.example")) || bytes.Contains(hello, []byte("hidden.example")) {
		t.Error("a client that was given the config did not use it")
	}
	for _, name := range []string{"", "example", "Example.com", "one..example", "one.example.", "one-.example", "o_ne.example", "192.0.2.1", "one.0x1f", "*.example", "::1", strings.Repeat("a", 64) + ".example"} {
		if _, err := GenerateKey(name); err == nil {
			t.Errorf("a key for the public name %q was made", name)
		}
	}
}

// TestParseKeyRefuses tests what is said about files that are no good.
func TestParseKeyRefuses(t *testing.T) {
	k, err := GenerateKey("public.example")
	if err != nil {
		t.Fatal(err)
	}
	other, err := GenerateKey("other.example")
	if err != nil {
		t.Fatal(err)
	}
	private, rest := pem.Decode(k.MarshalPEM())
	config, _ := pem.Decode(rest)
	p256, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	file := func(private, config []byte) string {
		var b bytes.Buffer
		pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: private})
		pem.Encode(&b, &pem.Block{Type: "ECHCONFIG", Bytes: config})
		return b.String()
	}
	// with returns the list with the bytes from an offset on exchanged. The config begins at 2:
	// version, length, id at 6, KEM at 7, the public key at 11, suites at 45, and the name at 58.
	with := func(at int, b ...byte) []byte {
		list := bytes.Clone(config.Bytes)
		copy(list[at:], b)
		return list
	}
	join := func(lists ...[]byte) []byte {
		var all []byte
		for _, l := range lists {
			all = append(all, l[2:]...)
		}
		return appendVector16(nil, all)
	}
	unknown := appendVector16(nil, []byte{0xfe, 0x0a, 0, 1, 0xff})
	for _, test := range []struct{ file, want string }{
		{"", "no complete PRIVATE KEY"},
		{string(pem.EncodeToMemory(private)), "no complete ECHCONFIG"},
		{string(pem.EncodeToMemory(config)), "no complete PRIVATE KEY"},
		{string(k.MarshalPEM()) + string(pem.EncodeToMemory(private)), "second PRIVATE KEY"},
		{string(k.MarshalPEM()) + string(pem.EncodeToMemory(config)), "second ECHCONFIG"},
		{file(der, config.Bytes), "no PKCS #8 key of X25519"},
		{file(private.Bytes[:40], config.Bytes), "no PKCS #8 key of X25519"},
		{file(append(bytes.Clone(private.Bytes), 0), config.Bytes), "no PKCS #8 key of X25519"},
		{file(nil, config.Bytes), "no PKCS #8 key of X25519"},
		{file(private.Bytes, nil), "no ECHConfigList"},
		{file(private.Bytes, config.Bytes[2:]), "no ECHConfigList"},
		{file(private.Bytes, config.Bytes[:20]), "no ECHConfigList"},
		{file(private.Bytes, append(bytes.Clone(config.Bytes), 0)), "no ECHConfigList"},
		{file(private.Bytes, with(4, 0xff)), "cut off"},
		{file(private.Bytes, with(2, 0xfe, 0x0a)), "not that of the private key"},
		{file(private.Bytes, with(8, 0x21)), "not that of the private key"},
		{file(private.Bytes, with(11, 1, 2, 3)), "not that of the private key"},
		{file(private.Bytes, other.ConfigList()), "not that of the private key"},
		{file(private.Bytes, with(10, 31)), "malformed"},
		{file(private.Bytes, with(44, 13)), "malformed"},
		{file(private.Bytes, with(45, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9)), "no cipher suite"},
		{file(private.Bytes, with(47, 0xff, 0xff, 0, 1, 0xff, 0xff, 0, 1, 0xff, 0xff)), "no cipher suite"},
		{file(private.Bytes, with(59, ' ')), "public name"},
		{file(private.Bytes, join(config.Bytes, with(6, 1))), "two ECHConfigs"},
	} {
		if _, err := ParseKey([]byte(test.file)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v, want %q of\n%s", err, test.want, test.file)
		}
	}
	// One config of the list counts; unknown versions and those of other keys do not.
	k2, err := ParseKey([]byte(file(private.Bytes, join(unknown, other.ConfigList(), config.Bytes))))
	if err != nil || !k2.Equal(k) {
		t.Errorf("a key behind others in its list: %v", err)
	}
	// PKCS #8 of version 1 has the public key behind the private one.
	v1 := append([]byte{0x30, 0x51, 2, 1, 1}, private.Bytes[5:]...)
	v1 = append(append(v1, 0x81, 0x21, 0), k.private.PublicKey().Bytes()...)
	if k2, err = ParseKey([]byte(file(v1, config.Bytes))); err != nil || !k2.Equal(k) {
		t.Errorf("a key with its public key: %v", err)
	}
	// An extension counts only if it is mandatory.
	extended := func(kind byte) string {
		list := append(bytes.Clone(config.Bytes[:len(config.Bytes)-2]), 0, 4, kind, 1, 0, 0)
		list[1] += 4
		list[5] += 4
		return file(private.Bytes, list)
	}
	if _, err := ParseKey([]byte(extended(0))); err != nil {
		t.Errorf("a key with an extension: %v", err)
	}
	if _, err := ParseKey([]byte(extended(0x80))); err == nil || !strings.Contains(err.Error(), "mandatory") {
		t.Errorf("a key with a mandatory extension: %v", err)
	}
}
