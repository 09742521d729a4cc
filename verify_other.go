//go:build !unix

package main

import "errors"

type verifyCmd struct{}

// Run says that this is not the place for it.
func (verifyCmd) Run() error { return errors.New("verify needs a Unix: it kills and halts processes") }
