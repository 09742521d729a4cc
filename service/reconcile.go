package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"takeout/adapters/sqlstore"
	"takeout/app/reconcile"
	"takeout/domain"
	"takeout/ports/messaging"
)

// reconciler runs the reconciliation of this process.
type reconciler struct {
	*reconcile.Reconciliation
	ctx   context.Context // ends when the process stops
	stop  context.CancelFunc
	every time.Duration

	mu      sync.Mutex
	failure string // why the last run did not end well
	person  int    // findings that need a person

	findings *prometheus.GaugeVec
	success  prometheus.Gauge
	seconds  prometheus.Gauge
	buckets  *prometheus.CounterVec
}

// reconciliation returns the reconciliation over the open databases.
func (s *Service) reconciliation() *reconcile.Reconciliation {
	books := map[string]reconcile.Book{}
	var findings reconcile.Findings
	for _, db := range s.databases {
		books[db.DB().Name()] = sqlstore.NewBook(db.DB())
		if db.DB().Name() == "order" {
			findings = sqlstore.NewFindings(db.DB())
		}
	}
	consumers := map[string]reconcile.Consumer{}
	for _, route := range messaging.Topology(s.useCases, true) {
		consumers[route.Queue] = reconcile.Consumer{Service: route.Role.Service(), Event: route.Event}
	}
	return reconcile.New(books, findings, s.useCases, reconcile.Policy{
		Grace: s.cfg.ReconcileGrace, Budget: s.cfg.ReconcileBudget, AfterPayment: s.cfg.DispatchAfter == "paid", Consumers: consumers,
	}, uuid.NewString())
}

// addReconciler makes the reconciliation if this process has the role.
func (s *Service) addReconciler() error {
	if !s.cfg.has(messaging.Reconcile) {
		return nil
	}
	r := &reconciler{Reconciliation: s.reconciliation(), every: s.cfg.ReconcileEvery}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.findings = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "takeout_reconcile_findings", Help: "Differences between the services that are not resolved, as of the last run of this process.",
	}, []string{"class", "state"})
	r.success = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "takeout_reconcile_last_success_timestamp_seconds", Help: "When this process compared everything last; stays behind where another process reconciles.",
	})
	r.seconds = prometheus.NewGauge(prometheus.GaugeOpts{Name: "takeout_reconcile_seconds", Help: "How long the last run took."})
	r.buckets = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "takeout_reconcile_buckets_total", Help: "Minutes of orders that were compared, by whether both sides were equal.",
	}, []string{"result"})
	s.registry.MustRegister(r.findings, r.success, r.seconds, r.buckets)
	s.reconciler = r
	return nil
}

// reconcile starts comparing every now and then.
func (s *Service) reconcile() error {
	r := s.reconciler
	if r == nil || r.every == 0 {
		return nil
	}
	s.run("the reconciler", func() error {
		timer := time.NewTicker(r.every)
		defer timer.Stop()
		for {
			select {
			case <-r.ctx.Done():
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				_ = r.Resign(ctx) // or the lease ends by itself
				return nil
			case <-timer.C:
				_, _ = s.reconcileOnce(r.ctx, reconcile.Request{Repair: s.cfg.ReconcileRepair, Background: true}) // the log has what came out
			}
		}
	})
	return nil
}

// reconcileOnce runs once, and tells the log and the metrics what came out.
func (s *Service) reconcileOnce(ctx context.Context, q reconcile.Request) (reconcile.Report, error) {
	r := s.reconciler
	q.Lease = 3*r.every + time.Minute
	report, err := r.Run(ctx, q)
	if r.ctx.Err() != nil || domain.KindOf(err) == domain.Invalid {
		return report, err
	}
	r.note(report, err)
	if errors.Is(err, reconcile.ErrNotLeader) {
		return report, err
	}
	logger := s.logger.With("orders", report.Compared.Orders, "buckets", report.Compared.Buckets, "equal", report.Compared.Equal,
		"in_flight", report.InFlight, "waits_for_failures", report.Failures, "findings", report.Totals, "repaired", report.Repaired, "person", report.Person)
	switch {
	case err != nil:
		s.logger.Warn("the services could not be compared; the next run tries again", "error", err)
	case len(report.Errors) > 0:
		logger.Warn("the services could be compared only in part; the next run tries again", "errors", report.Errors)
	case !report.Agree():
		logger.Warn("the services differ")
	default:
		logger.Debug("the services agree")
	}
	return report, err
}

func (r *reconciler) note(report reconcile.Report, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failure, r.person = "", report.Person
	switch {
	case errors.Is(err, reconcile.ErrNotLeader): // the other process says what is wrong
		r.findings.Reset()
		return
	case err != nil:
		r.failure = err.Error()
		return
	case len(report.Errors) > 0:
		r.failure = report.Errors[0]
	default:
		r.success.Set(float64(report.FinishedAt.Unix()))
	}
	r.seconds.Set(report.FinishedAt.Sub(report.StartedAt).Seconds())
	r.buckets.WithLabelValues("equal").Add(float64(report.Compared.Equal))
	r.buckets.WithLabelValues("different").Add(float64(report.Compared.Buckets - report.Compared.Equal))
	r.findings.Reset()
	for _, n := range report.Counts {
		r.findings.WithLabelValues(n.Class, n.State).Set(float64(n.Findings))
	}
}

// health says what is wrong with the reconciliation, empty if nothing is.
func (r *reconciler) health() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.failure != "":
		return "the last comparison did not end well: " + r.failure
	case r.person > 0:
		return fmt.Sprintf("%d differences need a person: GET /v1/reconciliation", r.person)
	}
	return ""
}

// reconcileNow runs once. It goes on when ctx ends, and the report is then to be had by Last.
func (s *Service) reconcileNow(ctx context.Context, q reconcile.Request) (reconcile.Report, error) {
	type outcome struct {
		report reconcile.Report
		err    error
	}
	done := make(chan outcome, 1)
	s.running.Go(func() {
		report, err := s.reconcileOnce(s.reconciler.ctx, q)
		done <- outcome{report, err}
	})
	select {
	case o := <-done:
		return o.report, o.err
	case <-ctx.Done():
		return reconcile.Report{}, ctx.Err()
	}
}

// Reconcile compares the databases that cfg names once, beside whatever runs on them, and repairs if the request says
// so. It then goes on looking, for no longer than wait, until every repair has shown. The report has what these runs found,
// and what earlier ones did that is not resolved, a thousand of them at most. The error says that nothing could be compared.
func Reconcile(ctx context.Context, cfg Config, q reconcile.Request, wait time.Duration, logger *slog.Logger) (reconcile.Report, error) {
	if err := cfg.Validate(); err != nil {
		return reconcile.Report{}, err
	}
	cfg.Roles = []string{"all"} // it needs the databases of all services
	s := &Service{cfg: cfg, logger: logger}
	defer func() {
		for _, db := range s.databases {
			_ = db.Close()
		}
	}()
	if err := s.openDatabases(); err != nil {
		return reconcile.Report{}, err
	}
	for _, db := range s.databases {
		if err := s.look(ctx, db); err != nil {
			return reconcile.Report{}, err
		}
	}
	r := s.reconciliation()
	report, err := r.Run(ctx, q)
	for until := time.Now().Add(wait); err == nil && q.Repair && report.Waiting > 0 && time.Now().Before(until); {
		select {
		case <-ctx.Done():
			return report, ctx.Err()
		case <-time.After(min(time.Second, time.Until(until))):
		}
		var next reconcile.Report
		if next, err = r.Run(ctx, q); err == nil {
			report = merge(report, next)
		}
	}
	if err != nil {
		return report, err
	}
	earlier, err := r.Unresolved(ctx, 1000)
	report.Findings = union(earlier, report.Findings)
	return report, err
}

// look checks that a database is there and as this program knows it. It makes nothing.
func (s *Service) look(ctx context.Context, db *sqlstore.Database) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if db.DB().Missing() {
		return fmt.Errorf("the %s database %s does not exist; takeout serve makes it", db.DB().Name(), db.DB().Target())
	}
	if err := db.DB().Ping(ctx); err != nil {
		return fmt.Errorf("the %s database at %s: %w", db.DB().Name(), db.DB().Target(), err)
	}
	return db.CheckSchema(ctx)
}

// merge is the report of two runs, one after the other.
func merge(first, then reconcile.Report) reconcile.Report {
	then.StartedAt, then.From, then.Compared = first.StartedAt, first.From, first.Compared
	then.Repaired += first.Repaired
	then.Findings = union(first.Findings, then.Findings)
	return then
}

// union has each finding once, as the later ones say it.
func union(earlier, later []reconcile.Finding) []reconcile.Finding {
	findings := map[[2]string]reconcile.Finding{}
	for _, f := range slices.Concat(earlier, later) {
		findings[[2]string{f.Class, f.OrderID}] = f
	}
	all := slices.AppendSeq([]reconcile.Finding{}, maps.Values(findings))
	slices.SortFunc(all, func(a, b reconcile.Finding) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.OrderID, b.OrderID))
	})
	return all
}
