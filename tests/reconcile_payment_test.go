package tests

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/app/reconcile"
	"takeout/service"
)

// paid places an order, waits until it is dispatched, paid and has its points, and makes it one of an hour ago.
func (s *system) paid(t testing.TB, name string) string {
	t.Helper()
	id := s.place(t, name, 2850)
	s.awaitDispatched(t, id)
	eventually(t, "the order has its points", func() error {
		if n := count(t, s.points, "SELECT COUNT(*) FROM points_entry WHERE orderId = ?", id); n != 1 {
			return fmt.Errorf("%d entries", n)
		}
		return nil
	})
	s.age(t, id)
	at := s.get(t, id).PlacedAt
	alter(t, s.payment, "UPDATE payment SET placed_at = ?, decided_at = ? WHERE orderId = ?", at, at, id)
	alter(t, s.points, "UPDATE points_entry SET placed_at = ?, at = ? WHERE orderId = ?", at, at, id)
	return id
}

// payingSinceYesterday starts a system as reconciled does, whose payments and points cover the orders that paid makes.
func payingSinceYesterday(t testing.TB, st stack) *system {
	t.Helper()
	s := reconciled(t, st, func(cfg *service.Config) { cfg.PaymentGateway = "simulated" })
	yesterday := time.Now().UTC().Add(-24 * time.Hour)
	alter(t, s.payment, "UPDATE owner SET created_at = ?", yesterday)
	alter(t, s.points, "UPDATE owner SET created_at = ?", yesterday)
	return s
}

func TestPaymentsAndPointsThatWereLostComeBack(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := payingSinceYesterday(t, st)
		unpaid, unawarded, unrefunded, unrevoked, unheard, unknown, lost := s.paid(t, "unpaid"), s.paid(t, "unawarded"), s.paid(t, "unrefunded"),
			s.paid(t, "unrevoked"), s.paid(t, "unheard"), s.paid(t, "unknown"), s.paid(t, "lost")
		later := s.place(t, "later", 2850)
		eventually(t, "all agree", func() error {
			if n := count(t, s.points, "SELECT COUNT(*) FROM points_entry WHERE orderId = ?", later); n != 1 {
				return fmt.Errorf("%d entries", n)
			}
			return nil
		})
		require.Empty(t, s.reconcile(t, `{}`).Findings)

		alter(t, s.payment, "DELETE FROM payment WHERE orderId = ?", unpaid)
		alter(t, s.points, "DELETE FROM points_entry WHERE orderId = ?", unawarded)
		for _, id := range []string{unrefunded, unrevoked, unknown} {
			alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE orderId = ?", id)
			alter(t, s.dispatch, "UPDATE platoon SET state = 'released', released_at = placed_at WHERE orderId = ?", id)
		}
		alter(t, s.payment, "UPDATE payment SET state = 'refunded', refunded_at = placed_at WHERE orderId = ?", unrevoked)
		alter(t, s.payment, "UPDATE payment SET state = 'refused', reason = 'no money' WHERE orderId = ?", unheard)
		alter(t, s.points, "DELETE FROM points_entry WHERE orderId = ?", unheard)
		alter(t, s.payment, "DELETE FROM payment WHERE orderId = ?", unknown)
		alter(t, s.points, "DELETE FROM points_entry WHERE orderId = ?", unknown)
		alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", lost)
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", lost)
		found := map[string]string{}
		for _, f := range s.reconcile(t, `{}`).Findings {
			found[f.OrderID] = f.Class
		}
		require.Equal(t, map[string]string{
			unpaid: reconcile.MissingPayment, unawarded: reconcile.MissingPoints, unrefunded: reconcile.PaymentMismatch, unrevoked: reconcile.PointsMismatch,
			unheard: reconcile.PaymentMismatch, unknown: reconcile.MissingPayment, lost: reconcile.OrphanPayment,
		}, found)

		s.awaitReconciled(t)
		for id, state := range map[string]string{unpaid: "succeeded", unawarded: "succeeded", unrefunded: "refunded", unrevoked: "refunded", unheard: "refused", unknown: "void", lost: "succeeded"} {
			require.Equal(t, 1, count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE orderId = ? AND state = ?", id, state), "%s is %s", id, state)
			points := 0
			if state == "succeeded" {
				points = 28
			}
			require.Equal(t, points, count(t, s.points, "SELECT COALESCE(SUM(points), 0) FROM points_entry WHERE orderId = ?", id), "%s is %s", id, state)
		}
		require.Equal(t, "cancelled", s.get(t, unheard).Status)
		require.NotNil(t, s.get(t, lost).Dispatch, "an order that only the payment service knew is dispatched again")
	})
}

func TestFindingEndsWhenItsRepairShowsAlthoughWhatCameOfItWaitsForAPerson(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := payingSinceYesterday(t, st)
		id := s.paid(t, "delivered unpaid")
		alter(t, s.order, "UPDATE order_info SET status = 'delivered', delivered_at = placed_at, points = 0 WHERE orderId = ?", id)
		alter(t, s.dispatch, "UPDATE platoon SET state = 'delivered', delivered_at = placed_at WHERE orderId = ?", id)
		alter(t, s.payment, "DELETE FROM payment WHERE orderId = ?", id)
		alter(t, s.payment, "UPDATE simulated_charge SET charged_at = NULL WHERE orderId = ?", id)
		alter(t, s.points, "DELETE FROM points_entry WHERE orderId = ?", id)
		s.paid(t, "later")

		require.Equal(t, map[string]int{reconcile.MissingPayment: 1}, s.reconcile(t, `{"repair":true}`).Totals)
		eventually(t, "the refusal is kept for a person, because the order is delivered", func() error {
			if n := count(t, s.order, "SELECT COUNT(*) FROM failure WHERE order_id = ? AND state = 'open'", id); n != 1 {
				return fmt.Errorf("%d failures", n)
			}
			return nil
		})
		eventually(t, "the payment is not missing any more", func() error {
			r := s.reconcile(t, `{"repair":true}`)
			if !r.Consistent || r.Failures != 1 {
				return fmt.Errorf("%d failures, and found are %v", r.Failures, r.Findings)
			}
			return nil
		})
	})
}

func TestOrderThatIsPaidAndNotDispatchedIsDispatchedWhereOrdersWaitToBePaid(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) { cfg.PaymentGateway, cfg.DispatchAfter = "simulated", "paid" })
	id := s.paid(t, "x")
	s.later(t)
	require.Empty(t, s.reconcile(t, `{}`).Findings)
	alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", id)
	alter(t, s.order, "UPDATE order_info SET status = 'placed', courier_id = NULL, assigned_at = NULL WHERE orderId = ?", id)
	r := s.reconcile(t, `{"repair":true}`)
	require.Equal(t, map[string]int{reconcile.MissingDispatch: 1}, r.Totals)
	s.awaitDispatched(t, id)
	s.awaitReconciled(t)
}

func TestOrderThatIsPaidIsNotAnnouncedAgainWhileThatItIsPaidWaitsForAPerson(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) { cfg.PaymentGateway, cfg.DispatchAfter = "simulated", "paid" })
	id := s.paid(t, "x")
	s.later(t)
	alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", id)
	s.fails(t, s.dispatch, "dispatch.assign-courier-when-paid", id)
	r := s.reconcile(t, `{"repair":true}`)
	require.Empty(t, r.Findings)
	require.Equal(t, 1, r.Failures)
}

// An installation took no payments at first. What is wrong with an order of that time is its dispatch alone.
func TestOrderFromBeforePaymentsIsNotChargedWhenItsDispatchIsRepaired(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t))
	differs, lost := s.old(t, "differs"), s.old(t, "lost")
	s.stop(t)
	s.cfg.PaymentGateway = "simulated"
	s.start(t)
	s.paid(t, "later")
	s.later(t)
	require.True(t, s.reconcile(t, `{"repair":true}`).Consistent)

	alter(t, s.dispatch, "UPDATE platoon SET name = 'y' WHERE orderId = ?", differs)
	alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", lost)
	s.awaitReconciled(t)
	s.awaitRest(t)
	require.Equal(t, 2, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId IN (?, ?) AND name <> 'y'", differs, lost))
	require.Zero(t, count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE orderId IN (?, ?)", differs, lost))
	require.True(t, s.reconcile(t, `{"repair":true,"full":true}`).Consistent)
}

func TestNameOfAWaitingOrderIsCorrectedWhereOrdersWaitToBePaid(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) {
		cfg.PaymentGateway, cfg.DispatchAfter, cfg.ReconcileGrace = "simulated", "paid", 500*time.Millisecond
	})
	s.nobodyOnDuty(t)
	id := s.place(t, "x", 2850)
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'waiting'", id)
	s.awaitRest(t)
	alter(t, s.dispatch, "UPDATE platoon SET name = 'y' WHERE orderId = ?", id)
	eventually(t, "the name is corrected", func() error {
		r := s.reconcile(t, `{"repair":true}`)
		if n := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND name = 'x'", id); n != 1 {
			return fmt.Errorf("%+v", r.Findings)
		}
		return nil
	})
	s.awaitReconciled(t)
}
