package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits on reading directories that tenants can write to, or that are on their file systems: such
// a directory can be endless.
const (
	entriesMost   = 100_000          // entries of the hosts directory
	strangersMost = 2_000            // lines about entries that are no hosts
	filesMost     = 1_000            // files in a host's directory, to find misspelt ones
	listLimit     = 10 * time.Second // time to read the hosts directory
	batch         = 1_000            // entries that are read at once
)

// A listing is what the hosts directory has.
type listing struct {
	entries []string // those that get a line, in order
	omitted int      // how many get none, since they are no hosts
	cut     string   // why there may be more, "" if there are not
}

// open opens the hosts directory to list it.
func (c *checker) open() (err error) {
	c.dir, err = os.Open(".")
	return err
}

// list reads the hosts directory, which it opens if it is not open yet.
func (c *checker) list() (listing, error) {
	if c.dir == nil {
		if err := c.open(); err != nil {
			return listing{}, err
		}
	}
	dir := c.dir
	type part struct {
		entries []fs.DirEntry
		err     error
	}
	parts, enough := make(chan part), make(chan struct{})
	defer close(enough)
	go func() {
		defer dir.Close()
		for {
			var p part
			p.entries, p.err = dir.ReadDir(batch)
			select {
			case parts <- p:
			case <-enough:
				return
			}
			if len(p.entries) == 0 {
				return
			}
		}
	}()
	var all listing
	late := time.After(listLimit)
	for looked, strangers := 0, 0; ; {
		select {
		case p := <-parts:
			for _, e := range p.entries {
				if looked++; looked > entriesMost {
					all.cut = fmt.Sprintf("has more than %d entries", entriesMost)
					return all.sorted(), nil
				}
				switch {
				case strings.HasPrefix(e.Name(), "."):
					continue
				case !isStranger(e):
				case strangers == strangersMost:
					all.omitted++
					continue
				default:
					strangers++
				}
				all.entries = append(all.entries, e.Name())
			}
			if len(p.entries) == 0 {
				if p.err == io.EOF {
					p.err = nil
				}
				return all.sorted(), p.err
			}
		case <-late:
			all.cut = fmt.Sprintf("was not read to its end within %v", listLimit)
			return all.sorted(), nil
		}
	}
}

func (l listing) sorted() listing {
	slices.Sort(l.entries)
	return l
}

// isStranger reports whether an entry is no host, whatever the look-up says.
func isStranger(e fs.DirEntry) bool {
	return listed(e.Name()).wrong != "" || !e.IsDir() && e.Type() != fs.ModeSymlink && e.Type() != fs.ModeIrregular
}

// names returns the names of the first files in a host's directory. It is no error if they cannot
// be listed, since sniproxy does not list them.
func names(dir string) []string {
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer d.Close()
	files, _ := d.Readdirnames(filesMost)
	slices.Sort(files)
	return files
}
