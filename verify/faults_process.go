//go:build unix

package verify

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"time"

	"takeout/crashpoint"
)

// processFaults end and halt processes of the program.
var processFaults = []kind{
	{name: "kill", group: "kill", inflict: killOne},
	{name: "kill-all", group: "kill", inflict: killAll},
	{name: "term", group: "kill", inflict: terminateOne},
	{name: "stop", group: "stop", inflict: haltOne},
	{name: "crash", group: "crash", weight: 8, inflict: func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		return r.crash(ctx, rnd, r.points())
	}},
}

// crashAt is the fault that crashes processes at one point only.
func crashAt(p crashpoint.Point) kind {
	return kind{name: "crash:" + p.Name, group: "crash", inflict: func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		return r.crash(ctx, rnd, []crashpoint.Point{p})
	}}
}

// points are those that processes of this stack come to.
func (r *run) points() []crashpoint.Point { return pointsOf(r.Stack) }

func pointsOf(stack string) []crashpoint.Point {
	broker := map[string]string{Embedded: "sql", Servers: "amqp"}[stack]
	return slices.DeleteFunc(crashpoint.Points(), func(p crashpoint.Point) bool { return p.Broker != "" && p.Broker != broker })
}

// crash starts every process that comes to one of the points anew, each to die at the one of them at which the fewest have
// died yet, and waits until they have. Several die at once, as in a storm.
func (r *run) crash(ctx context.Context, rnd *rand.Rand, points []crashpoint.Point) (string, error) {
	aimed := map[*member]string{}
	rest := slices.Clone(points)
	rnd.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	for _, i := range rnd.Perm(len(r.fleet.members)) {
		m := r.fleet.members[i]
		mine := func(p crashpoint.Point) bool { return m.role == "all" || slices.Contains(p.Roles, m.role) }
		at := -1
		for i, p := range rest {
			if mine(p) && (at < 0 || r.report.aimed[p.Name] < r.report.aimed[rest[at].Name]) {
				at = i
			}
		}
		if at < 0 {
			continue
		}
		point := rest[at].Name
		r.report.aimed[point]++
		if len(points) > 1 {
			rest = slices.Delete(rest, at, at+1)
		}
		m.kill()
		if err := m.start(fmt.Sprintf("%s=%s:%d", crashpoint.Variable, point, 1+rnd.IntN(3))); err != nil {
			return "", err
		}
		aimed[m] = point
	}
	deadline := time.Now().Add(8 * time.Second)
	var died []string
	for m, point := range aimed {
		for m.running() && time.Now().Before(deadline) && pause(ctx, 20*time.Millisecond) {
		}
		if !m.running() {
			r.report.Points[point]++
			died = append(died, m.name+" at "+point)
		}
		m.kill() // it may be about to
	}
	slices.Sort(died)
	return fmt.Sprintf("%d of %d died: %s", len(died), len(aimed), strings.Join(died, ", ")), nil
}

func killOne(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	m := r.fleet.any(rnd)
	m.kill()
	d := hold(ctx, rnd, 0, time.Second)
	return fmt.Sprintf("%s killed, away for %s", m.name, d), nil
}

func killAll(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	for _, m := range r.fleet.members {
		m.kill()
	}
	d := hold(ctx, rnd, 0, time.Second)
	return fmt.Sprintf("all processes killed, away for %s", d), nil
}

// terminateOne asks a process to stop while it works. It must do so in good order and in time.
func terminateOne(_ context.Context, r *run, rnd *rand.Rand) (string, error) {
	m := r.fleet.any(rnd)
	began := time.Now()
	code, err := m.terminate(30 * time.Second)
	took := time.Since(began)
	if err != nil || code != 0 {
		r.violated("I14", "drain", "%s did not end in good order after SIGTERM within %s: code %d, %v; it says: %s", m.name, took, code, err, m.lastWords())
	}
	return fmt.Sprintf("%s stopped in %s", m.name, took.Round(time.Millisecond)), nil
}

func haltOne(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	m := r.fleet.any(rnd)
	if err := m.signal(syscall.SIGSTOP); err != nil {
		return "", err
	}
	// Sometimes longer than a lease of ten seconds lasts, so that it wakes up as a zombie.
	limit := 3 * time.Second
	if rnd.IntN(4) == 0 {
		limit = 13 * time.Second
	}
	d := hold(ctx, rnd, limit/3, limit)
	return fmt.Sprintf("%s halted for %s", m.name, d), m.signal(syscall.SIGCONT)
}
