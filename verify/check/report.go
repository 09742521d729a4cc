package check

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Report is what a check found.
type Report struct {
	Orders       int `json:"orders"` // asked for, as the plan has it
	Acknowledged int `json:"acknowledged"`
	Unknown      int `json:"unknown"`   // of which the clients never heard whether they were taken
	Recovered    int `json:"recovered"` // of those: stored
	Refused      int `json:"refused"`
	NotAsked     int `json:"not_asked"`
	Contested    int `json:"contested"` // that several clients placed, cancelled and read at the same time

	Stored     int `json:"stored"`
	Placed     int `json:"placed"` // by status, as stored
	Dispatched int `json:"dispatched"`
	Delivered  int `json:"delivered"`
	Cancelled  int `json:"cancelled"`

	Events         int64 `json:"events"`          // announced, each counted once
	ConfirmedAgain int64 `json:"confirmed_again"` // events that the broker confirmed more than once
	Handled        int64 `json:"handled"`         // inbox rows
	Absorbed       int64 `json:"absorbed"`        // events that changed nothing because the same had come under another id
	Destroyed      int64 `json:"destroyed"`       // events that a consumer never got because its queue was deleted
	DelayedTries   int64 `json:"delayed_tries"`   // messages that failed and were tried again later
	Failures       int64 `json:"failures"`        // messages that were kept for a person
	Recreated      int64 `json:"recreated"`       // orders that were made again (补单)
	Repairs        int64 `json:"repairs"`         // other steps of repair, the reconciler's included
	Findings       int64 `json:"findings"`        // of the reconciler
	LogBytes       int64 `json:"log_bytes"`       // that were searched for canaries

	Violations     []Violation    `json:"violations"`      // MaxDetails at most of each kind
	ViolationCount map[string]int `json:"violation_count"` // all, by invariant and class: "I1 lost"
}

// MaxDetails is how many violations of one invariant and class are described. All are counted.
const MaxDetails = 20

// Violation is a promise that was not kept. An order has at most one from the rules about single orders: what follows from
// the gravest is not reported again.
type Violation struct {
	Invariant string `json:"invariant"` // such as "I1"; docs/verification.md lists them
	Class     string `json:"class"`     // in Jepsen's words: lost, duplicated, unexpected, resurrected, orphan, stuck, …
	OrderID   string `json:"order_id,omitempty"`
	Number    int    `json:"number"` // of the order in the plan, -1 if it is not about one
	Detail    string `json:"detail"` // what was expected, what is there, and where
}

func (v Violation) String() string {
	return fmt.Sprintf("%s %s order %q (number %d): %s", v.Invariant, v.Class, v.OrderID, v.Number, v.Detail)
}

// NewReport returns a report of nothing.
func NewReport() *Report { return &Report{Violations: []Violation{}, ViolationCount: map[string]int{}} }

// Add adds what another check found, of other orders.
func (r *Report) Add(other *Report) {
	r.Orders += other.Orders
	r.Acknowledged += other.Acknowledged
	r.Unknown += other.Unknown
	r.Recovered += other.Recovered
	r.Refused += other.Refused
	r.NotAsked += other.NotAsked
	r.Contested += other.Contested
	r.Stored += other.Stored
	r.Placed += other.Placed
	r.Dispatched += other.Dispatched
	r.Delivered += other.Delivered
	r.Cancelled += other.Cancelled
	r.Events += other.Events
	r.ConfirmedAgain += other.ConfirmedAgain
	r.Handled += other.Handled
	r.Absorbed += other.Absorbed
	r.Destroyed += other.Destroyed
	r.DelayedTries += other.DelayedTries
	r.Failures += other.Failures
	r.Recreated += other.Recreated
	r.Repairs += other.Repairs
	r.Findings += other.Findings
	r.LogBytes += other.LogBytes
	r.Violations = append(r.Violations, other.Violations...)
	for kind, n := range other.ViolationCount {
		r.ViolationCount[kind] += n
	}
}

// OK reports whether every promise was kept.
func (r *Report) OK() bool { return len(r.ViolationCount) == 0 }

// Count returns how many violations of the class there are, of whatever invariant.
func (r *Report) Count(class string) int {
	n := 0
	for kind, count := range r.ViolationCount {
		if strings.HasSuffix(kind, " "+class) {
			n += count
		}
	}
	return n
}

func (r *Report) sort() {
	slices.SortStableFunc(r.Violations, func(a, b Violation) int {
		return cmp.Or(cmp.Compare(len(a.Invariant), len(b.Invariant)), cmp.Compare(a.Invariant, b.Invariant), cmp.Compare(a.Class, b.Class))
	})
}

// tell makes the text of a violation. It may ask the databases, and so is called only for those that are described.
type tell func() string

func says(format string, args ...any) tell {
	return func() string { return fmt.Sprintf(format, args...) }
}

func (c *checker) add(invariant, class, orderID string, number int, text tell) {
	kind := invariant + " " + class
	if c.report.ViolationCount[kind]++; c.report.ViolationCount[kind] <= MaxDetails {
		c.report.Violations = append(c.report.Violations, Violation{invariant, class, orderID, number, text()})
	}
}

// addTo adds a violation about the order of the record.
func (c *checker) addTo(i int32, v verdict) {
	id := ""
	if c.report.ViolationCount[v.invariant+" "+v.class] < MaxDetails {
		id = c.orderID(i)
	}
	c.add(v.invariant, v.class, id, c.number(i), v.text)
}
