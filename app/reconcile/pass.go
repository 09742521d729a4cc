package reconcile

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
)

// pass is one run.
type pass struct {
	*Reconciliation
	request Request
	now     time.Time
	report  Report
	known   map[findingKey]Finding  // not resolved when the run began
	touched map[findingKey]*Finding // found or looked at again
	dirty   map[string][]Dirty      // notes of changed minutes, by service
	noted   bool                    // all notes could be read

	paymentsSince time.Time // before it nothing is charged; zero if there are no payments

	leased time.Time // when the lease was renewed last
}

// comparison is one pair in a run.
type comparison struct {
	pair          Pair
	cause, effect string // services
	judge         func(cause, effect []Record) verdict

	from, to  time.Time        // is compared whether it was changed or not
	floor     time.Time        // before it nothing is compared
	mark      Mark             // the next one
	suspects  map[string]int64 // orders whose lines differ, with their minute
	unsettled map[int64]bool   // minutes that must be compared again
	stopped   bool             // before everything was compared, because too much differs
	done      bool             // without an error

	newest  map[awaited]time.Time // Book.Newest
	shown   map[awaited]time.Time // when the last repair was made that shows, by what had not been heard
	probes  map[awaited]*suspect  // see decide
	probing map[awaited]bool      // a repair has still to show, so that no other is tried
}

func (p *pass) run(ctx context.Context) error {
	if err := p.load(ctx); err != nil {
		return err
	}
	pairs := p.pairs()
	for _, c := range pairs {
		err := p.compare(ctx, c)
		crashpoint.Here("reconcile/detected")
		if err == nil {
			err = p.verify(ctx, c)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case err != nil:
			p.complain("%s: %v", c.pair, err)
		case c.stopped:
			p.complain("%s: not compared to the end, because %d findings are open; the next run goes on", c.pair, maxUnresolved)
		}
		c.done = err == nil
	}
	p.findStuck(ctx)
	if err := p.keep(ctx); err != nil {
		return err
	}
	crashpoint.Here("reconcile/verified")
	if p.request.Repair {
		p.repair(ctx, pairs)
	}
	crashpoint.Here("reconcile/before-settle")
	if err := p.settle(ctx, pairs); err != nil {
		return err
	}
	return p.finish(ctx)
}

func (p *pass) complain(format string, args ...any) {
	p.report.Errors = append(p.report.Errors, fmt.Sprintf(format, args...))
}

// load reads what earlier runs left: findings that are not resolved, and notes of changed minutes.
func (p *pass) load(ctx context.Context) error {
	unresolved, err := p.findings.Unresolved(ctx, maxUnresolved)
	if err != nil {
		return err
	}
	p.known, p.touched, p.dirty = map[findingKey]Finding{}, map[findingKey]*Finding{}, map[string][]Dirty{}
	for _, f := range unresolved {
		p.known[f.key()] = f
	}
	if payments := p.books["payment"]; payments != nil {
		created, err := payments.Created(ctx)
		if err != nil {
			created = p.now // then nothing is charged
		}
		p.paymentsSince = startOf(minuteOf(created))
	}
	p.noted = true
	if p.request.ranged() {
		return nil
	}
	for _, service := range slices.Sorted(maps.Keys(p.books)) {
		if p.dirty[service], err = p.books[service].Dirty(ctx, maxDirty); err != nil {
			p.noted = false
			p.complain("%s: %v", service, err)
		}
	}
	return nil
}

// compare finds the orders of a pair whose lines differ, in what is due.
func (p *pass) compare(ctx context.Context, c *comparison) error {
	c.suspects, c.unsettled = map[string]int64{}, map[int64]bool{}
	c.newest, c.shown = map[awaited]time.Time{}, map[awaited]time.Time{}
	c.probes, c.probing = map[awaited]*suspect{}, map[awaited]bool{}
	if err := p.due(ctx, c); err != nil {
		return err
	}
	if p.report.From.IsZero() || c.from.Before(p.report.From) {
		p.report.From = c.from
	}
	p.report.To = c.to
	for _, minutes := range p.changed(c) {
		if stopped, err := p.compareRange(ctx, c, startOf(minutes[0]), startOf(minutes[1])); err != nil || stopped >= 0 {
			c.mark.Minute = minuteOf(c.from)
			return err
		}
	}
	for from := c.from; from.Before(c.to); {
		end := c.to
		for _, service := range []string{c.cause, c.effect} {
			var err error
			if end, err = p.books[service].Cut(ctx, from, end, chunkRows); err != nil {
				return err
			}
		}
		stopped, err := p.compareRange(ctx, c, from, end)
		if err != nil {
			return err
		}
		if stopped >= 0 {
			c.mark.Minute = min(c.mark.Minute, stopped)
			return nil
		}
		from = end
	}
	return nil
}

// due decides what is compared whether it was changed or not, and prepares the mark for what follows it.
func (p *pass) due(ctx context.Context, c *comparison) error {
	c.from, c.to, c.floor = startOf(0), p.now.Add(-p.policy.Grace), startOf(0)
	if c.pair == OrderPayment || c.pair == PaymentPoints {
		// An installation that did not take payments before must not charge what was ordered then.
		created, err := p.books[c.effect].Created(ctx)
		if err != nil {
			return err
		}
		c.floor = startOf(minuteOf(created))
	}
	if p.request.ranged() {
		c.from = latest(c.floor, latest(c.from, p.request.From.UTC()))
		if q := p.request.To.UTC(); !q.IsZero() {
			c.to = earliest(c.to, q)
		}
		return nil
	}
	trusted := !p.request.Full
	var marks [2]Mark
	now := p.now
	for i, service := range []string{c.cause, c.effect} {
		// A database notes changes of what is old by its own clock. What it will not note must not be behind the mark.
		clock, err := p.books[service].Clock(ctx)
		if err != nil {
			return err
		}
		now = earliest(now, clock)
		if marks[i], err = p.books[service].Mark(ctx, c.pair); err != nil {
			return err
		}
		watched, err := p.books[service].Watched(ctx)
		if err != nil {
			return err
		}
		trusted = trusted && watched
	}
	if trusted && marks[0] == marks[1] {
		c.from = startOf(marks[0].Minute)
	}
	c.from = latest(c.from, c.floor)
	c.mark = Mark{Minute: minuteOf(now.Add(-max(p.policy.Grace, settleTime))), Pass: max(marks[0].Pass, marks[1].Pass) + 1}
	return nil
}

// changed returns the minutes that were changed after they had been compared, neighbours together: the first of them and
// the one after the last.
func (p *pass) changed(c *comparison) [][2]int64 {
	var minutes []int64
	for _, notes := range p.dirty {
		for _, n := range notes {
			if n.Minute >= minuteOf(c.floor) && n.Minute < minuteOf(c.from) {
				minutes = append(minutes, n.Minute)
			}
		}
	}
	slices.Sort(minutes)
	var spans [][2]int64
	for _, minute := range slices.Compact(minutes) {
		if last := len(spans) - 1; last >= 0 && spans[last][1] == minute && minute-spans[last][0] < neighbours {
			spans[last][1]++
			continue
		}
		spans = append(spans, [2]int64{minute, minute + 1})
	}
	return spans
}

// compareRange compares digests, and lines where those differ. It returns the minute before which it stopped because
// too much differs, -1 if it did not.
func (p *pass) compareRange(ctx context.Context, c *comparison, from, to time.Time) (stopped int64, err error) {
	if err := p.renew(ctx, runLease/4); err != nil {
		return -1, err
	}
	causes, err := p.books[c.cause].Digests(ctx, c.pair, from, to)
	if err != nil {
		return -1, err
	}
	effects, err := p.books[c.effect].Digests(ctx, c.pair, from, to)
	if err != nil {
		return -1, err
	}
	minutes := slices.Concat(slices.Collect(maps.Keys(causes)), slices.Collect(maps.Keys(effects)))
	slices.Sort(minutes)
	for _, minute := range slices.Compact(minutes) {
		cause, effect := causes[minute], effects[minute]
		if cause != effect && len(p.known)+len(c.suspects) >= maxUnresolved {
			c.stopped = true
			return minute, nil
		}
		p.report.Compared.add(c.pair, cause, effect)
		if cause == effect {
			continue
		}
		if err := p.compareLines(ctx, c, latest(from, startOf(minute)), earliest(to, startOf(minute+1))); err != nil {
			return -1, err
		}
	}
	return -1, nil
}

// renew renews the lease if that is longer ago, or notices that it was lost.
func (p *pass) renew(ctx context.Context, after time.Duration) error {
	if !p.report.Leader || time.Since(p.leased) < after {
		return nil
	}
	leader, err := p.findings.Lease(ctx, p.owner, runLease)
	p.report.Leader, p.leased = leader, time.Now()
	return err
}

func (n *Compared) add(pair Pair, cause, effect Digest) {
	n.Buckets++
	n.Rows += cause.Rows + effect.Rows
	if pair == OrderDispatch {
		n.Orders += cause.Rows
	}
	if cause == effect {
		n.Equal++
	} else {
		n.Rows += cause.Rows + effect.Rows // read once more, line by line
	}
}

// compareLines walks both sides in the order of their ids, and keeps in memory only what differs.
func (p *pass) compareLines(ctx context.Context, c *comparison, from, to time.Time) error {
	nextCause, stopCause := iter.Pull2(p.books[c.cause].Lines(ctx, c.pair, from, to))
	defer stopCause()
	nextEffect, stopEffect := iter.Pull2(p.books[c.effect].Lines(ctx, c.pair, from, to))
	defer stopEffect()
	cause, causeErr, moreCauses := nextCause()
	effect, effectErr, moreEffects := nextEffect()
	for moreCauses || moreEffects {
		if err := errors.Join(causeErr, effectErr); err != nil {
			return err
		}
		onlyCause := moreCauses && (!moreEffects || cause.OrderID < effect.OrderID)
		onlyEffect := moreEffects && (!moreCauses || effect.OrderID < cause.OrderID)
		switch {
		case onlyEffect:
			c.suspects[effect.OrderID] = effect.Minute
		case onlyCause, cause != effect:
			c.suspects[cause.OrderID] = cause.Minute
		}
		if !onlyEffect {
			cause, causeErr, moreCauses = nextCause()
		}
		if !onlyCause {
			effect, effectErr, moreEffects = nextEffect()
		}
	}
	return nil
}

func startOf(minute int64) time.Time { return time.Unix(minute*60, 0).UTC() }

func minuteOf(t time.Time) int64 { return t.Unix() / 60 }

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earliest(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// settle remembers what need not be compared again. It is the last step: if it is not reached, the next run does all
// of it again.
func (p *pass) settle(ctx context.Context, pairs []*comparison) error {
	if !p.report.Leader || p.request.ranged() {
		return nil
	}
	// Another run may have begun if this one took longer than its lease.
	if err := p.renew(ctx, 0); err != nil || !p.report.Leader {
		return err
	}
	complete := p.noted
	var again []int64
	for _, c := range pairs {
		again = slices.AppendSeq(again, maps.Keys(c.unsettled))
		complete = complete && c.done && !c.stopped
	}
	slices.Sort(again)
	if err := p.books["order"].MarkDirty(ctx, slices.Compact(again)); err != nil {
		return err
	}
	for _, c := range pairs {
		for _, service := range []string{c.cause, c.effect} {
			if !c.done {
				continue
			}
			if err := p.books[service].SetMark(ctx, c.pair, c.mark); err != nil {
				return err
			}
		}
	}
	if !complete {
		return nil
	}
	for service, notes := range p.dirty {
		if err := p.books[service].Clean(ctx, notes); err != nil {
			return err
		}
	}
	return nil
}

// finish counts what is open, and keeps the report.
func (p *pass) finish(ctx context.Context) error {
	counts, err := p.findings.Counts(ctx)
	if err != nil {
		return err
	}
	p.report.Counts = counts
	open := 0
	for _, n := range counts {
		open += n.Findings
		p.report.Totals[n.Class] += n.Findings
		switch n.State {
		case StateRepairing:
			p.report.Waiting += n.Findings
		case StatePerson:
			p.report.Person += n.Findings
		}
	}
	p.report.Consistent = open == 0 && len(p.report.Errors) == 0
	p.report.FinishedAt = domain.Micro(time.Now())
	for _, f := range sorted(p.touched) {
		if len(p.report.Findings) < maxReported {
			p.report.Findings = append(p.report.Findings, *f)
		}
	}
	return p.findings.SaveReport(ctx, p.report)
}
