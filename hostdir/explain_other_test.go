//go:build !linux

package hostdir_test

import (
	"testing"

	"sniproxy/hostdir"
)

func entryDialers(*testing.T) map[string]func([]byte) (int, hostdir.Marks, error) {
	return map[string]func([]byte) (int, hostdir.Marks, error){"DialEntry": hostdir.DialEntry}
}
