package servers

import "syscall"

// ownGroup keeps a terminal's Ctrl-C away from the child, which must outlive the tests that use it, and
// lets the kernel kill the child when we are killed ourselves.
func ownGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
