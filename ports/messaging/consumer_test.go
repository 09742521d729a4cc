package messaging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
)

// record remembers what a consumer stores about messages.
type record struct {
	mu     sync.Mutex
	stored []string
	kept   []app.Failure
	away   int // how many calls fail because the database is away
}

func (r *record) add(format string, args ...any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.away > 0 {
		r.away--
		return domain.Errorf(domain.Unavailable, "database_unavailable", "away")
	}
	r.stored = append(r.stored, fmt.Sprintf(format, args...))
	return nil
}

func (r *record) Delay(_ context.Context, f app.Failure, tier int, after time.Duration) error {
	if f.MessageID == "refused" {
		return domain.Errorf(domain.Invalid, "value_refused", "the database refuses a value")
	}
	return r.add("delay %d for %s", tier, after)
}

func (r *record) Keep(_ context.Context, f app.Failure) error {
	err := r.add("keep %s %s after %d", f.Class, f.Code, f.Attempts)
	if err == nil {
		r.kept = append(r.kept, f)
	}
	return err
}

func (r *record) Resolve(_ context.Context, failureID int64) error {
	return r.add("resolve %d", failureID)
}

// consume hands the message to a consumer with two delays whose use case answers as useCase does. An error means that
// the message goes back.
func consume(t *testing.T, failures app.Failures, msg *message.Message, useCase func() error) error {
	t.Helper()
	all, err := NewConsumers(Acceptance{}, []time.Duration{5 * time.Second, time.Minute}, time.Second, NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	c := &consumer{Consumers: all, route: Route{Queue: "q"}, failures: failures, pause: pause{logger: all.logger}, logger: all.logger}
	handle := func(*message.Message) ([]*message.Message, error) { return nil, useCase() }
	for _, around := range slices.Backward(c.middlewares()) {
		handle = around(handle)
	}
	_, err = handle(msg)
	return err
}

func TestWhatBecomesOfAMessageThatFails(t *testing.T) {
	t.Parallel()
	early := domain.Errorf(domain.NotFound, "order_not_found", "early")
	wrong := domain.Errorf(domain.Invalid, "wrong", "wrong")
	asked := app.Retry{FailureID: 7}
	for name, row := range map[string]struct {
		fails   error
		id      string
		retry   app.Retry
		size    int
		killer  bool
		attempt int // how often the use case is called
		want    []string
	}{
		"handled":                               {nil, "", app.Retry{}, 1, false, 1, nil},
		"handled before":                        {app.ErrDuplicate, "", app.Retry{}, 1, false, 1, nil},
		"permanent":                             {wrong, "", app.Retry{}, 1, false, 1, []string{"keep permanent wrong after 1"}},
		"transient":                             {early, "", app.Retry{}, 1, false, 4, []string{"delay 1 for 5s"}},
		"transient after the first delay":       {early, "", app.Retry{Tier: 1}, 1, false, 4, []string{"delay 2 for 1m0s"}},
		"transient after the last delay":        {early, "", app.Retry{Tier: 2}, 1, false, 4, []string{"keep transient order_not_found after 12"}},
		"transient after more delays than now":  {early, "", app.Retry{Tier: 4}, 1, false, 4, []string{"keep transient order_not_found after 20"}},
		"permanent after a delay":               {wrong, "", app.Retry{Tier: 1}, 1, false, 1, []string{"keep permanent wrong after 5"}},
		"transient and large":                   {early, "", app.Retry{}, longestDelayed + 1, false, 4, []string{"keep transient order_not_found after 4"}},
		"transient and as large as can be":      {early, "", app.Retry{}, longestDelayed, false, 4, []string{"delay 1 for 5s"}},
		"transient, and cannot be delayed":      {early, "refused", app.Retry{}, 1, false, 4, []string{"keep transient order_not_found after 4"}},
		"transient again, when somebody asked":  {early, "", asked, 1, false, 4, []string{"keep transient order_not_found after 4"}},
		"handled, when somebody asked":          {nil, "", asked, 1, false, 1, []string{"resolve 7"}},
		"handled before, when somebody asked":   {app.ErrDuplicate, "", asked, 1, false, 1, []string{"resolve 7"}},
		"delivered too often":                   {nil, "", app.Retry{Tier: 1}, 1, true, 0, []string{"keep undeliverable delivery_limit after 4"}},
		"delivered too often, somebody's retry": {nil, "", asked, 1, true, 0, []string{"keep undeliverable delivery_limit after 0"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				failures := &record{}
				msg := message.NewMessage(row.id, make([]byte, row.size))
				msg.SetContext(app.WithRetry(t.Context(), row.retry))
				if row.killer {
					msg.Metadata.Set(app.MetadataUndeliverable, "too often")
				}
				calls := 0
				require.NoError(t, consume(t, failures, msg, func() error {
					calls++
					return row.fails
				}))
				require.Equal(t, row.attempt, calls)
				require.Equal(t, row.want, failures.stored)
				for _, f := range failures.kept {
					require.Equal(t, row.retry, f.Retry)
					require.Empty(t, f.Headers)
				}
			})
		})
	}
}

func TestPanicIsAFailureLikeAnyOther(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failures := &record{}
		msg := message.NewMessage("x", nil)
		msg.SetContext(app.WithRetry(t.Context(), app.Retry{Tier: 2}))
		require.NoError(t, consume(t, failures, msg, func() error { panic("boom") }))
		require.Equal(t, []string{"keep transient panic after 12"}, failures.stored)
		require.Equal(t, "panic: boom", failures.kept[0].Error, "without a stack")
	})
}

func TestInfrastructureThatIsAwaySpendsNoAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failures := &record{}
		began := time.Now()
		require.NoError(t, consume(t, failures, message.NewMessage("x", nil), func() error {
			if time.Since(began) < 20*time.Minute {
				return domain.Errorf(domain.Unavailable, "database_unavailable", "away")
			}
			return nil
		}))
		require.Empty(t, failures.stored)
		require.Less(t, time.Since(began), 20*time.Minute+longestPause, "it is noticed soon that the outage is over")
	})
}

func TestMessageIsDelayedWhenTheDatabaseIsBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failures := &record{away: 300}
		calls := 0
		require.NoError(t, consume(t, failures, message.NewMessage("x", nil), func() error {
			calls++
			return errors.New("anything")
		}))
		require.Equal(t, []string{"delay 1 for 5s"}, failures.stored)
		require.Equal(t, immediateTries, calls)
	})
}
