package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// A program is one that was started, sniproxy or sniproxy-tls.
type program struct {
	*exec.Cmd
	name   string
	ready  chan struct{} // closed when it serves
	exited chan struct{} // closed when ProcessState is set
}

// startProgram starts a program, which serves when it prints a line that begins with ready. What it
// prints is printed.
func startProgram(name string, cmd *exec.Cmd, ready string) (*program, error) {
	p := &program{Cmd: cmd, name: name, ready: make(chan struct{}), exited: make(chan struct{})}
	p.Stderr = os.Stderr
	// A process group of its own keeps a Ctrl-C at the terminal from it: it is ours to stop.
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithUs(p.SysProcAttr)
	stdout, err := p.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.Start(); err != nil {
		return nil, err
	}
	go func() {
		isReady := false
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			fmt.Printf("%s (process %d): %s\n", name, p.Process.Pid, lines.Text())
			if !isReady && strings.HasPrefix(lines.Text(), ready) {
				isReady = true
				close(p.ready)
			}
		}
		p.Wait() // its outcome is in ProcessState
		close(p.exited)
	}()
	return p, nil
}

// await waits until the program serves.
func (p *program) await(ctx context.Context) error {
	select {
	case <-p.ready:
		return nil
	case <-p.exited:
		return fmt.Errorf("%s did not start: %v", p.name, p.ProcessState)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop stops the program gracefully. Unless there was an error before, err is how it ended.
func (p *program) stop(err *error) {
	p.Process.Signal(syscall.SIGHUP) // fails if it has ended
	<-p.exited
	if *err == nil && !p.ProcessState.Success() {
		*err = fmt.Errorf("%s: %v", p.name, p.ProcessState)
	}
}
