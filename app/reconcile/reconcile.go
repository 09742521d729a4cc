package reconcile

import (
	"context"
	"errors"
	"iter"
	"slices"
	"sync"
	"time"

	"takeout/app"
	"takeout/domain"
)

// Pair names two services whose tables must agree.
type Pair string

// The pairs, in the order in which they are compared. What the first of a pair decides, the second acts on.
const (
	OrderDispatch Pair = "order-dispatch"
	OrderPayment  Pair = "order-payment"
	PaymentPoints Pair = "payment-points"
	PointsOrder   Pair = "points-order"
)

// Book is what reconciliation reads and marks in one service's database. No statement of it reaches into another.
//
// A line is what one side of a pair says of an order, in words that both sides use, so that lines are equal if the
// services agree. Lines are in the minute in which the order was placed.
type Book interface {
	// Digests returns what the lines of orders placed from (included) to (excluded) add up to, by minute.
	Digests(ctx context.Context, pair Pair, from, to time.Time) (map[int64]Digest, error)
	// Lines returns those lines, ordered by order id.
	Lines(ctx context.Context, pair Pair, from, to time.Time) iter.Seq2[Line, error]
	// Cut returns a whole minute such that about that many rows are between from and it, and some at least; to if
	// there are fewer.
	Cut(ctx context.Context, from, to time.Time, rows int) (time.Time, error)
	// Records returns the rows of the orders, by order id.
	Records(ctx context.Context, orderIDs []string) (map[string][]Record, error)
	// Flights returns what is under way about the orders in this database, by order id.
	Flights(ctx context.Context, orderIDs []string) (map[string]Flight, error)
	// Stuck returns what should have left the outbox or the retry table before that time and did not, the oldest
	// first and no more than limit.
	Stuck(ctx context.Context, before time.Time, limit int) ([]Stuck, error)
	// Newest returns when the newest order was placed about which the service has handled an event with that key, zero if
	// it cannot tell. Rows that rarer events left do not count: each event has a queue of its own, and theirs may be ahead of
	// this one's.
	Newest(ctx context.Context, key string) (time.Time, error)
	// Created returns when the database was made.
	Created(ctx context.Context) (time.Time, error)
	// Clock returns what time the database has.
	Clock(ctx context.Context) (time.Time, error)

	// Watched reports whether the database notes which minutes are changed after they were compared.
	Watched(ctx context.Context) (bool, error)
	// Dirty returns the notes, no more than limit.
	Dirty(ctx context.Context, limit int) ([]Dirty, error)
	// Clean deletes those notes.
	Clean(ctx context.Context, notes []Dirty) error
	// MarkDirty notes minutes that must be compared again.
	MarkDirty(ctx context.Context, minutes []int64) error
	// Mark returns how far the pair was compared, the zero Mark if it never was.
	Mark(ctx context.Context, pair Pair) (Mark, error)
	// SetMark replaces the mark.
	SetMark(ctx context.Context, pair Pair, m Mark) error
}

// Digest is what the lines of one minute add up to. Two sides with equal digests have equal lines, but for a chance of
// 1 in 2⁴⁰.
type Digest struct{ Rows, Sum int64 }

// Line is one order on one side.
type Line struct {
	OrderID string
	Minute  int64 // of its placing, since 1970
	Digest  int64
}

// Record is what one row says of an order.
type Record struct {
	State     string    `json:"state"` // in the words of its service
	Name      string    `json:"name,omitempty"`
	Amount    int64     `json:"amount,omitempty" doc:"Minor units."`
	Currency  string    `json:"currency,omitempty"`
	CourierID string    `json:"courier_id,omitempty"`
	Points    int64     `json:"points,omitempty"`
	Version   int64     `json:"version,omitempty" doc:"Version of the order."`
	PlacedAt  time.Time `json:"placed_at"`
	ChangedAt time.Time `json:"changed_at"` // by what happened to the order last
}

// Flight is what is under way about an order in one database.
type Flight struct {
	Events   bool     // the outbox or the retry table holds an event about it
	Failures []string // the queues of messages about it that were given up and wait for a person
}

// Stuck is an event that does not move.
type Stuck struct {
	OrderID string
	Retry   bool // it is in the retry table, and not in the outbox
	Since   time.Time
}

// Dirty is a note that a minute was changed after it was compared.
type Dirty struct{ ID, Minute int64 }

// Mark says how far a pair was compared, and in which comparison. Both sides of a pair keep it. When they disagree, one
// is from an earlier time than the other.
type Mark struct {
	Minute int64 // everything before it was compared
	Pass   int64
}

// Policy says what counts as a difference, and how much is repaired.
type Policy struct {
	Grace        time.Duration // how old a difference must be
	Budget       int           // the most repairs of one run
	AfterPayment bool          // orders are dispatched when they are paid

	Consumers map[string]Consumer // by queue; a failure of one that is not among them may be of any event
}

// Consumer is which event a queue brings to which service.
type Consumer struct{ Service, Event string }

// Reconciliation compares the services' databases and repairs what differs.
type Reconciliation struct {
	books    map[string]Book
	findings Findings
	useCases app.UseCases
	policy   Policy
	owner    string

	running sync.Mutex
}

// New returns the reconciliation of the services whose databases are in books, by service. Order and
// dispatch must be; payment and points are compared if they are. What differs is repaired through useCases, those of all
// services there are. owner names this process.
func New(books map[string]Book, findings Findings, useCases app.UseCases, policy Policy, owner string) *Reconciliation {
	return &Reconciliation{books: books, findings: findings, useCases: useCases, policy: policy, owner: owner}
}

// Request says what one run does.
type Request struct {
	Repair     bool          // whether to repair
	From, To   time.Time     // only orders placed in between, whether they were compared before or not; zero for no bound
	Full       bool          // everything, whether it was compared before or not
	Background bool          // do nothing unless this process has the lease
	Lease      time.Duration // how long this process keeps the lease after the run; zero to give it back
}

// Check returns what is wrong with the request: Invalid if its range is none.
func (q Request) Check(now time.Time) error {
	switch {
	case !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To):
		return domain.InvalidField("to", "range_empty", "to must be later than from")
	case q.To.After(now):
		return domain.InvalidField("to", "range_in_future", "to must not be in the future")
	case q.From.After(now):
		return domain.InvalidField("from", "range_in_future", "from must not be in the future")
	case q.Full && q.ranged():
		return domain.InvalidField("full", "range_and_full", "full goes without from and to")
	}
	return nil
}

func (q Request) ranged() bool { return !q.From.IsZero() || !q.To.IsZero() }

// Report is what one run found and did.
type Report struct {
	StartedAt  time.Time      `json:"started_at"`
	FinishedAt time.Time      `json:"finished_at"`
	From       time.Time      `json:"from" doc:"From when on orders were compared that had not been before; older ones only if they were changed."`
	To         time.Time      `json:"to"`
	Repair     bool           `json:"repair"`
	Leader     bool           `json:"leader" doc:"Whether this run had the lease, and so spares the next one what it compared."`
	Consistent bool           `json:"consistent" doc:"Nothing is open, everything could be compared. What waits for failures is not open."`
	Compared   Compared       `json:"compared"`
	InFlight   int            `json:"in_flight" doc:"Differences that are under way or may still be, and are none."`
	Failures   int            `json:"waits_for_failures" doc:"Those of them for which a failure waits for a person."`
	Findings   []Finding      `json:"findings" doc:"Found or looked at again by this run, 1000 at most."`
	Totals     map[string]int `json:"totals" doc:"Findings that are not resolved, by class."`
	Repaired   int            `json:"repaired" doc:"Repairs that this run began."`
	Waiting    int            `json:"waiting" doc:"Findings whose repair has not shown yet."`
	Person     int            `json:"person" doc:"Findings that only a person can repair."`
	Errors     []string       `json:"errors" doc:"What could not be compared, and why."`
	Counts     []FindingCount `json:"-"`
}

// Agree reports whether the services agree as far as this run can tell, also on what waits for failures.
func (r Report) Agree() bool { return r.Consistent && r.Failures == 0 }

// Compared says how much work a run was.
type Compared struct {
	Orders  int64 `json:"orders"`
	Buckets int64 `json:"buckets_compared" doc:"Minutes with orders, for each pair of services."`
	Equal   int64 `json:"buckets_equal"`
	Rows    int64 `json:"rows_read" doc:"On both sides."`
}

const (
	runLease      = time.Minute // is renewed while a run lasts
	chunkRows     = 50_000      // of one statement: it ends well before the driver gives up
	neighbours    = 60          // minutes that are compared in one statement because all of them were changed
	batch         = 500         // orders that are looked at in one statement
	maxUnresolved = 20_000      // findings; more are not looked for before these are repaired
	maxDirty      = 100_000
	maxStuck      = 100
	maxReported   = 1000
	// settleTime is the least age of a minute that is marked as compared. Changes of orders that are younger than half
	// of it are not noted.
	settleTime = 10 * time.Second
)

// Run compares once, and repairs if the request says so. The error is ErrNotLeader for a background run without the
// lease, Invalid for a request that is wrong, and Unavailable if nothing could be compared; what could be compared only
// in part is in the report's Errors.
func (r *Reconciliation) Run(ctx context.Context, q Request) (Report, error) {
	if err := q.Check(time.Now()); err != nil {
		return Report{}, err
	}
	r.running.Lock()
	defer r.running.Unlock()
	leader, err := r.findings.Lease(ctx, r.owner, runLease)
	if err != nil {
		return Report{}, err
	}
	if !leader && q.Background {
		return Report{}, ErrNotLeader
	}
	p := &pass{Reconciliation: r, request: q, now: domain.Micro(time.Now()), leased: time.Now()}
	p.report = Report{StartedAt: p.now, Repair: q.Repair, Leader: leader, Findings: []Finding{}, Totals: map[string]int{}, Errors: []string{}}
	err = p.run(ctx)
	if leader {
		err = errors.Join(err, r.keepLease(context.WithoutCancel(ctx), q.Lease))
	}
	return p.report, err
}

// keepLease keeps the lease until the next run, or gives it back.
func (r *Reconciliation) keepLease(ctx context.Context, keep time.Duration) error {
	if keep == 0 {
		return r.findings.Release(ctx, r.owner)
	}
	_, err := r.findings.Lease(ctx, r.owner, keep)
	return err
}

// ErrNotLeader says that another process reconciles.
var ErrNotLeader = errors.New("another process reconciles")

// Resign lets another process reconcile at once.
func (r *Reconciliation) Resign(ctx context.Context) error { return r.findings.Release(ctx, r.owner) }

// Last returns the last report, and whether there is one.
func (r *Reconciliation) Last(ctx context.Context) (Report, bool, error) {
	return r.findings.LastReport(ctx)
}

// Unresolved returns the findings that are not resolved, the oldest first and no more than limit.
func (r *Reconciliation) Unresolved(ctx context.Context, limit int) ([]Finding, error) {
	return r.findings.Unresolved(ctx, limit)
}

// pairs returns the comparisons that the open databases allow.
func (r *Reconciliation) pairs() []*comparison {
	pairs := []*comparison{
		{pair: OrderDispatch, cause: "order", effect: "dispatch", judge: judgeDispatch},
		{pair: OrderPayment, cause: "order", effect: "payment", judge: judgePayment},
		{pair: PaymentPoints, cause: "payment", effect: "points", judge: judgePoints},
		{pair: PointsOrder, cause: "points", effect: "order", judge: judgeRecorded},
	}
	return slices.DeleteFunc(pairs, func(c *comparison) bool { return r.books[c.cause] == nil || r.books[c.effect] == nil })
}
