package hostdir_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"sniproxy/hostdir"
)

// Goal: key files come in the order of their names, at most MaxKeys of them, whatever the working
// directory of a thread is; those with a dot in front do not count, and no descriptor stays open.
func TestKeyFiles(t *testing.T) {
	chdir(t)
	h := open(t)
	files, more, ignored, err := h.KeyFiles()
	if len(files) > 0 || more != 0 || ignored != "" || err != nil {
		t.Errorf("without .ech: %v, %d, %q, %v", files, more, ignored, err)
	}
	must(t, os.Mkdir(".ech", 0o755))
	must(t, os.WriteFile(".ech/.dot", nil, 0o644))
	for i := range hostdir.MaxKeys + 2 {
		must(t, os.WriteFile(fmt.Sprintf(".ech/%02d", 50-i), []byte{byte(i)}, 0o644))
	}
	before, _ := filepath.Glob("/proc/self/fd/*")
	for range 10 {
		files, more, ignored, err = h.KeyFiles()
	}
	if after, _ := filepath.Glob("/proc/self/fd/*"); len(after) > len(before) {
		t.Errorf("%d descriptors, %d before", len(after), len(before))
	}
	if len(files) != hostdir.MaxKeys || more != 2 || ignored != "" || err != nil {
		t.Fatalf("%d files, and %d more, ignored %q, error %v", len(files), more, ignored, err)
	}
	for i, f := range files {
		n := 50 - hostdir.MaxKeys - 1 + i
		if f.Name != fmt.Sprint(n) || f.Err != nil || string(f.Content) != string([]byte{byte(50 - n)}) {
			t.Errorf("file %d is %+v", i, f)
		}
	}
	must(t, os.Chmod(".ech", 0o757))
	if files, _, ignored, err = h.KeyFiles(); len(files) > 0 || ignored == "" || err != nil {
		t.Errorf("that anybody may write to: %d files, ignored %q, error %v", len(files), ignored, err)
	}
}
