//go:build !hashed

package hostdir

// Hashed tells whether directories are named after the hash of the host name: whether the build tag
// hashed was given.
const Hashed = false

// MaxName is the length in bytes of the longest directory name that [AppendName] makes.
const MaxName = 254

// AppendName appends the name of the directory of the host with the canonical name and returns the
// longer slice. It is the name itself.
func AppendName(dst, name []byte) []byte { return append(dst, name...) }
