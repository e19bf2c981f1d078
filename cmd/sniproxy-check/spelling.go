package main

import (
	"fmt"
	"slices"
	"strings"
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

// alike reports whether a name may be a misspelling of another one: whether at most two insertions,
// deletions or replacements of letters and digits turn one into the other (Levenshtein distance).
func alike(name, other string) bool {
	a, b := bare(name), bare(other)
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
	return row[len(b)] <= 2
}

func bare(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(name))
}
