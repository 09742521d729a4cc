package tests

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
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

// race is one order that its producer stores while the compensation hears of it.
type race struct {
	*raceTrack
	id    string
	chaos *rand.Rand
}

// raceTrack is where races are held.
type raceTrack struct {
	store        *orderStore
	orders       *app.Orders
	compensation *app.Compensation
}

// An interleaving runs one race and returns what must be stored after it.
type interleaving func(r *race) (finish, error)

// finish is how an order must have ended.
type finish struct {
	exists    bool
	status    string
	name      string
	placedAt  time.Time
	recreated int // -1 if either may have stored it
}

// What becomes of an order is decided by its row's lock, whoever comes first and whatever happens to the other. Each
// interleaving is run a thousand times with other delays between its steps.
func TestCompensationAndProducerAgreeHoweverTheyInterleave(t *testing.T) {
	t.Parallel()
	store := openStore(t, testenv.MySQL(t), sqlstore.OpenOrders)
	track := &raceTrack{store, app.NewOrders(store), app.NewCompensation(store, 1_000_000)}
	for name, run := range map[string]interleaving{
		"commit":        (*race).commit,
		"rollback":      (*race).rollback,
		"cancel":        (*race).cancel,
		"publish-first": (*race).publishFirst,
		"crash":         (*race).crash,
		"reject":        (*race).reject,
	} {
		t.Run(name, func(t *testing.T) { track.hold(t, name, run) })
	}
}

const races, racesAtOnce = 1000, 10

func (track *raceTrack) hold(t *testing.T, name string, run interleaving) {
	ends := make([]finish, races)
	var next atomic.Int64
	var runners sync.WaitGroup
	for range racesAtOnce {
		runners.Go(func() {
			for i := next.Add(1) - 1; i < races; i = next.Add(1) - 1 {
				r := &race{track, fmt.Sprintf("%s-%d", name, i), rand.New(rand.NewPCG(1, uint64(i)))}
				var err error
				if ends[i], err = run(r); err != nil {
					t.Errorf("%s: %v", r.id, err)
				}
			}
		})
	}
	runners.Wait()
	stored, recreated := track.stored(t, name)
	if name == "publish-first" {
		require.Greater(t, len(recreated), races/20, "the compensation wins some")
		require.Less(t, len(recreated), races-races/20, "and the producer others")
	}
	for i, want := range ends {
		id := fmt.Sprintf("%s-%d", name, i)
		got, exists := stored[id]
		got.exists, got.recreated = exists, recreated[id]
		if want.recreated < 0 {
			require.LessOrEqual(t, got.recreated, 1, id)
			want.recreated = got.recreated
		}
		if want.placedAt.IsZero() {
			want.placedAt = got.placedAt
		}
		require.Equal(t, want, got, id)
	}
}

// stored returns the orders whose ids begin with name as they ended, and how often each was made again.
func (track *raceTrack) stored(t *testing.T, name string) (ends map[string]finish, recreated map[string]int) {
	ends, recreated = map[string]finish{}, map[string]int{}
	rows, err := track.store.DB().Reader().Query("SELECT orderId, status, name, placed_at FROM order_info WHERE orderId LIKE ?", name+"-%")
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var id string
		var f finish
		require.NoError(t, rows.Scan(&id, &f.status, &f.name, &f.placedAt))
		require.NotContains(t, ends, id)
		ends[id] = f
	}
	require.NoError(t, rows.Err())
	steps, err := track.store.DB().Reader().Query("SELECT order_id, COUNT(*) FROM history WHERE order_id LIKE ? AND step = 'recreated' GROUP BY order_id", name+"-%")
	require.NoError(t, err)
	defer steps.Close()
	for steps.Next() {
		var id string
		var n int
		require.NoError(t, steps.Scan(&id, &n))
		recreated[id] = n
	}
	require.NoError(t, steps.Err())
	return ends, recreated
}

// pause lets a random short time pass.
func (r *race) pause() { time.Sleep(time.Duration(r.chaos.IntN(3000)) * time.Microsecond) }

func (r *race) placing() app.PlaceOrder {
	id, _ := order.ParseID(r.id)
	money, _ := domain.NewMoney(2850, "CNY")
	cmd := app.PlaceOrder{ID: id, Name: "Mapo tofu", Money: money}
	if r.chaos.IntN(2) == 0 {
		cmd.Request = &app.Request{Key: r.id, Fingerprint: sha256.Sum256([]byte(r.id)), Answer: func(order.Snapshot) ([]byte, error) { return []byte("{}"), nil }}
	}
	return cmd
}

// announced places the order in the legacy way: announced gets its event while the transaction is open and its row
// inserted, and the transaction ends as fail says when announced returns.
func (r *race) announced(announced func(event.OrderPlaced), fail bool) (app.Placement, error) {
	orders := app.NewOrders(r.store)
	var once sync.Once // a transaction that runs again announces again
	orders.PublishBeforeCommit(app.LegacyPublishing{
		Publish: func(_ context.Context, e event.Event) error {
			once.Do(func() { announced(e.(event.OrderPlaced)) })
			return nil
		},
		Fail: func() bool { return fail },
	})
	return orders.Place(context.Background(), r.placing())
}

// hears gives the event to the compensation as its consumer does, until it is settled.
func (r *race) hears(e event.Event) error {
	consumer := map[string]string{"order.placed": "compensation.recreate-order", "order.cancelled": "compensation.recreate-cancelled-order"}[e.Key()]
	ctx := app.WithDelivery(context.Background(), app.Delivery{Consumer: consumer, EventID: newEventID(), OrderID: r.id})
	for {
		var err error
		switch e := e.(type) {
		case event.OrderPlaced:
			err = r.compensation.Recreate(ctx, e)
		case event.OrderCancelled:
			err = r.compensation.RecreateCancelled(ctx, e)
		}
		if kind := domain.KindOf(err); kind != domain.Busy && kind != domain.Unavailable {
			return err
		}
	}
}

// heardDuring lets the compensation hear of the order while the order's transaction is open.
func (r *race) heardDuring(fail bool) (event.OrderPlaced, error) {
	var heard sync.WaitGroup
	var placed event.OrderPlaced
	var compensated error
	_, err := r.announced(func(e event.OrderPlaced) {
		placed = e
		heard.Go(func() { compensated = r.hears(e) })
		r.pause()
	}, fail)
	heard.Wait()
	if err != nil && domain.KindOf(err) != domain.Unavailable {
		return placed, err
	}
	if (err != nil) != fail {
		return placed, fmt.Errorf("placing ended with %w", err)
	}
	return placed, compensated
}

// as returns the finish of an order with that status that is stored as it was announced.
func as(e event.OrderPlaced, status string, recreated int) finish {
	return finish{exists: true, status: status, name: e.Name, placedAt: e.PlacedAt, recreated: recreated}
}

func (r *race) commit() (finish, error) {
	e, err := r.heardDuring(false)
	return as(e, "placed", 0), err
}

func (r *race) rollback() (finish, error) {
	e, err := r.heardDuring(true)
	return as(e, "placed", 1), err
}

// cancel cancels the order as soon as it is stored, and the compensation hears of all that in any order.
func (r *race) cancel() (finish, error) {
	var heard sync.WaitGroup
	var placed event.OrderPlaced
	errs := make([]error, 3)
	p, err := r.announced(func(e event.OrderPlaced) {
		placed = e
		heard.Go(func() {
			r.pause()
			r.pause()
			errs[0] = r.hears(e)
		})
	}, false)
	if err != nil {
		return finish{}, err
	}
	cancelled, err := r.orders.Cancel(context.Background(), p.Order.ID, "changed my mind")
	heard.Go(func() {
		errs[1] = r.hears(event.OrderCancelled{Order: placed.Order, Reason: cancelled.CancelReason, CancelledAt: cancelled.CancelledAt})
	})
	heard.Go(func() { errs[2] = r.hears(placed) })
	heard.Wait()
	for _, e := range errs {
		if err == nil {
			err = e
		}
	}
	return as(placed, "cancelled", 0), err
}

// publishFirst announces the order before its transaction begins, so that the compensation may win.
func (r *race) publishFirst() (finish, error) {
	e := event.OrderPlaced{Order: event.Order{
		OrderID: r.id, Name: "Mapo tofu", Amount: 2850, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now(),
	}}
	// Who begins, and by how much: anything between microseconds and a quarter of a second, however fast the machine is.
	wait := time.Duration(math.Exp2(18*r.chaos.Float64())) * time.Microsecond
	if r.chaos.IntN(2) == 0 {
		wait = -wait
	}
	var heard sync.WaitGroup
	var compensated error
	heard.Go(func() {
		time.Sleep(max(wait, 0))
		compensated = r.hears(e)
	})
	cmd := r.placing()
	time.Sleep(max(-wait, 0))
	placed, err := r.orders.Place(context.Background(), cmd)
	heard.Wait()
	if err == nil {
		err = compensated
	}
	if err == nil && (placed.Order.ID.String() != r.id || placed.Order.Money.Amount() != 2850) {
		err = fmt.Errorf("the producer was answered %+v", placed.Order)
	}
	return finish{exists: true, status: "placed", name: e.Name, recreated: -1}, err
}

// crash breaks the producer's connection between its INSERT and its COMMIT.
func (r *race) crash() (finish, error) {
	ctx := context.Background()
	e := event.OrderPlaced{Order: event.Order{
		OrderID: r.id, Name: "Mapo tofu", Amount: 2850, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now().UTC().Truncate(time.Microsecond),
	}}
	conn, err := r.store.DB().Writer().Conn(ctx)
	if err != nil {
		return finish{}, err
	}
	defer conn.Close()
	var session int64
	if err := conn.QueryRowContext(ctx, "SELECT CONNECTION_ID()").Scan(&session); err != nil {
		return finish{}, err
	}
	tx, err := conn.BeginTx(ctx, &sql.TxOptions{})
	if err != nil {
		return finish{}, err
	}
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(ctx, "INSERT INTO order_info (orderId, name, order_money, currency, status, version, placed_at) VALUES (?, ?, ?, ?, 'placed', 1, ?)",
		e.OrderID, e.Name, e.Amount, e.Currency, e.PlacedAt)
	if err != nil {
		return finish{}, err
	}
	var heard sync.WaitGroup
	var compensated error
	heard.Go(func() { compensated = r.hears(e) })
	r.pause()
	if _, err := r.store.DB().Writer().ExecContext(ctx, "KILL "+strconv.FormatInt(session, 10)); err != nil {
		return finish{}, err
	}
	heard.Wait()
	return as(e, "placed", 1), compensated
}

// reject lets a second request ask for something else under the same id while the first one's transaction is open, or
// for something that cannot be: it is refused, and not announced. Nor is an event believed that names another amount.
func (r *race) reject() (finish, error) {
	if r.chaos.IntN(2) == 0 {
		cmd := r.placing()
		cmd.Name = strings.Repeat("x", 31)
		_, err := r.orders.Place(context.Background(), cmd)
		if domain.KindOf(err) != domain.Invalid {
			return finish{}, fmt.Errorf("a name that is too long: %w", err)
		}
		return finish{}, nil
	}
	other := r.placing()
	other.Name, other.Request = "something else", nil
	var others sync.WaitGroup
	var refused, compensated, contradicted error
	var placed event.OrderPlaced
	_, err := r.announced(func(e event.OrderPlaced) {
		placed = e
		others.Go(func() { _, refused = r.orders.Place(context.Background(), other) })
		others.Go(func() { compensated = r.hears(e) })
		wrong := e
		wrong.Amount++
		others.Go(func() { contradicted = r.hears(wrong) })
		r.pause()
	}, false)
	others.Wait()
	if err == nil && domain.KindOf(refused) != domain.Conflict {
		err = fmt.Errorf("the second request ended with %w", refused)
	}
	if err == nil && domain.KindOf(contradicted) != domain.Invalid {
		err = fmt.Errorf("an event with another amount ended with %w", contradicted)
	}
	if err == nil {
		err = compensated
	}
	return as(placed, "placed", 0), err
}
