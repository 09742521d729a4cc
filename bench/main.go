//go:build linux

// Bench measures takeout and what it is compared with: one run, the same servers for all, in turns. See docs/performance.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// bench is one run.
type bench struct {
	*stack
	out    io.Writer
	pid    int
	span   time.Duration // how long an arm places orders in each of its turns
	warmup int           // orders
	orders int           // of each turn; 0 for what fits into the span
	quick  bool
	reps   int

	profile string // directory, empty for no profiles

	report report
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		// A signal for the whole group is the parent's business.
		signal.Ignore(os.Interrupt)
		if err := serveChild(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures what the arguments name, and writes the tables to out and the rest to the file that BENCH_JSON names.
func run(ctx context.Context, args []string, out io.Writer) error {
	b := &bench{out: out, pid: os.Getpid(), span: 6 * time.Second, warmup: 500, report: newReport()}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(out)
	wantArms := flags.String("arms", "all", "arms to measure, separated by commas: all, none, "+strings.Join(names(arms, func(a arm) string { return a.name }), ", ")+"; floor and embedded are several")
	wantRows := flags.String("rows", "all", "further rows: all, none, "+strings.Join(names(rows, func(r row) string { return r.name }), ", "))
	flags.IntVar(&b.reps, "reps", 3, "turns of each arm")
	flags.IntVar(&b.orders, "orders", 0, "orders of a turn; 0 for what the arm does in six seconds")
	flags.BoolVar(&b.quick, "quick", false, "small numbers and one turn: says whether it works, not how fast")
	flags.StringVar(&b.profile, "profile", "", "directory for a CPU profile of each arm")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if b.quick {
		b.reps, b.span, b.warmup = 1, 300*time.Millisecond, 20
	}
	var chosen []arm
	var further []row
	for _, a := range arms {
		if wanted(*wantArms, a.name) {
			chosen = append(chosen, a)
		}
	}
	for _, r := range rows {
		if wanted(*wantRows, r.name) {
			further = append(further, r)
		}
	}
	if len(chosen)+len(further) == 0 {
		return errors.New("nothing to measure; -h says what there is")
	}
	if b.profile != "" {
		if err := os.MkdirAll(b.profile, 0o750); err != nil {
			return err
		}
	}
	stack, err := startStack(ctx)
	if err != nil {
		return err
	}
	defer stack.close()
	b.stack = stack
	b.report.describe(b)
	for turn := range b.reps {
		for _, a := range chosen {
			began := time.Now()
			result, err := b.repeat(ctx, a)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			b.report.add(b.out, turn, a, result, time.Since(began), err)
		}
	}
	for _, r := range further {
		began := time.Now()
		result, err := r.measure(b, ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.report.addRow(b.out, r, result, time.Since(began), err)
	}
	return b.report.finish(b.out)
}

func names[T any](all []T, name func(T) string) []string {
	var found []string
	for _, one := range all {
		found = append(found, name(one))
	}
	return found
}

// wanted reports whether a list names something, or the first word of its name.
func wanted(list, name string) bool {
	first, _, _ := strings.Cut(name, "_")
	all := strings.Split(list, ",")
	return slices.Contains(all, "all") || slices.Contains(all, name) || slices.Contains(all, first)
}
