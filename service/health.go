package service

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"takeout/adapters/sqldb"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
)

const (
	// staleAfter is the age of the oldest event in an outbox from which something is wrong.
	staleAfter = time.Minute
	// pendingLimit is how far the events of an outbox are counted.
	pendingLimit = 100_000
)

// health asks everything that the process depends on. Only what keeps it from doing its work makes it unavailable: the
// outbox stands in for a broker that is away.
func (s *Service) health(ctx context.Context) httpapi.Health {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	h := httpapi.Health{Status: "ready", Checks: map[string]httpapi.Check{}}
	worse := func(status, check, detail string) {
		h.Checks[check] = httpapi.Check{Detail: detail}
		if h.Status != "unavailable" {
			h.Status = status
		}
	}
	for _, p := range s.askDatabases(ctx) {
		switch {
		case p.err != nil:
			worse("unavailable", "database "+p.name, "does not answer: "+p.err.Error())
			continue
		case p.count > 0 && time.Since(p.oldest) > staleAfter:
			worse("degraded", "outbox "+p.name, fmt.Sprintf("%s events wait, the oldest since %s", atLeast(p.count), p.oldest.Format(time.RFC3339)))
		default:
			h.Checks["outbox "+p.name] = httpapi.Check{OK: true, Detail: atLeast(p.count) + " events wait"}
		}
		switch {
		case errors.Is(p.trouble, sqldb.ErrFileGone):
			worse("unavailable", "database "+p.name, p.trouble.Error())
		case p.trouble != nil:
			worse("degraded", "database "+p.name, "answers, and cannot do its work: "+p.trouble.Error())
		default:
			h.Checks["database "+p.name] = httpapi.Check{OK: true}
		}
	}
	if err := s.broker.Check(); err != nil {
		worse("degraded", "broker", err.Error())
	} else {
		h.Checks["broker"] = httpapi.Check{OK: true}
	}
	for queue, err := range s.broker.Reading() {
		if err != nil {
			worse("degraded", "queue "+queue, "cannot be read: "+err.Error())
		}
	}
	if s.consumers != nil {
		for queue, cause := range s.consumers.Paused() {
			worse("degraded", "consumer "+queue, "pauses: "+cause)
		}
	}
	if s.cfg.has(messaging.Compensation) {
		if state := s.useCases.Compensation.State(); state.Why != "" {
			worse("degraded", "compensation", "is stopped: "+state.Why)
		}
	}
	if s.announcesEarly() {
		worse("degraded", "announcing", earlyWarning)
	}
	if s.cfg.has(messaging.Dispatch) {
		switch waiting, err := s.checkWaiting(ctx); {
		case err != nil: // the database's check says so
		case waiting.OK:
			h.Checks["dispatch"] = waiting
		default:
			worse("degraded", "dispatch", waiting.Detail)
		}
	}
	if s.reconciler != nil {
		if wrong := s.reconciler.health(); wrong != "" {
			worse("degraded", "reconciliation", wrong)
		}
	}
	if s.stopping.Load() {
		worse("unavailable", "process", "is stopping")
	}
	return h
}

func atLeast(count int) string {
	if count >= pendingLimit {
		return fmt.Sprintf("%d or more", pendingLimit)
	}
	return fmt.Sprint(count)
}

type pending struct {
	name   string
	count  int
	oldest time.Time
	err    error // nothing can be asked

	trouble error // transactions fail
}

// askDatabases asks all outboxes at once how much waits in them.
func (s *Service) askDatabases(ctx context.Context) []pending {
	answers := make([]pending, len(s.databases))
	var asking sync.WaitGroup
	for i, db := range s.databases {
		asking.Go(func() {
			answers[i].name = db.DB().Name()
			answers[i].count, answers[i].oldest, answers[i].err = db.Pending(ctx, pendingLimit)
			answers[i].trouble = db.DB().Trouble(ctx)
		})
	}
	asking.Wait()
	return answers
}

// gauges are metrics that are looked up when somebody asks for them.
type gauges struct{ *Service }

var (
	outboxPending       = prometheus.NewDesc("takeout_outbox_pending", "Events that wait in the outbox, counted up to 100000.", []string{"outbox"}, nil)
	outboxOldest        = prometheus.NewDesc("takeout_outbox_oldest_seconds", "Age of the oldest event in the outbox.", []string{"outbox"}, nil)
	retriesPending      = prometheus.NewDesc("takeout_retries_pending", "Messages that wait for their next attempt, counted up to 100000.", []string{"database"}, nil)
	failuresOpen        = prometheus.NewDesc("takeout_failures_open", "Messages that wait for a person, counted up to 100000.", []string{"database"}, nil)
	dispatchWaiting     = prometheus.NewDesc("takeout_dispatch_waiting", "Orders that wait for a courier, counted up to 100000.", nil, nil)
	compensationStopped = prometheus.NewDesc("takeout_compensation_stopped", "1 if missing orders wait until somebody resumes the compensation.", nil, nil)
	brokerUp            = prometheus.NewDesc("takeout_broker_up", "1 if events can be published now.", nil, nil)
	queueRead           = prometheus.NewDesc("takeout_queue_read", "1 if this process can read the queue now.", []string{"queue"}, nil)
	buildInfo           = prometheus.NewDesc("takeout_build_info", "What this program was built from.", []string{"version"}, nil)
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(g, ch) }

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for _, p := range g.askDatabases(ctx) {
		if p.err != nil {
			continue
		}
		age := 0.0
		if p.count > 0 {
			age = time.Since(p.oldest).Seconds()
		}
		ch <- prometheus.MustNewConstMetric(outboxPending, prometheus.GaugeValue, float64(p.count), p.name)
		ch <- prometheus.MustNewConstMetric(outboxOldest, prometheus.GaugeValue, age, p.name)
	}
	var asking sync.WaitGroup
	for _, db := range g.databases {
		asking.Go(func() {
			if waiting, open, err := db.Unhandled(ctx, pendingLimit); err == nil {
				ch <- prometheus.MustNewConstMetric(retriesPending, prometheus.GaugeValue, float64(waiting), db.DB().Name())
				ch <- prometheus.MustNewConstMetric(failuresOpen, prometheus.GaugeValue, float64(open), db.DB().Name())
			}
		})
	}
	asking.Wait()
	if g.cfg.has(messaging.Dispatch) {
		if b, err := g.useCases.Dispatches.Backlog(ctx); err == nil {
			ch <- prometheus.MustNewConstMetric(dispatchWaiting, prometheus.GaugeValue, float64(b.Waiting))
		}
	}
	if g.cfg.has(messaging.Compensation) {
		ch <- prometheus.MustNewConstMetric(compensationStopped, prometheus.GaugeValue, oneIf(g.useCases.Compensation.State().Why != ""))
	}
	ch <- prometheus.MustNewConstMetric(brokerUp, prometheus.GaugeValue, oneIf(g.broker.Check() == nil))
	for queue, err := range g.broker.Reading() {
		ch <- prometheus.MustNewConstMetric(queueRead, prometheus.GaugeValue, oneIf(err == nil), queue)
	}
	ch <- prometheus.MustNewConstMetric(buildInfo, prometheus.GaugeValue, 1, Version())
}

func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}
