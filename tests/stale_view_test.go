package tests

import (
	"bufio"
	"context"
	"crypto/sha256"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/points"
	"takeout/tests/testenv"
)

// staleViews stands between the program and MySQL, and has each transaction see what was committed before it began: only
// statements that lock what they read see more.
type staleViews struct {
	mu        sync.Mutex
	meanwhile func()
}

// inStaleViews returns a service's store in a database of its own where views are stale.
func inStaleViews[T any](t testing.TB, open opener[T]) (*sqlstore.Store[T], *staleViews) {
	t.Helper()
	v := &staleViews{}
	// Closing the store ends those who are served.
	return openStore(t, inBetween(t, testenv.MySQL(t), v.serve, func() {}), open), v
}

// once has f run when the next transaction has begun, and before it does anything.
func (v *staleViews) once(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.meanwhile = f
}

func (v *staleViews) begun() {
	v.mu.Lock()
	f := v.meanwhile
	v.meanwhile = nil
	v.mu.Unlock()
	if f != nil {
		f()
	}
}

func (v *staleViews) serve(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	var answering sync.WaitGroup
	answering.Go(func() { _, _ = io.Copy(client, server) })
	defer answering.Wait()
	defer server.Close()
	instead := map[string]string{
		// MySQL, MariaDB, and MariaDB from 11.6.2 on, which would refuse to lock what has changed since the view was opened.
		"SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED": "SET /*!80000 transaction_isolation = 'REPEATABLE-READ' */ " +
			"/*M!100000 tx_isolation = 'REPEATABLE-READ' */ /*M!110602 , innodb_snapshot_isolation = OFF */",
		"START TRANSACTION": "START TRANSACTION WITH CONSISTENT SNAPSHOT",
	}
	begins := false // the statement before was START TRANSACTION, and has been answered when the next one comes
	packets := bufio.NewReader(client)
	for {
		packet, err := packetOf(packets)
		if err != nil {
			return
		}
		if begins {
			v.begun()
		}
		begins = false
		if statement, is := statementOf(packet); is && instead[statement] != "" {
			begins = statement == "START TRANSACTION"
			packet = append(packet[:5], instead[statement]...)
			packet[0] = byte(len(packet) - 4)
		}
		if _, err := server.Write(packet); err != nil {
			return
		}
	}
}

// InnoDB may refuse a key because of a row that a plain SELECT does not see yet: while a transaction is being committed,
// whoever asks for its locks is told that it is over, and a view that is opened then still leaves it out (MariaDB 10.11,
// trx_t::commit_in_memory). A view that is older makes this moment last.
func TestWhoIsToldThatAKeyIsTakenFindsByWhat(t *testing.T) {
	t.Parallel()
	ctx := context.Background()

	t.Run("order", func(t *testing.T) {
		store, stale := inStaleViews(t, sqlstore.OpenOrders)
		orders := app.NewOrders(store)
		place := func(key, id, name string) (app.Placement, error) {
			money, err := domain.NewMoney(2850, "CNY")
			require.NoError(t, err)
			cmd := app.PlaceOrder{ID: orderID(t, id), Name: name, Money: money}
			if key != "" {
				cmd.Request = &app.Request{Key: key, Fingerprint: sha256.Sum256([]byte(id)), Answer: func(order.Snapshot) ([]byte, error) { return []byte("{}"), nil }}
			}
			return orders.Place(ctx, cmd)
		}
		for _, key := range []string{"", "k"} {
			id := "o" + key
			stale.once(func() {
				p, err := place(key, id, "Mapo tofu")
				require.NoError(t, err)
				require.False(t, p.Before)
			})
			p, err := place(key, id, "Mapo tofu")
			require.NoError(t, err)
			require.True(t, p.Before)
			require.Equal(t, id, p.Order.ID.String())
		}
		stale.once(func() {
			_, err := place("", "o2", "Mapo tofu")
			require.NoError(t, err)
		})
		_, err := place("", "o2", "something else")
		require.Equal(t, domain.Conflict, domain.KindOf(err), "%v", err)
	})

	t.Run("delivery", func(t *testing.T) {
		store, stale := inStaleViews(t, sqlstore.OpenOrders)
		handle := func(body string) error {
			return store.InTx(app.WithDelivery(ctx, delivery("evt_1", body)), func(context.Context, app.OrderTx) error { return nil })
		}
		stale.once(func() { require.NoError(t, handle("body")) })
		require.ErrorIs(t, handle("body"), app.ErrDuplicate)
	})

	t.Run("dispatch", func(t *testing.T) {
		store, stale := inStaleViews(t, sqlstore.OpenDispatches)
		dispatches := app.NewDispatches(store, app.DispatchPolicy{})
		placed := facts("o1", order.Placed, 1)
		stale.once(func() { require.NoError(t, dispatches.Assign(ctx, placed)) })
		require.ErrorIs(t, dispatches.Assign(ctx, placed), app.ErrDuplicate)
	})

	t.Run("payment", func(t *testing.T) {
		store, stale := inStaleViews(t, openPayments)
		fine := func(string) error { return nil }
		payments := app.NewPayments(store, &faltering{before: fine, after: fine, held: map[string]bool{}})
		placed := event.OrderPlaced{Order: facts("o1", order.Placed, 1)}
		stale.once(func() { require.NoError(t, payments.Charge(ctx, placed)) })
		require.ErrorIs(t, payments.Charge(ctx, placed), app.ErrDuplicate)
	})

	t.Run("points", func(t *testing.T) {
		store, stale := inStaleViews(t, sqlstore.OpenPoints)
		service, paid := app.NewPoints(store), facts("o1", order.Placed, 1)
		stale.once(func() { require.NoError(t, service.Award(ctx, event.PaymentSucceeded{Order: paid})) })
		require.NoError(t, service.Revoke(ctx, event.PaymentRefunded{Order: paid}))
		entries, err := service.Entries(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.Len(t, entries, 2)
		require.NotZero(t, entries[0].Points)
		require.Zero(t, points.Sum(entries), "what was earned is taken back")
	})
}
