package app

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"takeout/domain"
	"takeout/domain/order"
)

// Timeline tells the way of an order from what the services' databases hold of it.
type Timeline struct {
	sources   map[string]StepSource
	elsewhere []string
}

// NewTimeline returns the timeline over the databases of these services. elsewhere are the services whose databases this
// process does not open.
func NewTimeline(sources map[string]StepSource, elsewhere []string) *Timeline {
	return &Timeline{sources, elsewhere}
}

// StepSource is a service's database, as far as it tells of orders.
type StepSource interface {
	// Steps returns what the database holds of the order, as it is at one moment, without naming itself. Of what there is very
	// much of it returns the newest, and before that a step LeftOut. Errors as Store has them.
	Steps(ctx context.Context, id order.ID) ([]Step, error)
}

// Step is something that happened to an order and is stored.
type Step struct {
	At        time.Time // UTC, by the clock of the process that did it
	Name      string    // one of causes, or what the order's history calls it
	Database  string    // of which service
	Detail    string    // for people
	Event     string    // the routing key of the event that it is about, empty if it is not known or about none
	EventID   string    // the event or message that it is about, empty if about none
	Handler   string    // the queue whose handler did it or failed, empty if none did
	FailureID int64     // 0 if it is about no failure
}

// causes are the steps' names in the order in which one leads to another. What happened at the same time is told so. A
// name that is not here is from an order's history, where it says what a handler did.
var causes = []string{
	LeftOut, "placed", "handled", "waiting", "charging", "dispatched", "delivered", "paid", "payment_refused", "cancelled", "payment_void",
	"released", "impossible", "refunded", "points_awarded", "points_revoked", fromHistory,
	"in_outbox", "confirmed", "retry_waits", "kept", "kept_again", "failure_action", "failure_closed", "drift_found", "drift_resolved",
}

// LeftOut is the name of a step that stands for steps like the one that its detail names, which are too many to be told. It has the
// time of the last of them.
const LeftOut = "left_out"

const fromHistory = "" // stands in causes for all names that are not there

// Way is what is known of an order's way.
type Way struct {
	Steps       []Step   // the oldest first
	NotAsked    []string // services whose databases this process does not open
	Unavailable []string // services whose databases do not answer: their steps are missing
}

// stepsTimeout is how long a database may take to tell its steps.
const stepsTimeout = 2 * time.Second

// Of returns the way of an order. It asks the databases at the same time and goes without those that are away. NotFound
// if no database knows of the order; Unavailable if none does and some could not be asked.
func (t *Timeline) Of(ctx context.Context, id order.ID) (Way, error) {
	ctx, cancel := context.WithTimeout(ctx, stepsTimeout)
	defer cancel()
	way := Way{NotAsked: slices.Clone(t.elsewhere)}
	var (
		asking sync.WaitGroup
		mu     sync.Mutex
		broken error
	)
	for service, source := range t.sources {
		asking.Go(func() {
			steps, err := source.Steps(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			if domain.KindOf(err) == domain.Unavailable {
				way.Unavailable = append(way.Unavailable, service)
				return
			}
			broken = cmp.Or(broken, err)
			for _, step := range steps {
				step.Database = service
				way.Steps = append(way.Steps, step)
			}
		})
	}
	asking.Wait()
	if broken != nil {
		return Way{}, broken
	}
	if len(way.Steps) == 0 {
		return Way{}, nothingOf(id, way)
	}
	slices.Sort(way.Unavailable)
	slices.SortStableFunc(way.Steps, inOrder)
	return way, nil
}

func nothingOf(id order.ID, way Way) error {
	if len(way.Unavailable) > 0 {
		return domain.Errorf(domain.Unavailable, "databases_unavailable",
			"nothing is known of order %s, and not every database answers; ask again", id)
	}
	return domain.Errorf(domain.NotFound, "order_not_found", "there is no order %s", id)
}

// inOrder compares by time, and then so that a step comes before those that it leads to. Steps that are equal in both
// keep the order of their database, and the databases that of their names.
func inOrder(a, b Step) int {
	return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.Database, b.Database))
}

func (s Step) rank() int {
	if known := slices.Index(causes, s.Name); known >= 0 {
		return known
	}
	return slices.Index(causes, fromHistory)
}
