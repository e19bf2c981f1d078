package sni

import (
	"fmt"
	"testing"

	"sniproxy/sni/snitest"
)

// The time for a whole hello in one call: one of 517 bytes, which many clients send; one with
// post-quantum key shares; and that in three records.
func BenchmarkParse(b *testing.B) {
	for _, c := range captures(b) {
		switch c.file {
		case "curl", "chromium", "go":
			benchmarkParse(b, c.file, c.stream)
		}
		if c.file == "go" {
			msg := snitest.Payload(c.stream)
			benchmarkParse(b, "go-3-records", snitest.Records(msg, len(msg)/3+1))
		}
	}
}

func benchmarkParse(b *testing.B, what string, stream []byte) {
	b.Run(fmt.Sprintf("%s-%d", what, len(stream)), func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var p Parser
			if _, done, err := p.Parse(stream); !done || err != nil {
				b.Fatal(err)
			}
		}
	})
}

// The time for a byte of a hello that comes byte by byte. It is the same for all sizes, so the time
// for a hello grows with its size and no faster.
func BenchmarkParseByteByByte(b *testing.B) {
	for _, size := range []int{1, 4, 16, 60} {
		b.Run(fmt.Sprintf("%dKiB", size), func(b *testing.B) {
			stream := snitest.Records(snitest.ClientHello{Extensions: func(m *snitest.Message) {
				m.Extension(snitest.Grease, snitest.Fill(size<<10-100))
				m.ServerName(func() { m.Entry(snitest.HostName, "example.com") })
			}}.Build().Bytes, maxRecord)
			for b.Loop() {
				var p Parser
				var name []byte
				for i := range stream {
					name, _, _ = p.Parse(stream[i : i+1])
				}
				if len(name) == 0 {
					b.Fatal("no name")
				}
			}
			perByte := float64(b.Elapsed().Nanoseconds()) / float64(b.N) / float64(len(stream))
			b.ReportMetric(perByte, "ns/byte")
		})
	}
}
