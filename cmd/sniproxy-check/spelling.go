package main

import (
	"fmt"
	"slices"
	"strings"

	"sniproxy/cmd/internal/hostname"
	"sniproxy/hostdir"
)

// remarksMost is how many remarks there are about files in a host's directory.
const remarksMost = 10

var markers = []string{"send-proxy-v1", "send-proxy-v2", "log-connections"}

// misspelt remarks on files in a host's directory that look like markers and are none.
func misspelt(dir string) (remarks []string) {
	for _, name := range names(dir) {
		if len(remarks) == remarksMost {
			break
		}
		if slices.Contains(markers, name) {
			continue
		}
		meant := strings.HasPrefix(name, "send-proxy") || strings.HasPrefix(name, "log")
		for _, m := range markers {
			meant = meant || alike(name, m)
		}
		if meant {
			remarks = append(remarks, fmt.Sprintf("%s in it means nothing, only %s, %s and %s do", show(name), markers[0], markers[1], markers[2]))
		}
	}
	return remarks
}

// closeTo returns the path of a file in a directory whose name is like the given one, "" if there
// is none.
func closeTo(dir, name string) string {
	for _, other := range names(dir) {
		if alike(other, name) {
			return dir + "/" + other
		}
	}
	return ""
}

// nearbyMost is how many entries are named that nearly are a name.
const nearbyMost = 3

// nearby names entries of the hosts directory that nearly are the one of a name: in another
// spelling of the same name, or with one letter more, less or different. It is "" if there are
// none, or if the directory cannot be listed.
func (c *checker) nearby(name []byte) string {
	same, alike := c.neighbours(name)
	switch {
	case len(same) > 0:
		return "rename " + strings.Join(same, " or ") + " to " + string(hostdir.AppendName(nil, name)) + ", the only form that is looked up"
	case len(alike) > 0:
		return "is it " + strings.Join(alike, " or ") + "?"
	}
	return ""
}

// neighbours returns entries that are another spelling of a name, and others that are nearly the
// name.
func (c *checker) neighbours(name []byte) (same, alike []string) {
	if name == nil {
		return nil, nil
	}
	c.listOnce.Do(func() {
		all, _ := c.list()
		c.listed, c.spellings = all.entries, map[string][]string{}
		for _, entry := range c.listed {
			if parsed, err := hostname.Parse(entry); err == nil {
				c.spellings[string(parsed)] = append(c.spellings[string(parsed)], show(entry))
			}
		}
	})
	same = c.spellings[string(name)]
	if hostdir.Hashed || len(same) > 0 {
		return same[:min(len(same), nearbyMost)], nil
	}
	for _, entry := range c.listed {
		if len(alike) < nearbyMost && entry[0] != '*' && near(entry, string(name)) {
			alike = append(alike, show(entry))
		}
	}
	return nil, alike
}

// near reports whether one insertion, deletion or replacement makes an entry the name.
func near(entry, name string) bool {
	for len(entry) > 0 && len(name) > 0 && entry[0] == name[0] {
		entry, name = entry[1:], name[1:]
	}
	for len(entry) > 0 && len(name) > 0 && entry[len(entry)-1] == name[len(name)-1] {
		entry, name = entry[:len(entry)-1], name[:len(name)-1]
	}
	return max(len(entry), len(name)) == 1
}

// alike reports whether a name may be a misspelling of another one: whether at most two insertions,
// deletions or replacements of letters and digits turn one into the other.
func alike(name, other string) bool { return distance(bare(name), bare(other)) <= 2 }

// distance returns the Levenshtein distance of two strings.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // the distances of a[:i] from each b[:j]
	for j := range row {
		row[j] = j
	}
	for i := range a {
		diagonal := row[0]
		row[0] = i + 1
		for j := range b {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func bare(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(name))
}
