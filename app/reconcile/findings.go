package reconcile

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Finding is a difference between two services that is not under way, and what became of it.
type Finding struct {
	Class      string              `json:"class"`
	OrderID    string              `json:"order_id"`
	State      string              `json:"state" enum:"open,repairing,person,resolved"`
	Evidence   map[string][]Record `json:"evidence" doc:"What each service's tables say, by service."`
	Repair     string              `json:"repair,omitempty" doc:"What was done last, or why nothing can be done without a person."`
	Repairs    int                 `json:"repairs"`
	FirstSeen  time.Time           `json:"first_seen"`
	LastSeen   time.Time           `json:"last_seen"`
	RepairedAt *time.Time          `json:"repaired_at,omitempty" doc:"When it was repaired last."`
	ResolvedAt *time.Time          `json:"resolved_at,omitempty"`
	Minute     int64               `json:"-"` // in which the order was placed, since 1970

	pair   Pair
	remedy *remedy
}

// States of a finding. An open one was not repaired yet, a repairing one was and does not show it yet.
const (
	StateOpen      = "open"
	StateRepairing = "repairing"
	StatePerson    = "person"
	StateResolved  = "resolved"
)

type findingKey struct{ class, orderID string }

func (f *Finding) key() findingKey { return findingKey{f.Class, f.OrderID} }

// FindingCount is how many findings of a class are in a state that is not resolved.
type FindingCount struct {
	Class, State string
	Findings     int
}

// Findings keeps what reconciliation found, in the order service's database, and decides which process reconciles.
type Findings interface {
	// Unresolved returns the findings that are not resolved, the oldest first and no more than limit.
	Unresolved(ctx context.Context, limit int) ([]Finding, error)
	// Put stores findings. There is one for each class and order: a later one replaces it.
	Put(ctx context.Context, findings []*Finding) error
	// Counts counts the findings that are not resolved.
	Counts(ctx context.Context) ([]FindingCount, error)
	// SaveReport stores a report, and forgets all but the last hundred.
	SaveReport(ctx context.Context, r Report) error
	// LastReport returns the last report, and whether there is one.
	LastReport(ctx context.Context) (Report, bool, error)
	// Lease reports whether owner is the one who reconciles for that time from now on: nobody else was, or owner
	// itself.
	Lease(ctx context.Context, owner string, lasts time.Duration) (bool, error)
	// Release gives the lease back, if owner has it.
	Release(ctx context.Context, owner string) error
}

// suspect is an order that may differ between two services.
type suspect struct {
	orderID       string
	cause, effect []Record
	verdict       verdict
	changed       time.Time // by what happened to the order last
	moving        bool      // it changed while it was looked at
}

// verify decides for each order whose lines differ, and each that has a finding, whether it is a difference.
func (p *pass) verify(ctx context.Context, c *comparison) error {
	known := map[string]bool{}
	for key, f := range p.known {
		asked := !p.request.ranged() || startOf(f.Minute+1).After(c.from) && startOf(f.Minute).Before(c.to)
		if asked && pairOf[key.class] == c.pair {
			known[key.orderID] = true
		}
	}
	// Those that were found before come first: whether their repairs show says something about the others.
	ids := slices.Sorted(maps.Keys(known))
	for _, id := range slices.Sorted(maps.Keys(c.suspects)) {
		if !known[id] {
			ids = append(ids, id)
		}
	}
	for some := range slices.Chunk(ids, batch) {
		if err := p.verifyBatch(ctx, c, some); err != nil {
			return err
		}
	}
	for awaits, probe := range c.probes {
		if c.probing[awaits] {
			p.postpone(c, probe, false)
		} else {
			p.found(c, probe)
		}
	}
	return nil
}

func (p *pass) verifyBatch(ctx context.Context, c *comparison, ids []string) error {
	if err := p.renew(ctx, runLease/4); err != nil {
		return err
	}
	seen, err := p.look(ctx, c, ids)
	if err != nil {
		return err
	}
	var differ []string
	for _, s := range seen {
		if s.verdict.class == "" {
			p.resolve(c, s.orderID, "")
		} else {
			differ = append(differ, s.orderID)
		}
	}
	if len(differ) == 0 {
		return nil
	}
	// An event may have been on its way before, between or after: it leaves a trace in one of these.
	before, err := p.flights(ctx, c, differ)
	if err != nil {
		return err
	}
	if seen, err = p.look(ctx, c, differ); err != nil {
		return err
	}
	after, err := p.flights(ctx, c, differ)
	if err != nil {
		return err
	}
	for _, s := range seen {
		b, a := before[s.orderID], after[s.orderID]
		// A message that was given up because its order is missing waits for this repair.
		missing := s.verdict.class == OrphanDispatch || s.verdict.class == OrphanPayment
		failures := !missing && p.mayBe(s.verdict.awaits, slices.Concat(b.Failures, a.Failures))
		switch {
		case s.verdict.class == "" && !s.moving:
			p.resolve(c, s.orderID, "")
		case s.moving || b.Events || a.Events:
			p.postpone(c, s, failures)
		case failures:
			p.postpone(c, s, failures)
			p.resolve(c, s.orderID, s.verdict.class) // it is another difference now, of which a person has a message
		default:
			if err := p.decide(ctx, c, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// look reads the effect, the cause, and the effect again. An effect that was there before its cause was read, and has none,
// is an orphan; one that is still absent afterwards is missing. If it changed in between, the order is moving.
func (p *pass) look(ctx context.Context, c *comparison, ids []string) ([]*suspect, error) {
	var reads [4]map[string][]Record
	for i, service := range []string{c.effect, c.cause, c.effect, p.witness(c)} {
		if service == "" {
			continue
		}
		var err error
		if reads[i], err = p.books[service].Records(ctx, ids); err != nil {
			return nil, err
		}
	}
	suspects := make([]*suspect, 0, len(ids))
	for _, id := range ids {
		before, cause, effect, witness := reads[0][id], reads[1][id], reads[2][id], reads[3][id]
		s := &suspect{orderID: id, cause: cause, effect: effect, moving: !slices.Equal(before, effect)}
		switch s.verdict = c.judge(cause, effect); {
		case s.verdict.class == MissingDispatch && reads[3] != nil && cause[0].State == order.Placed.String():
			s.verdict = judgeUndispatched(witness)
		case s.verdict.class == PointsMismatch && len(cause) == 0:
			s.verdict = judgeUnpaidPoints(witness)
		case s.verdict.class == UnrecordedPoints && len(cause) == 0:
			s.verdict = judgeUnearned(witness)
		}
		for _, r := range slices.Concat(cause, effect, witness) {
			s.changed = latest(s.changed, r.ChangedAt)
		}
		suspects = append(suspects, s)
	}
	return suspects, nil
}

// witness is a third service that has a say in the comparison, empty if there is none.
func (p *pass) witness(c *comparison) string {
	switch {
	case c.pair == PaymentPoints:
		return "order"
	case c.pair == PointsOrder && p.books["payment"] != nil:
		return "payment"
	case c.pair == OrderDispatch && p.policy.AfterPayment && p.books["payment"] != nil:
		return "payment"
	}
	return ""
}

// flights returns what is under way about the orders in the databases that the pair depends on.
func (p *pass) flights(ctx context.Context, c *comparison, ids []string) (map[string]Flight, error) {
	all := map[string]Flight{}
	for _, service := range []string{c.cause, c.effect, p.witness(c)} {
		if service == "" {
			continue
		}
		flights, err := p.books[service].Flights(ctx, ids)
		if err != nil {
			return nil, err
		}
		for id, f := range flights {
			all[id] = Flight{Events: all[id].Events || f.Events, Failures: append(all[id].Failures, f.Failures...)}
		}
	}
	return all, nil
}

// mayBe reports whether the awaited event may be one of those that were given up from the queues. A difference that no
// event is awaited for may have come of any.
func (p *pass) mayBe(awaits awaited, queues []string) bool {
	return slices.ContainsFunc(queues, func(queue string) bool {
		c, known := p.policy.Consumers[queue]
		if c.Service == "dispatch" && c.Event == (event.PaymentSucceeded{}).Key() {
			c.Event = event.OrderPlaced{}.Key() // judges await this one, on whichever of the two orders are dispatched
		}
		return !known || awaits == awaited{} || awaits == awaited{c.Service, c.Event}
	})
}

// patience times the grace is the age from which an order may be taken for lost although its service has handled nothing
// that is newer; see decide.
const patience = 10

// decide takes a difference for a finding unless it may still resolve itself: it is young, or the service that must act on
// an event has not come to it. Events of a kind are handled in about the order in which they happen, so it has if it has
// handled such an event about an order that was placed a grace later.
//
// Whether a service that handled nothing later is behind, or has nothing to do and lost the last events, does not
// show in any table. So of those that wait for long, the youngest is taken for a finding: when its repair shows, the
// service has come to the time of that repair, and past all the others.
func (p *pass) decide(ctx context.Context, c *comparison, s *suspect) error {
	age := p.now.Sub(s.changed)
	awaits := s.verdict.awaits
	f, known := p.known[findingKey{s.verdict.class, s.orderID}]
	switch {
	case age < p.policy.Grace:
		p.postpone(c, s, false)
		return nil
	case awaits == awaited{}:
		p.found(c, s)
		return nil
	}
	newest, asked := c.newest[awaits]
	if !asked {
		var err error
		if newest, err = p.books[awaits.service].Newest(ctx, awaits.key); err != nil {
			return err
		}
		c.newest[awaits] = newest
	}
	switch come := latest(newest, c.shown[awaits]); {
	case come.After(s.changed.Add(p.policy.Grace)):
		p.found(c, s)
	case known:
		if s.verdict.remedy != nil && f.Repairs < maxRepairs && f.State != StatePerson { // or nothing will ever show
			c.probing[awaits] = true
		}
		p.found(c, s)
	case age > patience*p.policy.Grace && (c.probes[awaits] == nil || s.changed.After(c.probes[awaits].changed)):
		if earlier := c.probes[awaits]; earlier != nil {
			p.postpone(c, earlier, false)
		}
		c.probes[awaits] = s
	default:
		p.postpone(c, s, false)
	}
	return nil
}

// postpone counts a difference that is none yet. What was found about the order before stays as it was.
func (p *pass) postpone(c *comparison, s *suspect, failures bool) {
	p.report.InFlight++
	if failures {
		p.report.Failures++
	}
	if minute, ok := c.suspects[s.orderID]; ok {
		c.unsettled[minute] = true
	}
}

// found makes or renews the finding.
func (p *pass) found(c *comparison, s *suspect) {
	f, known := p.known[findingKey{s.verdict.class, s.orderID}]
	if !known {
		f = Finding{Class: s.verdict.class, OrderID: s.orderID, FirstSeen: p.now}
	}
	f.LastSeen, f.pair, f.remedy = p.now, c.pair, s.verdict.remedy
	f.Evidence = map[string][]Record{c.cause: s.cause, c.effect: s.effect}
	for _, r := range slices.Concat(s.effect, s.cause) {
		f.Minute = minuteOf(r.PlacedAt)
	}
	switch {
	case f.remedy == nil || f.Repairs >= maxRepairs, f.State == StatePerson: // until a repair can be done again
		f.State = StatePerson
	case f.Repairs > 0:
		f.State = StateRepairing
	default:
		f.State = StateOpen
	}
	p.touched[f.key()] = &f
	p.resolve(c, s.orderID, f.Class)
}

// resolve closes what was found about an order in this pair, except in one class.
func (p *pass) resolve(c *comparison, orderID, except string) {
	for class, pair := range pairOf {
		f, known := p.known[findingKey{class, orderID}]
		if !known || pair != c.pair || class == except {
			continue
		}
		p.close(f)
		if f.RepairedAt != nil {
			awaits := c.judge(f.Evidence[c.cause], f.Evidence[c.effect]).awaits
			c.shown[awaits] = latest(c.shown[awaits], *f.RepairedAt)
		}
	}
}

func (p *pass) close(f Finding) {
	f.State, f.ResolvedAt = StateResolved, &p.now
	p.touched[f.key()] = &f
}

// findStuck finds events that should have left an outbox or a retry table long ago. Nothing about their orders is lost,
// so there is nothing to repair but what keeps them, which a person does.
func (p *pass) findStuck(ctx context.Context) {
	stuck, complete := map[findingKey]bool{}, true
	for _, service := range slices.Sorted(maps.Keys(p.books)) {
		events, err := p.books[service].Stuck(ctx, p.now.Add(-max(patience*p.policy.Grace, time.Minute)), maxStuck)
		if err != nil {
			p.complain("%s: %v", service, err)
		}
		complete = complete && err == nil && len(events) < maxStuck
		for _, e := range events {
			f := Finding{Class: StuckOutbox, OrderID: e.OrderID, FirstSeen: p.now, Minute: minuteOf(e.Since)}
			advice := "the event is not lost: see that a relay runs, and what its log says of it"
			if e.Retry {
				f.Class = StuckRetry
				advice = "the event is not lost: see that its consumer runs, and what its log says of it"
			}
			if known, ok := p.known[f.key()]; ok {
				f = known
			}
			f.LastSeen, f.State, f.Repair = p.now, StatePerson, advice
			f.Evidence = map[string][]Record{service: {{State: f.Class, PlacedAt: e.Since, ChangedAt: e.Since}}}
			stuck[f.key()] = true
			p.touched[f.key()] = &f
		}
	}
	for key, f := range p.known {
		if complete && (key.class == StuckOutbox || key.class == StuckRetry) && !stuck[key] {
			p.close(f)
		}
	}
}

// keep stores the findings before anything is done about them.
func (p *pass) keep(ctx context.Context) error { return p.findings.Put(ctx, sorted(p.touched)) }

func sorted(findings map[findingKey]*Finding) []*Finding {
	return slices.SortedFunc(maps.Values(findings), func(a, b *Finding) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.OrderID, b.OrderID))
	})
}

// maxRepairs is how often a finding is repaired before it is a person's.
const maxRepairs = 5

// repair does something about each finding that a machine may repair, one pair after the other: an order that is
// restored with its courier need not be restored without.
func (p *pass) repair(ctx context.Context, pairs []*comparison) {
	for _, c := range pairs {
		var done []*Finding
		for _, f := range sorted(p.touched) {
			if f.pair != c.pair || f.remedy == nil || f.Repairs >= maxRepairs {
				continue
			}
			if f.RepairedAt != nil && p.now.Sub(*f.RepairedAt) < p.policy.Grace {
				continue // it may still show
			}
			if p.report.Repaired >= p.policy.Budget {
				break
			}
			if err := p.renew(ctx, runLease/4); err != nil {
				p.complain("%v", err)
			}
			err := p.apply(ctx, f)
			crashpoint.Here("reconcile/repaired")
			if domain.KindOf(err) == domain.Unavailable || ctx.Err() != nil {
				p.complain("repair: %v", err)
				break
			}
			done = append(done, f)
			if domain.KindOf(err) != domain.Invalid {
				p.report.Repaired++
			}
		}
		if err := p.findings.Put(ctx, done); err != nil {
			p.complain("%v", err)
		}
	}
}

func (p *pass) apply(ctx context.Context, f *Finding) error {
	id, err := order.ParseID(f.OrderID)
	if err != nil {
		f.State, f.Repair = StatePerson, err.Error()
		return err
	}
	err = f.remedy.do(ctx, repairs{p.useCases, p.paymentsSince}, id, "reconciliation found "+f.Class)
	switch domain.KindOf(err) {
	case domain.Unavailable: // nothing was tried
		return err
	case domain.Invalid: // it is not done before somebody changes what is stored
		f.State, f.Repair = StatePerson, "a row must be corrected first: "+err.Error()
		return err
	}
	f.Repairs, f.RepairedAt, f.State, f.Repair = f.Repairs+1, &p.now, StateRepairing, f.remedy.text
	if err != nil {
		f.Repair = "failed: " + err.Error()
	}
	return err
}
