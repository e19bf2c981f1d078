//go:build linux && !portable

package main

import "sniproxy/cmd/internal/epoll"

// The engine for Linux.
type engine = epoll.Engine

var startEngine, engineDescriptors = epoll.Start, epoll.Descriptors
