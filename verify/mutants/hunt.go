package mutants

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// Run is a run of takeout verify.
type Run struct {
	Stack  string // "embedded" or "mysql+amqp"
	Faults string // their kinds, separated by commas
	Count  int    // of faults
	Orders int
}

// String says it in a few words.
func (r Run) String() string {
	return fmt.Sprintf("%d orders and %d faults (%s) on %s", r.Orders, r.Count, r.Faults, r.Stack)
}

// seed of all runs. Whether a mutant shows depends on time too, so that the settings of a run leave room for chance.
const seed = 20261125

// runTime is how long a run may take.
const runTime = 5 * time.Minute

// Verdict is what a run came to.
type Verdict struct {
	Code  int      // of takeout verify: 0 for a program that kept its promises, 1 for one that did not
	Found []string // the kinds of violations, as "I1/lost"
	Took  time.Duration
	Said  string // how the output ends
}

// Verify runs program verify, and lets it keep its files in dir.
func (r Run) Verify(ctx context.Context, program, dir string) (Verdict, error) {
	ctx, cancel := context.WithTimeout(ctx, runTime)
	defer cancel()
	report := filepath.Join(dir, "report.json")
	verify := exec.CommandContext(ctx, program, "verify", "--stack", r.Stack, "--fault", r.Faults, "--faults", strconv.Itoa(r.Count),
		"--orders", strconv.Itoa(r.Orders), "--seed", strconv.Itoa(seed), "--json", report)
	verify.Cancel = func() error { return verify.Process.Signal(os.Interrupt) } // it has servers to stop
	verify.WaitDelay = 30 * time.Second
	began := time.Now()
	said, err := verify.CombinedOutput()
	v := Verdict{Code: verify.ProcessState.ExitCode(), Took: time.Since(began), Said: string(said[max(0, len(said)-2000):])}
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		return v, err
	}
	if v.Code > 1 || v.Code < 0 {
		return v, fmt.Errorf("takeout verify ended with code %d: %s", v.Code, v.Said)
	}
	v.Found, err = violations(report)
	return v, err
}

// violations reads the kinds of violations from a report.
func violations(file string) ([]string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var report struct {
		Violations []struct{ Invariant, Class string }
	}
	if err := json.Unmarshal(text, &report); err != nil {
		return nil, fmt.Errorf("the report cannot be read: %w", err)
	}
	var kinds []string
	for _, v := range report.Violations {
		kinds = append(kinds, v.Invariant+"/"+v.Class)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds), nil
}

// CaughtBy returns those violations of the verdict that the mutant is expected to show; none if it was not caught.
func (m Mutant) CaughtBy(v Verdict) []string {
	if v.Code != 1 {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(v.Found), func(kind string) bool { return !slices.Contains(m.Expect, kind) })
}
