package messaging

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
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
	_, err := newConsumer(t, failures).handleAs(useCase)(msg)
	return err
}

func newConsumer(t *testing.T, failures app.Failures) *consumer {
	t.Helper()
	all, err := NewConsumers(Acceptance{}, []time.Duration{5 * time.Second, time.Minute}, time.Second, NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	return &consumer{Consumers: all, route: Route{Queue: "q"}, failures: failures, pause: pause{logger: all.logger}, logger: all.logger}
}

// handleAs is the use case with all that is around it.
func (c *consumer) handleAs(useCase func() error) message.HandlerFunc {
	handle := func(*message.Message) ([]*message.Message, error) { return nil, useCase() }
	for _, around := range slices.Backward(c.middlewares()) {
		handle = around(handle)
	}
	return handle
}

func TestWhatBecomesOfMessagesIsCountedAndTheLogSaysOfWhichOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		registry, log := prometheus.NewRegistry(), &strings.Builder{}
		all, err := NewConsumers(Acceptance{}, []time.Duration{5 * time.Second}, time.Second, NewMetrics(registry), slog.New(slog.NewTextHandler(log, nil)))
		require.NoError(t, err)
		c := &consumer{Consumers: all, route: Route{Queue: "q"}, failures: &record{}, pause: pause{logger: all.logger}, logger: all.logger}
		for id, fails := range map[string]error{
			"handled": nil, "duplicate": app.ErrDuplicate, "delayed": domain.Errorf(domain.NotFound, "order_not_found", "early"),
			"kept": domain.Errorf(domain.Invalid, "wrong", "wrong"),
		} {
			msg := message.NewMessage(id, []byte(`{"subject":"o-`+id+`"}`))
			msg.SetContext(t.Context())
			_, err := c.handleAs(func() error { return fails })(msg)
			require.NoError(t, err)
		}
		counted := map[string]float64{}
		families, err := registry.Gather()
		require.NoError(t, err)
		for _, family := range families {
			for _, m := range family.GetMetric() {
				name := family.GetName()
				for _, label := range m.GetLabel() {
					name += " " + label.GetValue()
				}
				counted[name] = m.GetCounter().GetValue()
			}
		}
		delete(counted, "takeout_handling_seconds q")
		require.Equal(t, map[string]float64{
			"takeout_handled_total false q": 1, "takeout_handled_total true q": 1,
			"takeout_retries_delayed_total q 1": 1, "takeout_failures_total permanent q": 1,
		}, counted)
		require.Contains(t, log.String(), "message_id=delayed order_id=o-delayed")
		require.Contains(t, log.String(), "message_id=kept order_id=o-kept")
	})
}

// It failed, and would spoil again for the others what is done for all of them in one transaction.
func TestMessageThatFailedIsTriedAgainApartFromOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var apart []bool
		c, msg := newConsumer(t, &record{}), message.NewMessage("m", nil)
		msg.SetContext(t.Context())
		handle := func(msg *message.Message) ([]*message.Message, error) {
			if apart = append(apart, app.IsApart(msg.Context())); len(apart) == 1 {
				return nil, errors.New("it failed")
			}
			return nil, nil
		}
		for _, around := range slices.Backward(c.middlewares()) {
			handle = around(handle)
		}
		_, err := handle(msg)
		require.NoError(t, err)
		require.Equal(t, []bool{false, true}, apart)
	})
}

func TestWhatMessagesHoldIsNotInWatermillsLines(t *testing.T) {
	t.Parallel()
	require.Equal(t, []any{"topic", "order.placed"}, attrs(map[string]any{"payload": "secret", "metadata": "secret", "topic": "order.placed"}))
}

// slowKeeper is a database that keeps a long message when it is told to.
type slowKeeper struct {
	record
	keeping atomic.Int32
	end     chan struct{}
}

func (k *slowKeeper) Keep(ctx context.Context, f app.Failure) error {
	if len(f.Payload) > longestDelayed {
		k.keeping.Add(1)
		<-k.end
		k.keeping.Add(-1)
	}
	return k.record.Keep(ctx, f)
}

func TestLargeMessagesAreKeptOneByOneAndSmallOnesMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		keeper := &slowKeeper{end: make(chan struct{})}
		one := newConsumer(t, keeper)
		other := &consumer{Consumers: one.Consumers, route: Route{Queue: "other"}, failures: keeper, pause: pause{logger: one.logger}, logger: one.logger}
		wrong := func() error { return domain.Errorf(domain.Invalid, "wrong", "wrong") }
		for i := range 6 {
			handle := []*consumer{one, other}[i%2].handleAs(wrong)
			go func() {
				_, err := handle(message.NewMessage(fmt.Sprint("large", i), make([]byte, longestDelayed+1)))
				assert.NoError(t, err)
			}()
		}
		for range 6 {
			synctest.Wait()
			require.EqualValues(t, 1, keeper.keeping.Load(), "large ones at once")
			_, err := other.handleAs(wrong)(message.NewMessage("small", []byte("x")))
			require.NoError(t, err, "while a large one is being kept")
			keeper.end <- struct{}{}
		}
		synctest.Wait()
		require.Len(t, keeper.kept, 12)
	})
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

// fates of messages, by the courier that they name
const (
	good    = "good"
	before  = "before" // was handled before
	wrong   = "wrong"
	panics  = "panics"
	early   = "early" // fails the first time that it is handled alone
	never   = "never" // fails each time
	goneFor = "gone-for-a-minute"
	slow    = "slow"
)

// counter is a use case that can handle many at once, and counts the effects.
type counter struct {
	mu      sync.Mutex
	began   time.Time
	gate    chan struct{} // slow ones wait for it
	effects map[string]int
	alone   map[string]int // how often each was handled alone
	batches [][]string     // of orders that were to be handled together

	meanwhile func() // is called when all others wait; nil if nothing happens meanwhile
}

func (c *counter) one(_ context.Context, e event.DispatchAssigned) error {
	if e.CourierID == slow {
		<-c.gate
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.alone[e.OrderID]++
	switch {
	case e.CourierID == before:
		return app.ErrDuplicate
	case e.CourierID == wrong:
		return domain.Errorf(domain.Invalid, "wrong", "wrong")
	case e.CourierID == panics:
		panic("boom")
	case e.CourierID == early && c.alone[e.OrderID] == 1, e.CourierID == never:
		return domain.Errorf(domain.NotFound, "order_not_found", "early")
	case e.CourierID == goneFor && time.Since(c.began) < time.Minute:
		return domain.Errorf(domain.Unavailable, "database_unavailable", "away")
	}
	c.effects[e.OrderID]++
	return nil
}

func (c *counter) many(ctx context.Context, all []event.DispatchAssigned) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var orders []string
	for i, e := range all {
		orders = append(orders, e.OrderID)
		if d := app.DeliveriesFrom(ctx)[i]; d.OrderID != e.OrderID || d.Consumer != "q" {
			return fmt.Errorf("%s is delivered as %v", e.OrderID, d)
		}
	}
	c.batches = append(c.batches, orders)
	for _, e := range all {
		switch e.CourierID {
		case panics:
			panic("boom")
		case good:
		default:
			return errors.New("not all are good")
		}
	}
	for _, e := range all {
		c.effects[e.OrderID]++
	}
	return nil
}

// together hands a slow message to a consumer, and then all others, which come while it is being handled. It returns what
// the handler returned for each.
func (c *counter) together(t *testing.T, failures app.Failures, contexts map[string]context.Context, fates ...string) map[string]error {
	t.Helper()
	c.began, c.gate, c.effects, c.alone = time.Now(), make(chan struct{}), map[string]int{}, map[string]int{}
	all, err := NewConsumers(Acceptance{Horizon: time.Hour}, []time.Duration{5 * time.Second}, time.Second, NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	route := onMany(Order, "q", patient, c.one, c.many)
	consumer := &consumer{Consumers: all, route: route, failures: failures, pause: pause{logger: all.logger}, logger: all.logger}
	handle := func(msg *message.Message) ([]*message.Message, error) { return nil, route.handle(msg, "q", all.accept) }
	for _, around := range slices.Backward(consumer.middlewares()) {
		handle = around(handle)
	}
	var mu sync.Mutex
	results := map[string]error{}
	var messages sync.WaitGroup
	for i, fate := range append([]string{slow}, fates...) {
		id := fmt.Sprintf("%s-%d", fate, i)
		body, err := event.Encode(id, time.Now(), event.DispatchAssigned{OrderID: id, CourierID: fate, AssignedAt: time.Now(), Version: 1})
		require.NoError(t, err)
		msg := message.NewMessage(id, body)
		if ctx := contexts[fate]; ctx != nil {
			msg.SetContext(ctx)
		}
		messages.Go(func() {
			_, err := handle(msg)
			mu.Lock()
			defer mu.Unlock()
			results[id] = err
		})
		synctest.Wait() // it is being handled, or waits for its turn
	}
	if c.meanwhile != nil {
		c.meanwhile()
		synctest.Wait()
	}
	close(c.gate)
	messages.Wait()
	return results
}

func TestMessagesHandledTogetherHaveTheFateThatEachHasAlone(t *testing.T) {
	t.Parallel()
	for _, company := range [][]string{{}, {before}, {wrong}, {panics}, {early}, {never}, {goneFor}, {before, wrong, panics, early, never}} {
		t.Run(fmt.Sprint(company), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, failures := &counter{}, &record{}
				fates := append([]string{good, good, good}, company...)
				results := c.together(t, failures, nil, append(fates, good, good)...)
				for id, err := range results {
					require.NoError(t, err, "%s is settled", id)
					fate, _, _ := strings.Cut(id, "-")
					require.Equal(t, map[string]int{good: 1, slow: 1, early: 1, "gone": 1}[fate], c.effects[id], id)
					if fate == good && len(company) == 0 {
						require.Zero(t, c.alone[id], id)
					}
				}
				require.Len(t, results, 6+len(company))
				require.Len(t, c.batches[0], 5+len(company))
				goodAlone := 0
				for id, times := range c.alone {
					if strings.HasPrefix(id, good) {
						goodAlone += times
					}
				}
				switch len(company) {
				case 0:
					require.Len(t, c.batches, 1)
				case 1:
					require.LessOrEqual(t, goodAlone, 1, "what fails spoils it for one other at most: %v", c.batches)
				}
				require.Less(t, len(c.batches), len(c.batches[0]), "no half is tried again: %v", c.batches)
				var want []string
				for _, fate := range company {
					switch fate {
					case wrong:
						want = append(want, "keep permanent wrong after 1")
					case panics, never:
						want = append(want, "delay 1 for 5s")
					}
				}
				require.ElementsMatch(t, want, failures.stored)
			})
		})
	}
}

func TestWhatIsHandledAgainIsHandledAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, ctx := range []context.Context{
			app.WithRetry(t.Context(), app.Retry{Tier: 1}), app.WithRetry(t.Context(), app.Retry{FailureID: 1}), app.Apart(t.Context()),
		} {
			c := &counter{}
			c.together(t, &record{}, map[string]context.Context{good: ctx}, good, good, good)
			require.Empty(t, c.batches)
			require.Len(t, c.effects, 4)
		}
	})
}

func TestMessageWhoseConnectionIsLostWhileItWaitsForItsTurnGoesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		failures := &record{}
		ctx, lose := context.WithCancelCause(t.Context())
		c := &counter{meanwhile: func() { lose(errors.New("the connection is lost")) }}
		for id, err := range c.together(t, failures, map[string]context.Context{good: ctx}, good, early) {
			if strings.HasPrefix(id, good) {
				require.ErrorIs(t, err, context.Canceled)
				require.Zero(t, c.effects[id])
				continue
			}
			require.NoError(t, err, id)
			require.Equal(t, 1, c.effects[id])
		}
		require.Empty(t, failures.stored, "that is no failure of the message")
	})
}

func TestCopiesOfAMessageThatIsBeingHandledShareItsEndUnlessItFails(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		ends  []any // of the calls of the use case, one after another; then it was handled before
		calls int
	}{
		"handled":        {[]any{nil}, 1},
		"handled before": {[]any{app.ErrDuplicate}, 1},
		// A copy does it, and who failed finds it done.
		"failed once, then handled": {[]any{errors.New("no"), nil}, 3},
		"a panic, then handled":     {[]any{"boom", nil}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newConsumer(t, &record{})
				calls := 0
				handle := c.handleAs(func() error {
					time.Sleep(time.Millisecond) // until all are there
					end := any(app.ErrDuplicate)
					if calls < len(row.ends) {
						end = row.ends[calls]
					}
					calls++
					if _, panics := end.(string); panics {
						panic(end)
					}
					err, _ := end.(error)
					return err
				})
				var all sync.WaitGroup
				for range 100 {
					all.Go(func() {
						if _, err := handle(message.NewMessage("m", []byte("same"))); err != nil {
							t.Error(err)
						}
					})
				}
				all.Wait()
				require.Equal(t, row.calls, calls)
				require.Empty(t, c.copies.firsts)
			})
		})
	}
}

func TestMessageThatOnlyPretendsToBeACopyIsHandledItself(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newConsumer(t, &record{})
		var calls atomic.Int32
		handle := c.handleAs(func() error {
			time.Sleep(time.Millisecond)
			calls.Add(1)
			return nil
		})
		signed := message.NewMessage("m", []byte("same"))
		signed.Metadata.Set(event.SignatureHeader, "s")
		var all sync.WaitGroup
		for _, msg := range []*message.Message{
			message.NewMessage("m", []byte("same")), message.NewMessage("m", []byte("other")), signed, message.NewMessage("another", []byte("same")),
		} {
			all.Go(func() {
				if _, err := handle(msg); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		require.EqualValues(t, 4, calls.Load())
	})
}

func TestCopyThatWaitsGoesBackWhenItsTimeIsUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newConsumer(t, &record{})
		release := make(chan struct{})
		handle := c.handleAs(func() error { <-release; return nil })
		first := make(chan error)
		go func() {
			_, err := handle(message.NewMessage("m", nil))
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithCancel(context.Background())
		copied := message.NewMessage("m", nil)
		copied.SetContext(ctx)
		cancel()
		_, err := handle(copied)
		require.ErrorIs(t, err, context.Canceled)
		close(release)
		require.NoError(t, <-first)
	})
}
