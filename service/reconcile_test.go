package service

import (
	"errors"
	"testing"
	"time"

	"takeout/app/reconcile"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

func TestComparisonInPartIsNoSuccess(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	r := &reconciler{
		findings: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "findings"}, []string{"class", "state"}),
		success:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "success"}),
		seconds:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "seconds"}),
		buckets:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "buckets"}, []string{"result"}),
	}
	registry.MustRegister(r.success)
	succeeded := func() float64 {
		families, err := registry.Gather()
		require.NoError(t, err)
		return families[0].GetMetric()[0].GetGauge().GetValue()
	}
	ended := time.Unix(1_800_000_000, 0)
	r.note(reconcile.Report{FinishedAt: ended, Errors: []string{"the dispatch database is away"}}, nil)
	require.Contains(t, r.health(), "the dispatch database is away")
	require.Zero(t, succeeded())
	r.note(reconcile.Report{}, errors.New("nothing could be compared"))
	require.Contains(t, r.health(), "nothing could be compared")
	require.Zero(t, succeeded())
	r.note(reconcile.Report{FinishedAt: ended, Person: 2}, nil)
	require.Contains(t, r.health(), "2 differences need a person")
	require.InDelta(t, ended.Unix(), succeeded(), 0, "everything was compared")
	r.note(reconcile.Report{FinishedAt: ended}, nil)
	require.Empty(t, r.health())
}
