//go:build unix && !linux

package servers

import "syscall"

// ownGroup keeps a terminal's Ctrl-C away from the child, which must outlive the tests that use it.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
