// Package check says whether a run kept every promise: it compares what the clients saw with what the four databases
// hold when everything is settled. It only reads, and it states the rules itself instead of asking the program for them,
// so that a mistake in the program is not repeated here.
//
// Read judge.go first: it is the list of rules about one order. read.go gathers what they need, one table after the
// other, each row once.
package check

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/ports/messaging"
	"takeout/verify/history"
)

// Input is what a run is judged by. Nothing may be under way any more: the faults are over, every role has run since, and
// the reconciliation has made a full pass.
type Input struct {
	Plan      history.Plan
	History   *history.History  // as many orders as the plan has
	Databases map[string]string // URLs by service, as in the configuration: order, dispatch, payment and points
	Queues    map[string]int    // messages that the broker still holds, by queue; nil if nobody could count them
	Foreign   []Foreign         // what strangers sent to the exchange during the run
	Destroyed bool              // queues were deleted with messages in them, so that reconciliation had to repair
	Logs      []string          // files with everything that the processes said
	Canaries  []string          // secrets, and texts of payloads, that must appear in no log and no error text

	AfterPayment bool // orders are dispatched when they are paid, and not already when they are placed
	RetryDelays  int  // how many delays a message that fails has; 4 if zero
}

// Foreign is a message that a stranger sent to the exchange.
type Foreign struct {
	EventID string
	OrderID string
	Key     string // the routing key, such as order.placed
	Want    Fate
	Body    [sha256.Size]byte // the SHA-256 of its body; only looked at if Want is Kept
}

// Fate is what must become of a foreign message.
type Fate int

// The fates.
const (
	NoEffect  Fate = iota // changes nothing: it is a copy, or announces the same once more under another id
	Kept                  // is a failure of each consumer that is bound to the key, byte for byte
	Recreated             // its order, which nobody stored, is stored once and dispatched once
)

// Run checks everything, and tells progress, if it is not nil, what it is about to do. The error says that something could
// not be checked; then there is no report.
//
// It takes time in proportion to the number of orders, and about 250 bytes of memory for each.
func Run(ctx context.Context, in Input, progress func(stage string)) (*Report, error) {
	if in.History.Len() != in.Plan.Orders {
		return nil, fmt.Errorf("the history is of %d orders and the plan of %d", in.History.Len(), in.Plan.Orders)
	}
	if progress == nil {
		progress = func(string) {}
	}
	if in.RetryDelays == 0 {
		in.RetryDelays = 4
	}
	c := newChecker(in)
	defer c.close()
	if err := c.open(ctx); err != nil {
		return nil, err
	}
	for _, stage := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"orders", c.readOrders},
		{"dispatches", c.readDispatches},
		{"couriers", c.readCouriers},
		{"payments", c.readPayments},
		{"the gateway's books", c.readBooks},
		{"points", c.readPoints},
		{"announcements", c.readEvents},
		{"handled events", c.readInboxes},
		{"retries and failures", c.readFailures},
		{"repairs", c.readRepairs},
		{"stored answers", c.readAnswers},
		{"every order", c.judgeAll},
		{"logs", c.readLogs},
	} {
		progress(stage.name)
		if err := stage.do(ctx); err != nil {
			return nil, fmt.Errorf("check %s: %w", stage.name, err)
		}
	}
	for queue, n := range in.Queues {
		if n > 0 {
			c.add("I4", "stuck", "", -1, says("%d messages are left in the queue %s; none should be", n, queue))
		}
	}
	c.report.sort()
	return c.report, nil
}

// checker is one check under way.
type checker struct {
	in     Input
	report *Report
	dbs    map[string]*sqldb.DB

	routes []messaging.Route
	keys   []string       // of the events that are routed
	bound  [][]int        // routes by key
	route  map[string]int // by queue
	key    map[string]int // by routing key

	records []record         // of the plan's orders by number, and of others behind them
	index   map[uint64]int32 // records by the hash of their order's id
	ids     map[int32]string // of orders that are not found by their row
	numbers map[uint64]int   // of orders by the id that clients were told; made when it is needed

	extra    map[uint64]*extra // events beyond the first of their key about their order
	more     map[int32]*more
	aside    map[uint64]bool // messages, by consumer and id, that are in a retry or failure table
	foreign  map[uint64]bool // ids of foreign events
	invited  map[string]bool // ids of orders that must have been made again
	room     bool            // a courier on duty could take one more order
	assigned map[string]int  // orders by courier
	failing  map[uint64]int  // delayed attempts, by order and message
}

func newChecker(in Input) *checker {
	c := &checker{
		in: in, report: NewReport(),
		dbs: map[string]*sqldb.DB{}, routes: messaging.Topology(app.UseCases{}, true),
		route: map[string]int{}, key: map[string]int{},
		records: make([]record, in.Plan.Orders, in.Plan.Orders+len(in.Foreign)), index: make(map[uint64]int32, in.Plan.Orders),
		ids: map[int32]string{}, extra: map[uint64]*extra{}, more: map[int32]*more{}, aside: map[uint64]bool{},
		foreign: map[uint64]bool{}, invited: map[string]bool{}, assigned: map[string]int{}, failing: map[uint64]int{},
	}
	c.report.Orders = in.Plan.Orders
	for i, r := range c.routes {
		k := slices.Index(c.keys, r.Event)
		if k < 0 {
			k = len(c.keys)
			c.keys, c.bound, c.key[r.Event] = append(c.keys, r.Event), append(c.bound, nil), k
		}
		c.bound[k] = append(c.bound[k], i)
		c.route[r.Queue] = i
	}
	for _, f := range in.Foreign {
		c.foreign[history.Hash(f.EventID)] = true
		if f.Want == Recreated {
			c.invited[f.OrderID] = true
		}
	}
	return c
}

var services = []string{"order", "dispatch", "payment", "points"}

func (c *checker) open(ctx context.Context) error {
	for _, service := range services {
		url, ok := c.in.Databases[service]
		if !ok {
			return fmt.Errorf("the %s database is not given", service)
		}
		db, err := sqldb.Open(service, url, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		c.dbs[service] = db
		if db.Missing() {
			return fmt.Errorf("there is no %s database at %s", service, db.Target())
		}
		if err := db.Ping(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) close() {
	for _, db := range c.dbs {
		_ = db.Close()
	}
}

// announcer is the service whose outbox holds events of that key.
func announcer(key string) string {
	service, _, _ := strings.Cut(key, ".")
	return service
}
