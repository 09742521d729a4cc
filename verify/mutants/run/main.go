// Command run plants defects in the program, one at a time, and requires that takeout verify finds each of them, and
// nothing in the program without them:
//
//	go run ./verify/mutants/run [-only name,…] [-quick]
//
// It runs in the root of the module. It exits with 1 if a defect was not found.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"takeout/verify/mutants"
)

func main() {
	only := flag.String("only", "", "mutants, separated by commas; all if empty")
	quick := flag.Bool("quick", false, "only those that show within seconds, with nothing installed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	some, err := mutants.Named(*only)
	if *quick {
		some = slices.DeleteFunc(slices.Clone(some), func(m mutants.Mutant) bool { return !m.Quick })
	}
	caught := false
	if err == nil {
		caught, err = hunt(ctx, some, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil || !caught {
		os.Exit(1)
	}
}

// hunt reports whether all mutants were caught, and the program was found in order under the same settings.
func hunt(ctx context.Context, some []mutants.Mutant, out io.Writer) (bool, error) {
	dir, err := os.MkdirTemp("", "takeout-mutants-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	healthy := filepath.Join(dir, "takeout")
	if err := (mutants.Mutant{}).Build(ctx, ".", healthy); err != nil {
		return false, err
	}
	inOrder := map[mutants.Run]bool{}
	var times []time.Duration
	for _, m := range some {
		if !inOrder[m.Run] {
			v, err := verify(ctx, m.Run, healthy, dir)
			if err != nil {
				return false, err
			}
			if v.Code != 0 {
				return false, fmt.Errorf("the program itself, with %s: found %s\n%s", m.Run, strings.Join(v.Found, " "), v.Said)
			}
			inOrder[m.Run] = true
			fmt.Fprintf(out, "%-26s nothing found with %s in %.1f s\n", "(none)", m.Run, v.Took.Seconds())
		}
		program := filepath.Join(dir, m.Name)
		if err := m.Build(ctx, ".", program); err != nil {
			return false, err
		}
		v, err := verify(ctx, m.Run, program, dir)
		_ = os.Remove(program)
		if err != nil {
			return false, fmt.Errorf("mutant %s: %w", m.Name, err)
		}
		by := m.CaughtBy(v)
		if by == nil {
			fmt.Fprintf(out, "%-26s NOT CAUGHT with %s in %.1f s; expected one of %s, found %s\n%s\n", m.Name, m.Run, v.Took.Seconds(),
				strings.Join(m.Expect, " "), cmp.Or(strings.Join(v.Found, " "), "nothing"), v.Said)
			continue
		}
		fmt.Fprintf(out, "%-26s caught by %s in %.1f s\n", m.Name, strings.Join(by, " "), v.Took.Seconds())
		times = append(times, v.Took)
	}
	fmt.Fprintf(out, "%d/%d caught, median time to catch %.1f s\n", len(times), len(some), median(times).Seconds())
	return len(times) == len(some), nil
}

func verify(ctx context.Context, r mutants.Run, program, dir string) (mutants.Verdict, error) {
	files, err := os.MkdirTemp(dir, "run-")
	if err != nil {
		return mutants.Verdict{}, err
	}
	defer os.RemoveAll(files)
	return r.Verify(ctx, program, files)
}

func median(times []time.Duration) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return (times[(len(times)-1)/2] + times[len(times)/2]) / 2
}
