package reconcile

import (
	"cmp"
	"context"
	"time"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/domain/points"
)

// Classes of findings.
const (
	MissingDispatch    = "missing_dispatch"     // the order has no dispatch
	OrphanDispatch     = "orphan_dispatch"      // the dispatch has no order
	Duplicate          = "duplicate"            // a table has the order twice
	FieldMismatch      = "field_mismatch"       // name, time, courier or progress differ
	AmountMismatch     = "amount_mismatch"      // amount or currency differ
	CancelledButActive = "cancelled_but_active" // a courier is sent for a cancelled order
	MissingPayment     = "missing_payment"      // the order is not charged, or its cancellation is not known
	OrphanPayment      = "orphan_payment"       // the payment has no order
	DoublePayment      = "double_payment"       // the order has two payments
	PaymentMismatch    = "payment_mismatch"     // the payment has another amount, or an end that the order does not have
	MissingPoints      = "missing_points"       // the payment earned none
	DoublePoints       = "double_points"        // entered or taken back twice
	PointsMismatch     = "points_mismatch"      // other points than the payment earned
	Lost               = "lost"                 // it earned points, and no service knows the order
	UnrecordedPoints   = "unrecorded_points"    // the order says other points than are entered
	StuckOutbox        = "stuck_outbox"         // an event is not sent
	StuckRetry         = "stuck_retry"          // an event is not tried again
)

// pairOf says which comparison finds a class.
var pairOf = map[string]Pair{
	MissingDispatch: OrderDispatch, OrphanDispatch: OrderDispatch, Duplicate: OrderDispatch,
	FieldMismatch: OrderDispatch, AmountMismatch: OrderDispatch, CancelledButActive: OrderDispatch,
	MissingPayment: OrderPayment, OrphanPayment: OrderPayment, DoublePayment: OrderPayment, PaymentMismatch: OrderPayment,
	MissingPoints: PaymentPoints, DoublePoints: PaymentPoints, PointsMismatch: PaymentPoints, Lost: PaymentPoints,
	UnrecordedPoints: PointsOrder,
}

// verdict is what two services' rows of one order say together.
type verdict struct {
	class  string  // empty if they are consistent
	remedy *remedy // nil if a person must decide
	awaits awaited // what may only not have been heard yet
}

// awaited is an event that a service has not handled. The zero value is none.
type awaited struct{ service, key string }

func hears(service string, e event.Event) awaited { return awaited{service, e.Key()} }

// remedy is a repair. It goes through an ordinary use case, which is idempotent and leaves a trace in the order's
// history.
type remedy struct {
	text string
	do   func(ctx context.Context, r repairs, id order.ID, why string) error
}

var (
	announceOrder = &remedy{"the order was announced again", func(ctx context.Context, r repairs, id order.ID, why string) error {
		return r.announce(ctx, id, false, why)
	}}
	correctDispatch = &remedy{"the order was announced again as a correction", func(ctx context.Context, r repairs, id order.ID, why string) error {
		return r.announce(ctx, id, true, why)
	}}
	announceDispatch = &remedy{"the dispatch was announced again", func(ctx context.Context, r repairs, id order.ID, why string) error {
		return r.Dispatches.Announce(ctx, id, why)
	}}
	announcePayment = &remedy{"the payment was announced again", func(ctx context.Context, r repairs, id order.ID, why string) error {
		return r.Payments.Announce(ctx, id, why)
	}}
	announcePoints = &remedy{"what the order earned was announced again", func(ctx context.Context, r repairs, id order.ID, why string) error {
		return r.Points.Announce(ctx, id, why)
	}}
	cancelOrder = &remedy{"the order was cancelled, as the dispatch service knows it", func(ctx context.Context, r repairs, id order.ID, why string) error {
		if err := restoreDispatched(ctx, r, id, why); err != nil {
			return err
		}
		return r.announce(ctx, id, false, why) // the payment service may not know it either
	}}
	restoreFromDispatch = &remedy{"the order was stored again from what the dispatch service kept", restoreDispatched}
	restoreFromPayment  = &remedy{"the order was stored again from what the payment service kept", restorePaid}
)

func restoreDispatched(ctx context.Context, r repairs, id order.ID, why string) error {
	d, err := r.Dispatches.Get(ctx, id)
	if err != nil {
		return err
	}
	want, err := order.Place(id, d.Job.Name, d.Job.Money, d.Job.PlacedAt)
	if err != nil {
		return err
	}
	now := time.Now() // a row that a person changed may not say when
	switch d.State {
	case dispatch.Assigned:
		want.MarkDispatched(d.CourierID.String(), d.AssignedAt)
	case dispatch.Delivered:
		want.MarkDelivered(d.CourierID.String(), d.AssignedAt, cmp.Or(d.DeliveredAt, now))
	case dispatch.Released:
		_, err = want.Cancel(order.ReasonCancelWasLost, cmp.Or(d.ReleasedAt, now))
	case dispatch.Impossible:
		_, err = want.Cancel(order.ReasonNoCourier, cmp.Or(d.ReleasedAt, now))
	}
	if err != nil {
		return err
	}
	want.CatchUp(d.Job.Version)
	return r.restore(ctx, want, why)
}

func restorePaid(ctx context.Context, r repairs, id order.ID, why string) error {
	p, err := r.Payments.Get(ctx, id)
	if err != nil {
		return err
	}
	want, err := order.Place(id, p.Bill.Name, p.Bill.Money, p.Bill.PlacedAt)
	if err != nil {
		return err
	}
	now := time.Now() // as in restoreDispatched
	switch p.State {
	case payment.Refused:
		_, err = want.Cancel(order.ReasonNotPaid, cmp.Or(p.DecidedAt, now))
	case payment.Refunded:
		_, err = want.Cancel(order.ReasonCancelWasLost, cmp.Or(p.RefundedAt, now))
	case payment.Void:
		_, err = want.Cancel(order.ReasonCancelWasLost, now)
	}
	if err != nil {
		return err
	}
	want.CatchUp(p.Bill.Version)
	return r.restore(ctx, want, why)
}

// repairs are the ordinary use cases, through which everything is repaired.
type repairs struct {
	app.UseCases
	paymentsSince time.Time // when the payment service began: no repair has an older order charged
}

func (r repairs) announce(ctx context.Context, id order.ID, corrected bool, why string) error {
	return r.Orders.Announce(ctx, id, app.Reannouncement{Corrected: corrected, PaymentsSince: r.paymentsSince}, why)
}

// restore heeds that the compensation has stopped: what must not be made again from announcements must not from tables.
func (r repairs) restore(ctx context.Context, want *order.Order, why string) error {
	if err := r.Compensation.Stopped(); err != nil {
		return err
	}
	_, err := r.Compensation.Restore(ctx, want, why)
	return err
}

var consistent = verdict{}

// judgeDispatch compares an order with its dispatch. The order service decides what was ordered and whether it is
// cancelled, the dispatch service who brings it and whether they did.
func judgeDispatch(orders, dispatches []Record) verdict {
	switch {
	case len(orders) > 1 || len(dispatches) > 1:
		return verdict{class: Duplicate}
	case len(orders) == 0 && len(dispatches) == 0:
		return consistent
	case len(orders) == 0:
		return verdict{class: OrphanDispatch, remedy: restoreFromDispatch}
	case len(dispatches) == 0:
		if orders[0].State == order.Cancelled.String() {
			return verdict{MissingDispatch, announceOrder, hears("dispatch", event.OrderCancelled{})}
		}
		return verdict{MissingDispatch, announceOrder, hears("dispatch", event.OrderPlaced{})}
	}
	o, d := orders[0], dispatches[0]
	if o.Amount != d.Amount || o.Currency != d.Currency {
		return verdict{class: AmountMismatch}
	}
	if v := judgeProgress(o, d); v != consistent {
		return v
	}
	if o.Name != d.Name || !o.PlacedAt.Equal(d.PlacedAt) {
		return verdict{FieldMismatch, correctDispatch, hears("dispatch", event.OrderPlaced{})}
	}
	return consistent
}

// judgeProgress compares how far an order has come. What is not in the table is a contradiction for a person.
func judgeProgress(o, d Record) verdict {
	sameCourier := o.CourierID == d.CourierID
	tell := verdict{FieldMismatch, announceDispatch, hears("order", event.DispatchAssigned{})}
	if d.State == dispatch.Delivered.String() {
		tell.awaits = hears("order", event.DispatchDelivered{})
	}
	if d.CourierID == "" {
		tell.remedy = nil // nobody can be told of
	}
	ended := d.State == dispatch.Released.String() || d.State == dispatch.Impossible.String()
	switch (progress{o.State, d.State}) {
	case progress{"placed", "waiting"}:
		return consistent
	case progress{"placed", "assigned"}, progress{"placed", "delivered"}, progress{"dispatched", "delivered"}:
		return tell
	case progress{"dispatched", "assigned"}, progress{"delivered", "delivered"}:
		if sameCourier {
			return consistent
		}
		return tell
	case progress{"cancelled", "delivered"}: // the courier was faster than the cancellation
		return consistent
	case progress{"cancelled", "waiting"}, progress{"cancelled", "assigned"}:
		return verdict{CancelledButActive, announceOrder, hears("dispatch", event.OrderCancelled{})}
	case progress{"placed", "impossible"}:
		return verdict{FieldMismatch, cancelOrder, hears("order", event.DispatchImpossible{})}
	case progress{"placed", "released"}, progress{"dispatched", "released"}, progress{"dispatched", "impossible"}:
		return verdict{class: FieldMismatch, remedy: cancelOrder}
	}
	if o.State == order.Cancelled.String() && ended {
		return consistent
	}
	return verdict{class: FieldMismatch}
}

type progress struct{ order, dispatch string }

// judgeUndispatched judges an order without a dispatch where orders are dispatched when they are paid.
func judgeUndispatched(payments []Record) verdict {
	if len(payments) == 1 && payments[0].State == payment.Succeeded.String() {
		// Orders are dispatched on one event or on the other, and never on both.
		return verdict{MissingDispatch, announcePayment, hears("dispatch", event.OrderPlaced{})}
	}
	return consistent // the comparison with the payments says what is wrong, if anything is
}

// judgePayment compares an order with its payment.
func judgePayment(orders, payments []Record) verdict {
	switch {
	case len(payments) > 1:
		return verdict{class: DoublePayment}
	case len(orders) > 1 || len(orders) == 0 && len(payments) == 0:
		return consistent // two orders are found where they are compared with dispatches
	case len(orders) == 0:
		return verdict{class: OrphanPayment, remedy: restoreFromPayment}
	}
	cancelled, delivered := orders[0].State == order.Cancelled.String(), orders[0].State == order.Delivered.String()
	if len(payments) == 0 {
		if cancelled { // or a late announcement would have it charged
			return verdict{MissingPayment, announceOrder, hears("payment", event.OrderCancelled{})}
		}
		return verdict{MissingPayment, announceOrder, hears("payment", event.OrderPlaced{})}
	}
	if orders[0].Amount != payments[0].Amount || orders[0].Currency != payments[0].Currency {
		return verdict{class: PaymentMismatch}
	}
	switch payments[0].State {
	case payment.Charging.String():
		return verdict{MissingPayment, announceOrder, hears("payment", event.OrderPlaced{})}
	case payment.Succeeded.String():
		if cancelled {
			return verdict{PaymentMismatch, announceOrder, hears("payment", event.OrderCancelled{})}
		}
		return consistent
	case payment.Refused.String():
		if !cancelled && !delivered {
			return verdict{PaymentMismatch, announcePayment, hears("order", event.PaymentRefused{})}
		}
	}
	if cancelled {
		return consistent
	}
	return verdict{class: PaymentMismatch}
}

// judgePoints compares a payment with what it earned.
func judgePoints(payments, entries []Record) verdict {
	if len(payments) > 1 {
		return consistent // found where they are compared with orders
	}
	sum, double := sumUp(entries)
	if double {
		return verdict{class: DoublePoints}
	}
	var state string
	var earned int64
	if len(payments) == 1 {
		state = payments[0].State
		earned = earns(payments[0])
	}
	switch {
	case state == payment.Succeeded.String() && sum == earned, state != payment.Succeeded.String() && sum == 0:
		return consistent
	case state == payment.Succeeded.String() && len(entries) == 0:
		return verdict{MissingPoints, announcePayment, hears("points", event.PaymentSucceeded{})}
	case state == payment.Refunded.String() && sum == earned:
		return verdict{PointsMismatch, announcePayment, hears("points", event.PaymentRefunded{})}
	}
	return verdict{class: PointsMismatch}
}

// judgeRecorded compares what an order earned with what it says that it did. An order that is cancelled says nothing.
func judgeRecorded(entries, orders []Record) verdict {
	if len(orders) != 1 || orders[0].State == order.Cancelled.String() {
		return consistent // found where orders are compared with dispatches and payments
	}
	sum, double := sumUp(entries)
	switch {
	case double, sum < 0, sum == orders[0].Points:
		return consistent // wrong entries are found where they are compared with payments
	case len(entries) == 0:
		return verdict{class: UnrecordedPoints}
	}
	return verdict{UnrecordedPoints, announcePoints, hears("order", event.PointsAwarded{})}
}

// judgeUnearned judges an order that says points although none are entered. That they are missing, or the payment, is found
// where those are compared.
func judgeUnearned(payments []Record) verdict {
	if len(payments) == 1 && payments[0].State == payment.Succeeded.String() && earns(payments[0]) == 0 {
		return verdict{UnrecordedPoints, announcePayment, hears("points", event.PaymentSucceeded{})}
	}
	return consistent
}

// sumUp returns what the entries come to, and whether two are of the same kind.
func sumUp(entries []Record) (sum int64, double bool) {
	kinds := map[string]int{}
	for _, e := range entries {
		sum += e.Points
		kinds[e.State]++
	}
	return sum, kinds[points.Award.String()] > 1 || kinds[points.Revoke.String()] > 1
}

func earns(r Record) int64 {
	money, err := domain.NewMoney(r.Amount, r.Currency)
	if err != nil {
		return 0
	}
	return points.For(money)
}

// judgeUnpaidPoints judges points that no payment earned.
func judgeUnpaidPoints(orders []Record) verdict {
	switch {
	case len(orders) == 0:
		return verdict{class: Lost}
	case orders[0].State == order.Cancelled.String():
		return verdict{class: PointsMismatch}
	}
	return consistent // the payment is missing, which is found where it is compared with the order
}

// JudgeDispatch returns what reconciliation finds if these are all the rows that the order and the dispatch service have
// of an order and nothing about it is under way: the class, empty if they agree, and the repair, nil if none is due or a
// person must decide.
func JudgeDispatch(orders, dispatches []Record) (class string, repair func(ctx context.Context, u app.UseCases, id order.ID) error) {
	v := judgeDispatch(orders, dispatches)
	if v.remedy == nil {
		return v.class, nil
	}
	return v.class, func(ctx context.Context, u app.UseCases, id order.ID) error {
		return v.remedy.do(ctx, repairs{UseCases: u}, id, "reconciliation found "+v.class)
	}
}
