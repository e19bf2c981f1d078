//go:build !linux || portable

package main

import "sniproxy/cmd/internal/goroutines"

// The portable engine.
type engine = goroutines.Engine

var startEngine, engineDescriptors = goroutines.Start, goroutines.Descriptors
