//go:build unix

package mutants

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"takeout/verify"
)

// Options are those of the run of takeout verify in which the mutant shows, if program is the mutant. Where the run keeps
// its files, and which servers it takes, is left to the caller.
func (m Mutant) Options(program string) verify.Options {
	stack := verify.Embedded
	if m.Servers {
		stack = verify.Servers
	}
	return verify.Options{
		Stack: stack, Orders: m.Orders, Faults: m.Faults, Kinds: strings.Split(m.Kinds, ","), Seed: seed, Roles: 1,
		Settle: settle, Program: program,
	}
}

const (
	// seed is that of all runs. Whether a mutant shows depends on time, too: its run leaves room for chance.
	seed = 20261125
	// settle is how long a run waits for the end of what is under way. The program takes a third of it.
	settle = time.Minute
)

// Verdict is what a run came to.
type Verdict struct {
	Found []string // the kinds of violations, as "I1 lost"
	Told  []string // some of the violations, as people read them
	Took  time.Duration
}

// Verify does a run. It is this program that verifies, and not the one that is verified: a mutant's eyes may be bad.
func Verify(ctx context.Context, o verify.Options) (Verdict, error) {
	began := time.Now()
	report, err := verify.Run(ctx, o, silent{}, slog.New(slog.DiscardHandler))
	if err != nil {
		return Verdict{}, err
	}
	v := Verdict{Took: time.Since(began)}
	for _, violation := range report.All() {
		v.Found = append(v.Found, violation.Invariant+" "+violation.Class)
		v.Told = append(v.Told, fmt.Sprintf("%s %s: order %q: %s", violation.Invariant, violation.Class, violation.OrderID, violation.Detail))
	}
	slices.Sort(v.Found)
	v.Found = slices.Compact(v.Found)
	return v, nil
}

// CaughtBy returns those violations that the mutant is expected to show; none if it was not caught.
func (m Mutant) CaughtBy(v Verdict) []string {
	return slices.DeleteFunc(slices.Clone(m.Expect), func(kind string) bool { return !slices.Contains(v.Found, kind) })
}

// silent shows nobody how far a run is.
type silent struct{}

func (silent) Stage(string)                         {}
func (silent) Counts(int, int, int, int)            {}
func (silent) Fault(string)                         {}
func (silent) Mended(string, string, time.Duration) {}
