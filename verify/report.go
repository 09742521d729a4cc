//go:build unix

package verify

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"takeout/verify/check"
)

// Report is what a run did and found. Durations are in seconds.
type Report struct {
	OK        bool      `json:"ok"`
	Stack     string    `json:"stack"`
	Seed      uint64    `json:"seed"` // the first of them
	Seeds     []uint64  `json:"seeds"`
	Roles     int       `json:"roles"`
	Build     string    `json:"build"`
	Replay    string    `json:"replay"` // the command that asks and breaks the same again
	StartedAt time.Time `json:"started_at"`
	Took      float64   `json:"took"`

	Orders    int            `json:"orders"` // asked for
	Faults    int            `json:"faults"`
	Missed    int            `json:"missed"` // of them, those that met nothing
	Groups    map[string]int `json:"fault_groups"`
	Points    map[string]int `json:"crash_points"` // at which a process died, and how often
	aimed     map[string]int // at which one was to die
	Inflicted []Inflicted    `json:"inflicted"`

	Rest      float64 `json:"heal_to_rest"` // from the end of the last fault until nothing was on its way
	CheckTook float64 `json:"check_took"`
	Repaired  int     `json:"repaired_by_reconciliation"`

	PlaceP50      float64 `json:"place_p50"` // while nothing was broken
	PlaceP99      float64 `json:"place_p99"`
	BrokerAwayP50 float64 `json:"place_p50_broker_away"` // while only the broker was
	BrokerAwayP99 float64 `json:"place_p99_broker_away"`
	BrokerAway    int64   `json:"placed_while_broker_away"`

	// With 95 % confidence the rate is below this: nothing found in n tries means less than 3/n.
	BoundOrders float64 `json:"bound_per_order"`
	BoundFaults float64 `json:"bound_per_fault"`

	Checked    *check.Report     `json:"checked"`
	Violations []check.Violation `json:"violations"` // beside those that the databases show

	Runs []*Report `json:"runs,omitempty"` // those that this is the sum of
}

// Progress shows a run to a person. Its methods may be called by several goroutines.
type Progress interface {
	Stage(name string)
	Counts(orders, ofOrders, faults, ofFaults int)
	Fault(kind string)
	Mended(kind, detail string, took time.Duration)
}

func newReport(o Options) *Report {
	return &Report{Stack: o.Stack, Seed: o.Seed, Seeds: []uint64{o.Seed}, Roles: o.Roles, Replay: o.replay(), StartedAt: time.Now().UTC(), Points: map[string]int{}, aimed: map[string]int{}}
}

// replay is the command that asks and breaks the same again.
func (o *Options) replay() string {
	command := fmt.Sprintf("takeout verify --stack %s --orders %d --faults %d --seed %d --roles %d", o.Stack, o.Orders, o.Faults, o.Seed, o.Roles)
	if o.Duration > 0 {
		command += " --duration " + o.Duration.String()
	}
	if len(o.Kinds) > 0 {
		command += " --fault " + strings.Join(o.Kinds, ",")
	}
	return command
}

// conclude sums up.
func (r *Report) conclude(run *run, found *check.Report, took time.Duration) {
	l := run.load
	r.Checked, r.CheckTook, r.Violations = found, seconds(took), run.found
	r.Orders, r.Faults, r.Groups = l.asked(), len(r.Inflicted), run.groups()
	for _, f := range r.Inflicted {
		if f.Missed {
			r.Missed++
		}
	}
	r.PlaceP50, r.PlaceP99 = seconds(l.calm.quantile(0.5)), seconds(l.calm.quantile(0.99))
	r.BrokerAwayP50, r.BrokerAwayP99 = seconds(l.brokerAway.quantile(0.5)), seconds(l.brokerAway.quantile(0.99))
	r.BrokerAway = l.brokerAway.count()
	r.Took = seconds(time.Since(run.began))
	r.OK = found.OK() && len(r.Violations) == 0
	r.bound()
}

func (r *Report) bound() {
	if r.Orders > 0 {
		r.BoundOrders = 3 / float64(r.Orders)
	}
	if met := r.Faults - r.Missed; met > 0 {
		r.BoundFaults = 3 / float64(met)
	}
}

// Sum is the report of runs of one stack, one or more, taken together: counts are added, and times to rest and latencies
// are those of the worst run. What was broken last says how it is replayed.
func Sum(runs []*Report) *Report {
	if len(runs) == 1 {
		return runs[0]
	}
	first, last := runs[0], runs[len(runs)-1]
	total := &Report{
		OK: true, Stack: first.Stack, Seed: first.Seed, Roles: first.Roles, Build: first.Build, Replay: last.Replay, StartedAt: first.StartedAt,
		Groups: map[string]int{}, Points: map[string]int{}, Checked: check.NewReport(), Runs: runs,
	}
	for _, r := range runs {
		total.OK = total.OK && r.OK
		total.Seeds = append(total.Seeds, r.Seeds...)
		total.Took += r.Took
		total.Orders += r.Orders
		total.Faults += r.Faults
		total.Missed += r.Missed
		addUp(total.Groups, r.Groups)
		addUp(total.Points, r.Points)
		total.Rest = max(total.Rest, r.Rest)
		total.CheckTook += r.CheckTook
		total.Repaired += r.Repaired
		total.PlaceP50, total.PlaceP99 = max(total.PlaceP50, r.PlaceP50), max(total.PlaceP99, r.PlaceP99)
		total.BrokerAwayP50, total.BrokerAwayP99 = max(total.BrokerAwayP50, r.BrokerAwayP50), max(total.BrokerAwayP99, r.BrokerAwayP99)
		total.BrokerAway += r.BrokerAway
		total.Checked.Add(r.Checked)
		total.Violations = append(total.Violations, r.Violations...)
	}
	total.bound()
	return total
}

func addUp(sum, more map[string]int) {
	for name, n := range more {
		sum[name] += n
	}
}

// All are the violations that are told one by one.
func (r *Report) All() []check.Violation { return slices.Concat(r.Violations, r.Checked.Violations) }

func seconds(d time.Duration) float64 { return d.Round(time.Microsecond).Seconds() }

// Line is the report in one line.
func (r *Report) Line() string {
	var groups []string
	for _, name := range slices.Sorted(maps.Keys(r.Groups)) {
		groups = append(groups, fmt.Sprintf("%s %d", name, r.Groups[name]))
	}
	deaths := 0
	for _, n := range r.Points {
		deaths += n
	}
	c := r.Checked
	return fmt.Sprintf("orders=%d (cancelled %d, delivered %d) faults=%d (%s) missed=%d crash-points %d/%d hit %d times · "+
		"lost=%d duplicate_effects=%d orphans=%d resurrected=%d other=%d · "+
		"unknown=%d recovered=%d dup_absorbed=%d compensated=%d kept=%d repaired=%d · heal→rest=%.1fs · 95 %%: <%.2g per order, <%.2g per fault",
		r.Orders, c.Cancelled, c.Delivered, r.Faults, strings.Join(groups, ", "), r.Missed, len(r.Points), len(pointsOf(r.Stack)), deaths,
		c.Count("lost"), c.Count("duplicated"), c.Count("orphan"), c.Count("resurrected"), r.others(),
		c.Unknown, c.Recovered, c.Absorbed, c.Recreated, c.Failures, c.Repairs, r.Rest, r.BoundOrders, r.BoundFaults)
}

// others counts the violations that have no name of their own in the line.
func (r *Report) others() int {
	n := len(r.Violations)
	for _, count := range r.Checked.ViolationCount {
		n += count
	}
	for _, class := range []string{"lost", "duplicated", "orphan", "resurrected"} {
		n -= r.Checked.Count(class)
	}
	return n
}
