// Command run starts the servers that tests need, runs a command that finds them in its environment, and
// stops them:
//
//	go run ./tests/testenv/run -- go test ./...
//
// It exits with the command's code. All test packages below it share one MySQL or MariaDB and one
// RabbitMQ; see package testenv for how they are found.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"takeout/tests/testenv"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "usage: go run ./tests/testenv/run -- command [argument ...]")
		return 2
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	endWithParent()

	shared, err := startShared(signals)
	defer shared.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, errInterrupted) {
			return 130
		}
		return 1
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), shared.Environ()...)
	// A terminal sends Ctrl-C to the command as well. Otherwise we pass signals on, and to its children
	// too, because go test leaves the tests running when it is terminated.
	group := !term.IsTerminal(int(os.Stdin.Fd()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: group}
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "run: %v\n", err)
		return 127
	}
	go func() {
		for s := range signals {
			if group {
				_ = syscall.Kill(-cmd.Process.Pid, s.(syscall.Signal))
			} else if s != os.Interrupt {
				_ = cmd.Process.Signal(s)
			}
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode()
	case errors.As(err, &exit):
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal())
	default:
		fmt.Fprintf(os.Stderr, "run: %v\n", err)
		return 1
	}
}

var errInterrupted = errors.New("run: interrupted while starting the servers")

// startShared starts the servers, or gives up when a signal arrives.
func startShared(signals <-chan os.Signal) (*testenv.Shared, error) {
	type result struct {
		shared *testenv.Shared
		err    error
	}
	started := make(chan result, 1)
	go func() {
		shared, err := testenv.StartShared()
		started <- result{shared, err}
	}()
	select {
	case r := <-started:
		return r.shared, r.err
	case s := <-signals:
		return &testenv.Shared{}, fmt.Errorf("%w (%v)", errInterrupted, s)
	}
}
