//go:build race

package main

// The race detector is built in, which takes several times the memory.
const raceEnabled = true
