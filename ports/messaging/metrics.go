package messaging

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what consumers do.
type Metrics struct {
	handledTotal *prometheus.CounterVec
	delayedTotal *prometheus.CounterVec
	keptTotal    *prometheus.CounterVec
	seconds      *prometheus.HistogramVec
}

// NewMetrics registers the consumers' metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		handledTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "takeout_handled_total", Help: "Messages handled, by handler and whether they had been handled before.",
		}, []string{"handler", "duplicate"}),
		delayedTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "takeout_retries_delayed_total", Help: "Messages that failed and are tried again later, by handler and number of the delay.",
		}, []string{"handler", "tier"}),
		keptTotal: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "takeout_failures_total", Help: "Messages given up and kept for a person, by handler and class of error.",
		}, []string{"handler", "class"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "takeout_handling_seconds", Help: "Time that it took to handle a message, without attempts that failed before.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
		}, []string{"handler"}),
	}
	registry.MustRegister(m.handledTotal, m.delayedTotal, m.keptTotal, m.seconds)
	return m
}

func (m *Metrics) handled(handler string, duplicate bool, took time.Duration) {
	label := "false"
	if duplicate {
		label = "true"
	}
	m.handledTotal.WithLabelValues(handler, label).Inc()
	m.seconds.WithLabelValues(handler).Observe(took.Seconds())
}

func (m *Metrics) kept(handler, class string) { m.keptTotal.WithLabelValues(handler, class).Inc() }

func (m *Metrics) delayed(handler string, tier int) {
	m.delayedTotal.WithLabelValues(handler, strconv.Itoa(tier)).Inc()
}
