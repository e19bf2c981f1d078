package sni_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"sniproxy/sni"
)

func ExampleParser() {
	client, conn := net.Pipe()
	defer conn.Close()
	go tls.Client(client, &tls.Config{ServerName: "WWW.Example.com"}).Handshake()

	var p sni.Parser
	b := make([]byte, 64) // less than a hello, so it takes some reads
	for {
		n, err := conn.Read(b)
		if err != nil {
			fmt.Println(err)
			return
		}
		name, done, err := p.Parse(b[:n])
		if err != nil {
			fmt.Println(err)
			return
		}
		if done {
			fmt.Printf("%s\n", name)
			return
		}
	}
	// Output: www.example.com
}

func ExampleParser_Parse() {
	var p sni.Parser
	_, _, err := p.Parse([]byte("GET / HTTP/1.1\r\n"))
	fmt.Println(err)

	var alert sni.Alert
	if errors.As(err, &alert) {
		fmt.Printf("% x\n", alert.Description.Record())
	}
	// Output:
	// plain HTTP, not TLS (alert 10, unexpected_message)
	// 15 03 03 00 02 02 0a
}

func ExampleParser_nameless() {
	client, conn := net.Pipe()
	defer conn.Close()
	go tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake()

	var p sni.Parser
	b := make([]byte, 4096)
	for {
		n, err := conn.Read(b)
		if err != nil {
			fmt.Println(err)
			return
		}
		if name, done, err := p.Parse(b[:n]); done {
			fmt.Printf("%q, %v\n", name, err)
			return
		}
	}
	// Output: "", <nil>
}

func ExampleAppendCanonical() {
	for _, name := range []string{"WWW.Example.com", "a_b.example", "..", "example.com."} {
		canonical, err := sni.AppendCanonical(nil, []byte(name))
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%s\n", canonical)
	}
	// Output:
	// www.example.com
	// a_b.example
	// server name has an empty label (alert 112, unrecognized_name)
	// example.com
}

func ExampleDescription_Record() {
	fmt.Printf("%v: % x\n", sni.UserCanceled, sni.UserCanceled.Record())
	// Output: user_canceled: 15 03 03 00 02 02 5a
}
