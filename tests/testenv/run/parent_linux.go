package main

import "syscall"

// endWithParent makes the kernel terminate us in good order when our parent is killed: go run passes no
// SIGTERM on, and the servers must not stay.
func endWithParent() {
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0)
}
