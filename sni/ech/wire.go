package ech

import "encoding/binary"

// A reader takes values from the front of bytes. What does not fit makes it bad, and from then on
// all values are zero.
type reader struct {
	b   []byte
	bad bool
}

// bytes takes n bytes. They stay part of what is read.
func (r *reader) bytes(n int) []byte {
	if n > len(r.b) {
		r.b, r.bad = nil, true
	}
	if r.bad {
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) uint8() (n int) {
	if b := r.bytes(1); b != nil {
		n = int(b[0])
	}
	return n
}

func (r *reader) uint16() (n int) {
	if b := r.bytes(2); b != nil {
		n = int(binary.BigEndian.Uint16(b))
	}
	return n
}

// vector8 takes bytes behind their length in one byte, vector16 in two.
func (r *reader) vector8() []byte  { return r.bytes(r.uint8()) }
func (r *reader) vector16() []byte { return r.bytes(r.uint16()) }

// done reports whether all was taken, and all of it fitted.
func (r *reader) done() bool { return !r.bad && len(r.b) == 0 }

func appendVector8(dst, b []byte) []byte { return append(append(dst, uint8(len(b))), b...) }

func appendVector16(dst, b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(dst, uint16(len(b))), b...)
}
