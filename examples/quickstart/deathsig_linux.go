package main

import "syscall"

// dieWithUs has the kernel stop the daemon when the thread that started it ends, be it by SIGKILL.
func dieWithUs(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGHUP }
