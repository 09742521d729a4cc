//go:build unix

// Package verify tries to make the program lose an order or dispatch one twice. It starts the program's roles as
// processes, places orders as clients do, breaks processes, servers and connections meanwhile, and then compares what the
// databases hold with what the clients were told. What it asks and what it breaks follows from a seed.
package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"takeout/verify/check"
	"takeout/verify/history"
)

// Stacks that can be verified.
const (
	Embedded = "embedded"
	Servers  = "mysql+amqp"
)

// Options say what a run does.
type Options struct {
	Stack    string        // Embedded or Servers
	Orders   int           // to place, 1 or more
	Faults   int           // to make, 0 or more
	Duration time.Duration // after which no more orders are placed and no more faults made, without limit if zero
	Seed     uint64
	Roles    int           // processes of each role; always one process of all roles on the embedded stack
	Settle   time.Duration // how long everything may take to come to rest after the last fault; five minutes if zero
	Kinds    []string      // of faults, as Kinds names them; empty for all that the stack can have but those that destroy messages

	MySQLURL string // a server to use; one is started if empty, and only that one is killed and restarted
	AMQPURL  string // likewise

	Program string // the takeout to verify
	Dir     string // where logs and files go; it must be empty
}

// Validate returns what is wrong with the options.
func (o *Options) Validate() error {
	switch {
	case o.Stack != Embedded && o.Stack != Servers:
		return fmt.Errorf("--stack must be %s or %s", Embedded, Servers)
	case o.Orders < 1 || o.Orders > 10_000_000:
		return errors.New("--orders must be between 1 and 10000000")
	case o.Faults < 0 || o.Faults > 100_000:
		return errors.New("--faults must be between 0 and 100000")
	case o.Duration < 0:
		return errors.New("--duration must not be negative")
	case o.Roles < 1 || o.Roles > 16:
		return errors.New("--roles must be between 1 and 16")
	}
	for _, kind := range o.Kinds {
		if !slices.Contains(Kinds(o.Stack), kind) {
			return fmt.Errorf("--fault: the %s stack has no fault %q; it has %s", o.Stack, kind, strings.Join(Kinds(o.Stack), ", "))
		}
	}
	return nil
}

// settleTime is how long everything may take to come to rest if Options do not say it.
const settleTime = 5 * time.Minute

// eventKey signs the run's events, and must be in no log.
const eventKey = "canary-of-the-event-key-3f1d"

// run is one run.
type run struct {
	Options
	stack   *stack
	fleet   *fleet
	load    *load
	report  *Report
	show    Progress
	began   time.Time
	kinds   []kind
	foreign []check.Foreign
	hurt    bool          // messages are destroyed on purpose
	grace   time.Duration // how old a difference between two services must be to be one
	pacer   pacer
	complain
}

// complain collects what went wrong beside the invariants that the databases show.
type complain struct {
	mu    sync.Mutex
	found []check.Violation
}

func (c *complain) violated(invariant, class, format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.found = append(c.found, check.Violation{Invariant: invariant, Class: class, Number: -1, Detail: fmt.Sprintf(format, args...)})
}

// Run does one run and reports what it found. The error says why it could not be done; that an invariant was broken is
// in the report.
func Run(ctx context.Context, o Options, show Progress, logger *slog.Logger) (*Report, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	r := &run{Options: o, show: show, began: time.Now(), report: newReport(o)}
	if err := r.prepare(ctx, logger); err != nil {
		r.end()
		return nil, err
	}
	defer r.end()
	r.inflict(ctx)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := r.settle(ctx); err != nil {
		return nil, err
	}
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	return r.report, nil
}

// prepare starts everything.
func (r *run) prepare(ctx context.Context, logger *slog.Logger) (err error) {
	r.show.Stage("starting")
	r.kinds = kindsOf(r.Stack, r.Kinds)
	r.grace = time.Minute
	if r.hurt = slices.ContainsFunc(r.kinds, func(k kind) bool { return k.hurts }); r.hurt {
		r.grace = 5 * time.Second // it waits ten times as long for services that have dealt with nothing newer
	}
	logs := filepath.Join(r.Dir, "logs")
	data := filepath.Join(r.Dir, "data")
	for _, dir := range []string{logs, data} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if r.Stack == Embedded {
		r.stack = newEmbedded(data, logger)
	} else {
		id := fmt.Sprintf("%s%04x", strconv.FormatUint(r.Seed%46_656, 36), rand.N(1<<16))
		if r.stack, err = newServers(ctx, r.MySQLURL, r.AMQPURL, id, logger); err != nil {
			return err
		}
	}
	level := "warn"
	if r.Orders <= 20_000 {
		level = "debug" // to see whether secrets are in it
	}
	env := append(r.stack.settings,
		"TAKEOUT_EVENT_KEY="+eventKey, "TAKEOUT_LOG_LEVEL="+level, "TAKEOUT_LOG_FORMAT=json",
		"TAKEOUT_RETRY_DELAYS=200ms,500ms,1s,3s", "TAKEOUT_DRAIN_TIMEOUT=5s", "TAKEOUT_START_TIMEOUT=10m",
		"TAKEOUT_DISPATCH_DEADLINE=0", "TAKEOUT_PAYMENT_REFUSALS=0.02", "TAKEOUT_PAYMENT_TIMEOUTS=0.02",
		"TAKEOUT_RECONCILE_EVERY=5s", "TAKEOUT_RECONCILE_GRACE="+r.grace.String(), "TAKEOUT_COMPENSATION_LIMIT=1000000",
	)
	r.fleet = &fleet{}
	if r.Stack == Embedded {
		err = r.fleet.add("takeout", "all", r.Program, logs, env)
	} else {
		for _, role := range []string{"order", "relay", "dispatch", "compensation", "payment", "points", "reconcile"} {
			for i := range r.Roles {
				err = errors.Join(err, r.fleet.add(fmt.Sprintf("%s-%d", role, i+1), role, r.Program, logs, env))
			}
		}
	}
	if err != nil {
		return err
	}
	if err := r.fleet.start(ctx); err != nil {
		return err
	}
	r.load = newLoad(history.Plan{Seed: r.Seed, Orders: r.Orders}, r.fleet, r.due)
	return r.load.addCouriers(ctx)
}

// end ends everything that was started.
func (r *run) end() {
	if r.fleet != nil {
		r.fleet.kill()
	}
	if r.stack != nil {
		r.stack.close()
	}
}

// settle makes everything whole again and waits until nothing is on its way.
func (r *run) settle(ctx context.Context) error {
	r.show.Stage("healing")
	if err := r.heal(ctx); err != nil {
		return err
	}
	healed := time.Now()
	if err := r.rest(ctx); err != nil {
		return err
	}
	r.report.Rest = seconds(time.Since(healed))
	r.show.Stage("reconciling")
	return r.reconcile(ctx, healed)
}

func (r *run) heal(ctx context.Context) error {
	return errors.Join(r.stack.heal(), r.fleet.heal(ctx))
}

// rest waits until nothing is on its way in the databases and the broker, three looks in a row.
func (r *run) rest(ctx context.Context) error {
	limit := cmp.Or(r.Settle, settleTime)
	deadline := time.Now().Add(limit)
	var left map[string]int
	for quiet := 0; quiet < 3; {
		if !pause(ctx, 200*time.Millisecond) {
			return context.Cause(ctx)
		}
		unsettled, err := r.stack.unsettled(ctx)
		if err == nil && len(unsettled) == 0 {
			left, err = r.stack.held(ctx)
		} else {
			left = unsettled
		}
		quiet++
		if err != nil || len(left) > 0 {
			quiet = 0
		}
		if time.Now().After(deadline) {
			if err != nil {
				return fmt.Errorf("see whether everything is at rest: %w", err)
			}
			r.violated("I4", "stuck", "%s after the last fault there is still %v", limit, left)
			return nil
		}
	}
	return nil
}

// reconcile has the services compared and, where messages were destroyed, repaired until they agree on all that was placed
// before.
func (r *run) reconcile(ctx context.Context, before time.Time) error {
	for deadline := time.Now().Add(20*r.grace + time.Minute); time.Now().Before(deadline); {
		report, err := r.load.reconcile(ctx, r.fleet.of("reconcile"))
		if err != nil {
			return err
		}
		if !r.hurt || report.Consistent && report.InFlight == report.Failures && report.To.After(before) {
			return nil
		}
		if err := r.rest(ctx); err != nil {
			return err
		}
	}
	return nil // the checker says what is wrong
}

// check compares the databases with what the clients saw.
func (r *run) check(ctx context.Context) error {
	held, err := r.stack.held(ctx)
	if err != nil {
		return err
	}
	r.show.Stage("checking")
	began := time.Now()
	found, err := check.Run(ctx, check.Input{
		Plan: r.load.plan, History: r.load.history, Databases: r.stack.databases, Queues: held, Foreign: r.foreign, Destroyed: r.hurt,
		Logs: r.fleet.logs(), Canaries: []string{eventKey, payloadCanary, "Pelmeni"},
	}, nil)
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	for _, died := range r.fleet.unexpected() {
		r.violated("I8", "crash", "%s", died)
	}
	r.report.conclude(r, found, time.Since(began))
	return nil
}

// summary of faults by their group.
func (r *run) groups() map[string]int {
	groups := map[string]int{}
	for _, f := range r.report.Inflicted {
		groups[f.Group]++
	}
	return groups
}
