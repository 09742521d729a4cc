//go:build unix

// Command run plants defects in the program, one at a time, and requires that a run of takeout verify finds each of them,
// and finds nothing in the program without them:
//
//	go run ./verify/mutants/run [-only name,…] [-quick]
//
// It runs in the root of the module, and starts a database server and a broker unless TAKEOUT_VERIFY_MYSQL_URL and
// TAKEOUT_VERIFY_AMQP_URL name some. It exits with 1 if a defect was not found.
package main

import (
	"cmp"
	"context"
	"errors"
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

	"takeout/verify"
	"takeout/verify/mutants"
	"takeout/verify/servers"
)

func main() {
	only := flag.String("only", "", "mutants, separated by commas; all if empty")
	quick := flag.Bool("quick", false, "only those that show within seconds, with nothing installed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	caught, err := run(ctx, *only, *quick)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil || !caught {
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, only string, quick bool) (bool, error) {
	some, err := mutants.Named(only)
	if err != nil {
		return false, err
	}
	if quick {
		some = slices.DeleteFunc(slices.Clone(some), func(m mutants.Mutant) bool { return !m.Quick })
	}
	h := &hunt{out: os.Stdout, mysql: os.Getenv("TAKEOUT_VERIFY_MYSQL_URL"), amqp: os.Getenv("TAKEOUT_VERIFY_AMQP_URL"), sound: map[string]bool{}}
	defer h.end()
	if slices.ContainsFunc(some, func(m mutants.Mutant) bool { return m.Servers }) {
		if err := h.startServers(ctx); err != nil {
			return false, err
		}
	}
	if h.dir, err = os.MkdirTemp("", "takeout-mutants-"); err != nil {
		return false, err
	}
	return h.run(ctx, some)
}

// hunt is what the runs have in common.
type hunt struct {
	out         io.Writer
	dir         string
	mysql, amqp string // URLs of servers
	ours        []*servers.Server
	sound       map[string]bool // runs in which nothing was found wrong with the program itself
}

func (h *hunt) startServers(ctx context.Context) error {
	for kind, url := range map[servers.Kind]*string{servers.MySQL: &h.mysql, servers.RabbitMQ: &h.amqp} {
		if *url != "" {
			continue
		}
		server, err := servers.Start(ctx, kind, false)
		if err != nil {
			return err
		}
		h.ours = append(h.ours, server)
		*url = server.URL().String()
	}
	return nil
}

func (h *hunt) end() {
	for _, server := range h.ours {
		server.Close()
	}
	if h.dir != "" {
		_ = os.RemoveAll(h.dir)
	}
}

// run reports whether all were caught.
func (h *hunt) run(ctx context.Context, some []mutants.Mutant) (bool, error) {
	itself := filepath.Join(h.dir, "takeout")
	if err := (mutants.Mutant{}).Build(ctx, ".", itself); err != nil {
		return false, err
	}
	var times []time.Duration
	for _, m := range some {
		if err := h.requireSound(ctx, m, itself); err != nil {
			return false, err
		}
		program := filepath.Join(h.dir, m.Name)
		if err := m.Build(ctx, ".", program); err != nil {
			return false, err
		}
		v, err := h.verify(ctx, m.Options(program))
		_ = os.Remove(program)
		if err != nil {
			return false, fmt.Errorf("mutant %s: %w", m.Name, err)
		}
		if by := m.CaughtBy(v); len(by) > 0 {
			h.say(m.Name, "caught by %s", v, strings.Join(by, ", "))
			times = append(times, v.Took)
		} else {
			h.say(m.Name, "NOT CAUGHT by %s; found %s", v, strings.Join(m.Expect, " or "), cmp.Or(strings.Join(v.Found, ", "), "nothing"))
		}
	}
	fmt.Fprintf(h.out, "%d/%d caught, median time to catch %.1f s\n", len(times), len(some), median(times).Seconds())
	return len(times) == len(some), nil
}

// requireSound requires that nothing is found in the program itself by the run that is to find the mutant.
func (h *hunt) requireSound(ctx context.Context, m mutants.Mutant, program string) error {
	o := m.Options(program)
	what := fmt.Sprintf("%s, %d orders, %d faults (%s)", o.Stack, o.Orders, o.Faults, m.Kinds)
	if h.sound[what] {
		return nil
	}
	v, err := h.verify(ctx, o)
	if err != nil {
		return err
	}
	if len(v.Found) > 0 {
		return errors.New("the program itself breaks a promise, without a mutant: " + what + "\n" + strings.Join(v.Told, "\n"))
	}
	h.sound[what] = true
	h.say("(none)", "sound with %s", v, what)
	return nil
}

func (h *hunt) verify(ctx context.Context, o verify.Options) (v mutants.Verdict, err error) {
	if o.Dir, err = os.MkdirTemp(h.dir, "run-"); err != nil {
		return v, err
	}
	defer os.RemoveAll(o.Dir)
	o.MySQLURL, o.AMQPURL = h.mysql, h.amqp
	return mutants.Verify(ctx, o)
}

func (h *hunt) say(name, format string, v mutants.Verdict, args ...any) {
	fmt.Fprintf(h.out, "%-26s %6.1f s  %s\n", name, v.Took.Seconds(), fmt.Sprintf(format, args...))
}

func median(times []time.Duration) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return (times[(len(times)-1)/2] + times[len(times)/2]) / 2
}
