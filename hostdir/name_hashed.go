//go:build hashed

package hostdir

import (
	"encoding/base64"

	"golang.org/x/crypto/blake2s"
)

// Hashed tells whether directories are named after the hash of the host name: whether the build tag
// hashed was given.
const Hashed = true

// MaxName is the length in bytes of the longest directory name that [AppendName] makes.
const MaxName = 43

// AppendName appends the name of the directory of the host with the canonical name and returns the
// longer slice. It is the BLAKE2s-256 of the name (RFC 7693), in base64url without padding (RFC
// 4648, Section 5): 43 bytes.
func AppendName(dst, name []byte) []byte {
	sum := blake2s.Sum256(name)
	return base64.RawURLEncoding.AppendEncode(dst, sum[:])
}
