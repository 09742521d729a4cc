package app_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/tests/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// counter is an order database at whose door transactions wait while it is closed.
type counter struct {
	*sqlstore.Store[app.OrderTx]
	t      *testing.T
	orders *app.Orders

	open chan struct{} // closed when transactions may begin
	// inTx is in place of the store's InTx, if it is there, but for those who came before the guests.
	inTx func(ctx context.Context, fn func(context.Context, app.OrderTx) error) error

	mu    sync.Mutex
	came  int // transactions, with those that wait
	began int // transactions
}

// early marks the context of those who came before the guests.
type early struct{}

// InTx implements app.Store.
func (c *counter) InTx(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
	c.mu.Lock()
	c.came++
	c.mu.Unlock()
	<-c.open
	c.mu.Lock()
	c.began++
	c.mu.Unlock()
	if c.inTx != nil && ctx.Value(early{}) == nil {
		return c.inTx(ctx, fn)
	}
	return c.Store.InTx(ctx, fn)
}

// openStore opens and migrates a service's database.
func openStore[T any](t *testing.T, url string, open func(url string, keys event.Keys, logger *slog.Logger) (*sqlstore.Store[T], error)) *sqlstore.Store[T] {
	t.Helper()
	store, err := open(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	_, err = store.Migrate(context.Background())
	require.NoError(t, err)
	return store
}

// atTheCounter runs the test on SQLite and on MySQL.
func atTheCounter(t *testing.T, test func(t *testing.T, c *counter)) {
	t.Parallel()
	for name, place := range map[string]func() string{
		"sqlite": func() string { return "sqlite:" + filepath.Join(t.TempDir(), "order.db") },
		"mysql":  func() string { return testenv.MySQL(t) },
	} {
		url := place()
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := &counter{Store: openStore(t, url, sqlstore.OpenOrders), t: t, open: make(chan struct{})}
			close(c.open)
			c.orders = app.NewOrders(c)
			c.orders.Patient()
			test(t, c)
		})
	}
}

// guest is somebody who places an order, and what came of it.
type guest struct {
	app.PlaceOrder
	ctx context.Context

	placed app.Placement
	err    error
}

// wants returns a guest who places an order under the id, and under the key if there is one.
func (c *counter) wants(id, key string) *guest {
	orderID, err := order.ParseID(id)
	require.NoError(c.t, err)
	money, err := domain.NewMoney(2850, "CNY")
	require.NoError(c.t, err)
	g := &guest{PlaceOrder: app.PlaceOrder{ID: orderID, Name: "Mapo tofu", Money: money}, ctx: context.Background()}
	if key != "" {
		g.Request = &app.Request{Key: key, Fingerprint: sha256.Sum256([]byte(id)), Answer: func(o order.Snapshot) ([]byte, error) {
			return fmt.Appendf(nil, "%s at %s", o.ID, o.PlacedAt), nil
		}}
	}
	return g
}

// queue has the guests come one after the other while others are being served. When these are, the guests are served
// together; served returns when they all have their answers.
func (c *counter) queue(guests ...*guest) (served func()) {
	var all sync.WaitGroup
	come := func(g *guest) {
		all.Go(func() {
			placed, err := c.orders.Place(g.ctx, g.PlaceOrder)
			c.mu.Lock()
			defer c.mu.Unlock()
			g.placed, g.err = placed, err
		})
	}
	c.open, c.came = make(chan struct{}), 0
	for i := range c.orders.AtOnce() {
		g := c.wants(fmt.Sprint("early", i), "")
		g.ctx = context.WithValue(g.ctx, early{}, true)
		come(g)
	}
	c.eventually(func() bool { return c.came == c.orders.AtOnce() })
	for i, g := range guests {
		come(g)
		c.eventually(func() bool { return c.orders.Waiting() == i+1 })
	}
	return func() {
		close(c.open)
		all.Wait()
	}
}

func (c *counter) eventually(holds func() bool) {
	c.t.Helper()
	require.Eventually(c.t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return holds()
	}, 30*time.Second, time.Millisecond)
}

// column returns the first column of the rows of the order database.
func (c *counter) column(query string) []string {
	rows, err := c.DB().Reader().Query(query)
	require.NoError(c.t, err)
	defer rows.Close()
	var values []string
	for rows.Next() {
		var value string
		require.NoError(c.t, rows.Scan(&value))
		values = append(values, value)
	}
	require.NoError(c.t, rows.Err())
	return values
}

const guestsOrders = "SELECT orderId FROM order_info WHERE orderId NOT LIKE 'early%' ORDER BY orderId"

func TestOrdersThatArePlacedAtOnceAreStoredInOneTransaction(t *testing.T) {
	atTheCounter(t, func(t *testing.T, c *counter) {
		var guests []*guest
		var ids []string
		for i := range 50 {
			ids = append(ids, fmt.Sprint("o", 99-i)) // of which the first is the last in the alphabet
			key := ""
			if i%2 == 0 {
				key = fmt.Sprint("key", i)
			}
			guests = append(guests, c.wants(ids[i], key))
		}
		c.queue(guests...)()
		require.Equal(t, c.orders.AtOnce()+1, c.began)
		require.Len(t, c.column("SELECT orderId FROM idempotency_answer"), 25)
		for _, g := range guests {
			require.NoError(t, g.err)
			require.False(t, g.placed.Before)
			require.Equal(t, g.ID, g.placed.Order.ID)
			if g.Request != nil {
				require.Equal(t, fmt.Sprintf("%s at %s", g.ID, g.placed.Order.PlacedAt), string(g.placed.Answer))
				again, err := c.orders.Place(g.ctx, g.PlaceOrder)
				require.NoError(t, err)
				require.True(t, again.Before)
				require.Equal(t, string(g.placed.Answer), string(again.Answer))
			}
		}
		require.Equal(t, ids, c.column("SELECT order_id FROM outbox WHERE order_id NOT LIKE 'early%' ORDER BY id"),
			"events in the order in which the orders came")
		require.Len(t, c.column(guestsOrders), 50)
		require.Len(t, c.column("SELECT DISTINCT event_id FROM outbox WHERE order_id NOT LIKE 'early%'"), 50)
	})
}

func TestOrderThatCouldNotBeginInTimeIsNotStoredAndMayBeAskedForAgain(t *testing.T) {
	atTheCounter(t, func(t *testing.T, c *counter) {
		served := c.queue()
		late := c.wants("late", "")
		ctx, cancel := context.WithDeadline(late.ctx, time.Now().Add(-time.Second))
		defer cancel()
		_, err := c.orders.Place(ctx, late.PlaceOrder)
		require.Equal(t, domain.Unavailable, domain.KindOf(err))
		known, ok := errors.AsType[*domain.Error](err)
		require.True(t, ok)
		require.Equal(t, "database_slow", known.Code, "its fate is known")
		served()
		require.Empty(t, c.column(guestsOrders))
	})
}

func TestOneBadOrderAmongFiftySpoilsNoOther(t *testing.T) {
	atTheCounter(t, func(t *testing.T, c *counter) {
		known := c.wants("known", "known-key")
		_, err := c.orders.Place(known.ctx, known.PlaceOrder)
		require.NoError(t, err)
		var guests []*guest
		for i := range 50 {
			guests = append(guests, c.wants(fmt.Sprint("o", i), fmt.Sprint("key", i)))
		}
		taken, reused := c.wants("known", ""), c.wants("o-reused", "known-key")
		taken.Name = "Kung pao chicken"
		c.queue(append([]*guest{taken, reused}, guests...)...)()
		require.Equal(t, domain.Conflict, domain.KindOf(taken.err), "%v", taken.err)
		require.Equal(t, domain.Invalid, domain.KindOf(reused.err), "%v", reused.err)
		require.Equal(t, 1+c.orders.AtOnce()+2+2, c.began, "one that fails, one without the two who are to blame, and theirs")
		for _, g := range guests {
			require.NoError(t, g.err)
			require.False(t, g.placed.Before)
		}
		require.Len(t, c.column(guestsOrders), 51)
		require.Len(t, c.column("SELECT order_id FROM outbox WHERE order_id LIKE 'o%'"), 50)
		require.Len(t, c.column("SELECT orderId FROM idempotency_answer"), 51)
	})
}

func TestOneOfThoseWhoPlaceTheSameOrderTogetherPlacesIt(t *testing.T) {
	for name, key := range map[string]string{"under one key": "key", "under one id": ""} {
		t.Run(name, func(t *testing.T) {
			atTheCounter(t, func(t *testing.T, c *counter) {
				var guests []*guest
				for range 20 {
					guests = append(guests, c.wants("o", key))
				}
				other := c.wants("other", "")
				c.queue(append(guests, other)...)()
				require.NoError(t, other.err)
				fresh := 0
				for _, g := range guests {
					require.NoError(t, g.err)
					require.Equal(t, string(guests[0].placed.Answer), string(g.placed.Answer))
					if !g.placed.Before {
						fresh++
					}
				}
				require.Equal(t, 1, fresh)
				require.Equal(t, c.orders.AtOnce()+1+19, c.began)
				require.Equal(t, []string{"o", "other"}, c.column(guestsOrders))
				require.Len(t, c.column("SELECT id FROM outbox WHERE order_id = 'o'"), 1)
			})
		})
	}
}

func TestWhoHangsUpWhileOrdersAreStoredTogetherDisturbsNobody(t *testing.T) {
	atTheCounter(t, func(t *testing.T, c *counter) {
		first, waiting, leaving, staying := c.wants("first", ""), c.wants("waiting", ""), c.wants("leaving", "key"), c.wants("staying", "")
		var giveUp, hangUp context.CancelFunc
		waiting.ctx, giveUp = context.WithCancel(waiting.ctx)
		leaving.ctx, hangUp = context.WithCancel(leaving.ctx)
		c.inTx = func(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
			hangUp()
			c.eventually(func() bool { return leaving.err != nil })
			return c.Store.InTx(ctx, fn)
		}
		served := c.queue(first, waiting, leaving, staying)
		giveUp()
		c.eventually(func() bool { return waiting.err != nil })
		served()
		require.ErrorIs(t, waiting.err, context.Canceled)
		require.NoError(t, first.err)
		require.NoError(t, staying.err)
		require.Equal(t, "outcome_unknown", codeOf(leaving.err))
		require.Equal(t, []string{"first", "leaving", "staying"}, c.column(guestsOrders))

		c.inTx = nil
		again, err := c.orders.Place(context.Background(), leaving.PlaceOrder)
		require.NoError(t, err)
		require.True(t, again.Before)
	})
}

func TestWhoseOrderIsNotKnownToBeStoredWithOthersIsToldSo(t *testing.T) {
	away := domain.Errorf(domain.Unavailable, "database_unavailable", "away")
	for name, row := range map[string]struct {
		stored, back bool
		code         string // empty if there is no error
	}{
		"the database goes away before it stores anything":             {false, false, "database_unavailable"},
		"the database goes away after it stored them":                  {true, false, "outcome_unknown"},
		"the database goes away after it stored them, and comes back":  {true, true, ""},
		"the database goes away before it stores, and then comes back": {false, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			atTheCounter(t, func(t *testing.T, c *counter) {
				guests := []*guest{c.wants("a", "key"), c.wants("b", ""), c.wants("c", "")}
				var together atomic.Bool
				c.inTx = func(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
					first := together.CompareAndSwap(false, true)
					if first && row.stored || !first && row.back {
						err := c.Store.InTx(ctx, fn)
						if !first || err != nil {
							return err
						}
					}
					return away
				}
				c.queue(guests...)()
				c.inTx = nil
				for _, g := range guests {
					if row.code != "" {
						require.Equal(t, row.code, codeOf(g.err))
					} else {
						require.NoError(t, g.err)
						require.False(t, g.placed.Before)
					}
					again, err := c.orders.Place(g.ctx, g.PlaceOrder)
					require.NoError(t, err)
					require.Equal(t, row.stored || row.back, again.Before)
				}
				require.Equal(t, []string{"a", "b", "c"}, c.column(guestsOrders))
				require.Len(t, c.column("SELECT id FROM outbox WHERE order_id IN ('a', 'b', 'c')"), 3)
			})
		})
	}
}

// The transaction that may have stored the order may be what holds its row.
func TestOrderThatIsLockedAfterALostCommitIsNotCalledBusy(t *testing.T) {
	locked := domain.Errorf(domain.Busy, "lock_wait", "locked")
	for name, row := range map[string]struct {
		committing bool
		code       string
	}{
		"the COMMIT got no answer":        {true, "outcome_unknown"},
		"it was locked before any COMMIT": {false, "lock_wait"},
	} {
		t.Run(name, func(t *testing.T) {
			atTheCounter(t, func(t *testing.T, c *counter) {
				guests := []*guest{c.wants("a", "key"), c.wants("b", ""), c.wants("c", "")}
				var together atomic.Bool
				c.inTx = func(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
					if !together.CompareAndSwap(false, true) || !row.committing {
						return locked
					}
					if err := c.Store.InTx(ctx, fn); err != nil {
						return err
					}
					return domain.Errorf(domain.Unavailable, "database_unavailable", "no answer")
				}
				c.queue(guests...)()
				for _, g := range guests {
					require.Equal(t, row.code, codeOf(g.err))
				}
				require.Equal(t, row.committing, len(c.column(guestsOrders)) == len(guests))
			})
		})
	}
}

func TestOrderThatWasStoredByALostCommitIsAnsweredAsItWasPlaced(t *testing.T) {
	atTheCounter(t, func(t *testing.T, c *counter) {
		g := c.wants("a", "")
		lost := false
		c.inTx = func(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
			if err := c.Store.InTx(ctx, fn); err != nil || lost {
				return err
			}
			lost = true
			_, err := c.orders.Cancel(ctx, g.ID, "")
			require.NoError(t, err)
			return c.Store.InTx(ctx, fn) // as after a COMMIT without an answer
		}
		placed, err := c.orders.Place(g.ctx, g.PlaceOrder)
		require.NoError(t, err)
		require.False(t, placed.Before)
		require.Equal(t, order.Placed, placed.Order.Status, "it was cancelled after it was placed")
		require.Equal(t, []string{"cancelled"}, c.column("SELECT status FROM order_info"))
	})
}

func codeOf(err error) string {
	if known, ok := errors.AsType[*domain.Error](err); ok {
		return known.Code
	}
	return fmt.Sprint(err)
}
