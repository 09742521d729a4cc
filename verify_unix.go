//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"takeout/service"
	"takeout/verify"
)

// exitUnverified is the code of a verification that could not be done to its end.
const exitUnverified = 3

type verifyCmd struct {
	Stack    string        `enum:"embedded,mysql+amqp" default:"embedded" help:"What to verify: embedded, or mysql+amqp with servers of its own or those of TAKEOUT_VERIFY_MYSQL_URL and TAKEOUT_VERIFY_AMQP_URL."`
	Orders   int           `default:"2000" help:"How many orders to place."`
	Faults   int           `default:"20" help:"How many faults to make meanwhile."`
	Duration time.Duration `help:"End after this time, whatever is left to do then. No limit if 0."`
	Seed     uint64        `help:"Where the orders and faults come from. A new one if 0."`
	Runs     int           `default:"1" help:"How many such runs to do, each with the seed after that of the one before, until one fails."`
	Roles    int           `default:"1" help:"Processes of each role; one of all roles on the embedded stack."`
	Fault    []string      `help:"Make only faults of these kinds; see docs/verification.md."`
	JSON     string        `name:"json" placeholder:"FILE" help:"Write the whole report there."`
	KeepDir  string        `name:"keep" placeholder:"DIR" help:"Keep logs and SQLite files there; it must not exist. They are kept in any case when an invariant was broken."`

	MySQLURL string `env:"TAKEOUT_VERIFY_MYSQL_URL" hidden:"" name:"mysql-url"`
	AMQPURL  string `env:"TAKEOUT_VERIFY_AMQP_URL" hidden:"" name:"amqp-url"`
}

// Run verifies. It fails if an invariant was broken.
func (c *verifyCmd) Run(out output) error {
	if c.Seed == 0 {
		c.Seed = rand.Uint64()
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	options := verify.Options{
		Stack: c.Stack, Orders: c.Orders, Faults: c.Faults, Duration: c.Duration, Seed: c.Seed, Roles: c.Roles, Kinds: c.Fault,
		MySQLURL: c.MySQLURL, AMQPURL: c.AMQPURL, Program: program,
	}
	switch err := options.Validate(); {
	case err != nil:
		return usage(err)
	case c.Runs < 1 || c.Runs > 10_000:
		return usage(errors.New("--runs must be between 1 and 10000"))
	case c.Runs > 1 && c.KeepDir != "":
		return usage(errors.New("--keep is for one run"))
	}
	if err := c.tryJSON(); err != nil { // before hours are spent
		return usage(fmt.Errorf("--json: %w", err))
	}
	ctx, stopped := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stopped()
	var runs []*verify.Report
	for range c.Runs {
		if options.Dir, err = c.dir(); err != nil {
			return err
		}
		fmt.Fprintf(out.err, "takeout %s, stack %s, seed %d\n", service.Version(), c.Stack, options.Seed)
		report, err := verify.Run(ctx, options, newProgress(out.err), slog.New(slog.DiscardHandler))
		if err != nil {
			return exitError{fmt.Errorf("not verified: %w; logs are in %s", err, options.Dir), exitUnverified}
		}
		report.Build = service.Version()
		runs = append(runs, report)
		// A long series must not lose what it has.
		if err := errors.Join(c.save(verify.Sum(runs)), c.conclude(out, report, options.Dir)); err != nil {
			return err
		}
		options.Seed++
	}
	if c.Runs > 1 {
		fmt.Fprintf(out.out, "%d runs, seeds %d to %d: %s\n", c.Runs, c.Seed, options.Seed-1, verify.Sum(runs).Line())
	}
	return nil
}

// dir makes the directory of a run.
func (c *verifyCmd) dir() (string, error) {
	if c.KeepDir == "" {
		dir, err := os.MkdirTemp("", "takeout-verify-")
		if err != nil {
			return "", exitError{fmt.Errorf("not verified: %w", err), exitUnverified}
		}
		return dir, nil
	}
	if err := os.Mkdir(c.KeepDir, 0o700); err != nil {
		return "", usage(fmt.Errorf("--keep: %w", err))
	}
	return c.KeepDir, nil
}

// tryJSON makes sure that the report can be written, and leaves no file where there was none.
func (c *verifyCmd) tryJSON() error {
	if c.JSON == "" {
		return nil
	}
	_, absent := os.Stat(c.JSON)
	file, err := os.OpenFile(c.JSON, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = file.Close()
	if absent != nil {
		_ = os.Remove(c.JSON)
	}
	return err
}

func (c *verifyCmd) save(report *verify.Report) error {
	if c.JSON == "" {
		return nil
	}
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(c.JSON, append(text, '\n'), 0o600)
}

// conclude prints what was found, and cleans up if nothing was.
func (c *verifyCmd) conclude(out output, report *verify.Report, dir string) error {
	for _, v := range report.All() {
		where := ""
		if v.OrderID != "" {
			where = " order " + v.OrderID + ":"
		}
		fmt.Fprintln(out.out, printable(fmt.Sprintf("%s %s:%s %s", v.Invariant, v.Class, where, v.Detail)))
	}
	fmt.Fprintln(out.out, report.Line())
	if report.OK {
		if c.KeepDir == "" {
			return os.RemoveAll(dir)
		}
		return nil
	}
	return exitError{fmt.Errorf("an invariant was broken; logs and files are in %s; again: %s", dir, report.Replay), exitFailed}
}

// progress shows a run: on a terminal in a line that changes, elsewhere a line for each fault.
type progress struct {
	w        io.Writer
	terminal bool
	began    time.Time

	mu    sync.Mutex
	stage string
	fault string
}

func newProgress(w io.Writer) *progress {
	file, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(file.Fd())), began: time.Now()}
}

func (p *progress) clock() string {
	t := time.Since(p.began)
	return fmt.Sprintf("%d:%02d", int(t.Minutes()), int(t.Seconds())%60)
}

// Stage implements verify.Progress.
func (p *progress) Stage(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stage = name
	p.line(name)
}

// Counts implements verify.Progress.
func (p *progress) Counts(orders, ofOrders, faults, ofFaults int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal {
		fmt.Fprintf(p.w, "\r\033[K%s  orders %d/%d  faults %d/%d  %s", p.clock(), orders, ofOrders, faults, ofFaults, p.fault)
	}
}

// Fault implements verify.Progress.
func (p *progress) Fault(kind string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = kind
}

// Mended implements verify.Progress.
func (p *progress) Mended(kind, detail string, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = ""
	p.line(fmt.Sprintf("%-20s %s (%.1fs)", kind, printable(detail), took.Seconds()))
}

func (p *progress) line(text string) {
	clear := ""
	if p.terminal {
		clear = "\r\033[K"
	}
	fmt.Fprintf(p.w, "%s%s  %s\n", clear, p.clock(), strings.ReplaceAll(text, "\n", " "))
}
