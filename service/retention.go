package service

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"takeout/adapters/sqlstore"
)

// pruneEvery is the mean time between two rounds. Each process waits a random time around it, so that several do not
// come together.
const pruneEvery = time.Hour

// prune begins to delete what the services of this process need not remember any more.
func (s *Service) prune() error {
	pruned := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "takeout_pruned_total", Help: "Rows deleted because they were older than is kept.",
	}, []string{"database", "table"})
	s.registry.MustRegister(pruned)
	for _, db := range s.databases {
		if s.cfg.serves(db.DB().Name()) {
			labelled := pruned.MustCurryWith(prometheus.Labels{"database": db.DB().Name()})
			s.alongside(func(ctx context.Context) { s.pruneUntil(ctx, db, labelled) })
		}
	}
	return nil
}

// pruneUntil prunes at once and then from time to time until ctx ends.
func (s *Service) pruneUntil(ctx context.Context, db *sqlstore.Database, pruned *prometheus.CounterVec) {
	keep := sqlstore.Retention{Dedup: s.cfg.DedupHorizon, Failures: s.cfg.FailureRetention, History: s.cfg.HistoryRetention}
	for {
		rows, err := db.Prune(ctx, keep)
		for table, n := range rows {
			pruned.WithLabelValues(table).Add(float64(n))
			if n > 0 {
				s.logger.Info("old rows are deleted", "database", db.DB().Name(), "table", table, "rows", n)
			}
		}
		if err != nil && ctx.Err() == nil {
			s.logger.Warn("not all old rows could be deleted; the next try is within two hours", "database", db.DB().Name(), "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pruneEvery/2 + rand.N(pruneEvery)):
		}
	}
}
