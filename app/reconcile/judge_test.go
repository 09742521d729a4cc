package reconcile

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var placed = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func row(state, courier string) []Record {
	return []Record{{State: state, Name: "x", Amount: 2850, Currency: "CNY", CourierID: courier, PlacedAt: placed}}
}

func TestOrderAndDispatchAgreeOrOneOfThemIsToldOrAPersonDecides(t *testing.T) {
	t.Parallel()
	person := verdict{class: FieldMismatch}
	tellOrder := verdict{FieldMismatch, announceDispatch, awaited{"order", "dispatch.assigned"}}
	tellDelivered := verdict{FieldMismatch, announceDispatch, awaited{"order", "dispatch.delivered"}}
	tellDispatch := verdict{CancelledButActive, announceOrder, awaited{"dispatch", "order.cancelled"}}
	cancel := verdict{class: FieldMismatch, remedy: cancelOrder}
	mayCancel := verdict{FieldMismatch, cancelOrder, awaited{"order", "dispatch.impossible"}}
	want := map[string][5]verdict{
		//            waiting       assigned      delivered  released  impossible
		"placed":     {consistent, tellOrder, tellDelivered, cancel, mayCancel},
		"dispatched": {person, consistent, tellDelivered, cancel, cancel},
		"delivered":  {person, person, consistent, person, person},
		"cancelled":  {tellDispatch, tellDispatch, consistent, consistent, consistent},
		"unheard of": {person, person, person, person, person},
	}
	for status, verdicts := range want {
		for i, state := range []string{"waiting", "assigned", "delivered", "released", "impossible"} {
			require.Equal(t, verdicts[i], judgeDispatch(row(status, "zhao"), row(state, "zhao")), "%s, %s", status, state)
		}
	}
	require.Equal(t, tellOrder, judgeDispatch(row("dispatched", "zhao"), row("assigned", "qian")))
	require.Equal(t, tellDelivered, judgeDispatch(row("delivered", "zhao"), row("delivered", "qian")))
	require.Equal(t, verdict{class: FieldMismatch, awaits: tellOrder.awaits}, judgeDispatch(row("dispatched", "zhao"), row("assigned", "")), "nobody can be told of")
	require.Equal(t, consistent, judgeDispatch(nil, nil))
	require.Equal(t, verdict{class: OrphanDispatch, remedy: restoreFromDispatch}, judgeDispatch(nil, row("waiting", "")))
	require.Equal(t, verdict{MissingDispatch, announceOrder, awaited{"dispatch", "order.placed"}}, judgeDispatch(row("placed", ""), nil))
	require.Equal(t, verdict{MissingDispatch, announceOrder, awaited{"dispatch", "order.cancelled"}}, judgeDispatch(row("cancelled", ""), nil))
	require.Equal(t, verdict{class: Duplicate}, judgeDispatch(append(row("placed", ""), row("placed", "")...), nil))
	require.Equal(t, verdict{class: Duplicate}, judgeDispatch(nil, append(row("waiting", ""), row("waiting", "")...)))
}

func TestAmountThatDiffersIsAPersonsWhateverElseDiffers(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*Record){func(r *Record) { r.Amount++ }, func(r *Record) { r.Currency = "EUR" }} {
		other := row("assigned", "qian")
		change(&other[0])
		require.Equal(t, verdict{class: AmountMismatch}, judgeDispatch(row("placed", ""), other))
		other[0].State = "refunded"
		require.Equal(t, verdict{class: PaymentMismatch}, judgePayment(row("placed", ""), other))
	}
}

func TestNameAndTimeAreTheOrderServices(t *testing.T) {
	t.Parallel()
	for _, change := range []func(*Record){func(r *Record) { r.Name = "y" }, func(r *Record) { r.PlacedAt = placed.Add(time.Microsecond) }} {
		other := row("assigned", "zhao")
		change(&other[0])
		require.Equal(t, verdict{FieldMismatch, correctDispatch, awaited{"dispatch", "order.placed"}}, judgeDispatch(row("dispatched", "zhao"), other))
	}
}

func TestOrderIsPaidUnlessItIsCancelled(t *testing.T) {
	t.Parallel()
	person := verdict{class: PaymentMismatch}
	charge := verdict{MissingPayment, announceOrder, awaited{"payment", "order.placed"}}
	void := verdict{MissingPayment, announceOrder, awaited{"payment", "order.cancelled"}}
	refused := verdict{PaymentMismatch, announcePayment, awaited{"order", "payment.refused"}}
	refund := verdict{PaymentMismatch, announceOrder, awaited{"payment", "order.cancelled"}}
	for status, verdicts := range map[string][6]verdict{
		//            absent charging succeeded refused refunded void
		"placed":     {charge, charge, consistent, refused, person, person},
		"dispatched": {charge, charge, consistent, refused, person, person},
		"delivered":  {charge, charge, consistent, person, person, person},
		"cancelled":  {void, charge, refund, consistent, consistent, consistent},
	} {
		for i, state := range []string{"", "charging", "succeeded", "refused", "refunded", "void"} {
			var payments []Record
			if state != "" {
				payments = row(state, "")
			}
			require.Equal(t, verdicts[i], judgePayment(row(status, ""), payments), "%s, %s", status, state)
		}
	}
	require.Equal(t, verdict{class: DoublePayment}, judgePayment(row("placed", ""), append(row("refused", ""), row("succeeded", "")...)))
	require.Equal(t, verdict{class: OrphanPayment, remedy: restoreFromPayment}, judgePayment(nil, row("succeeded", "")))
	require.Equal(t, consistent, judgePayment(nil, nil))
}

func TestPaymentEarnsWhatTheLedgerSays(t *testing.T) {
	t.Parallel()
	entry := func(kind string, points int64) Record { return Record{State: kind, Points: points, PlacedAt: placed} }
	award, revoke := entry("award", 28), entry("revoke", -28)
	person := verdict{class: PointsMismatch}
	for _, c := range []struct {
		payment string // state, empty for none
		entries []Record
		want    verdict
	}{
		{"succeeded", []Record{award}, consistent},
		{"succeeded", nil, verdict{MissingPoints, announcePayment, awaited{"points", "payment.succeeded"}}},
		{"succeeded", []Record{award, revoke}, person},
		{"succeeded", []Record{entry("award", 29)}, person},
		{"succeeded", []Record{award, award}, verdict{class: DoublePoints}},
		{"refunded", nil, consistent},
		{"refunded", []Record{award, revoke}, consistent},
		{"refunded", []Record{award}, verdict{PointsMismatch, announcePayment, awaited{"points", "payment.refunded"}}},
		{"refunded", []Record{award, revoke, revoke}, verdict{class: DoublePoints}},
		{"refused", nil, consistent},
		{"refused", []Record{award}, person},
		{"", []Record{award}, person},
		{"", nil, consistent},
	} {
		var payments []Record
		if c.payment != "" {
			payments = row(c.payment, "")
		}
		require.Equal(t, c.want, judgePoints(payments, c.entries), "%s %+v", c.payment, c.entries)
	}
	small := row("succeeded", "")
	small[0].Amount = 99
	require.Equal(t, consistent, judgePoints(small, nil), "it earns nothing")
}

func TestOrderThatWaitsToBePaidLacksNoDispatch(t *testing.T) {
	t.Parallel()
	require.Equal(t, consistent, judgeUndispatched(nil))
	require.Equal(t, consistent, judgeUndispatched(row("charging", "")))
	require.Equal(t, verdict{MissingDispatch, announcePayment, awaited{"dispatch", "order.placed"}}, judgeUndispatched(row("succeeded", "")))
}

func TestPointsWithoutAPaymentAreOfALostOrderOrALostPayment(t *testing.T) {
	t.Parallel()
	require.Equal(t, verdict{class: Lost}, judgeUnpaidPoints(nil))
	require.Equal(t, consistent, judgeUnpaidPoints(row("dispatched", "zhao")))
	require.Equal(t, verdict{class: PointsMismatch}, judgeUnpaidPoints(row("cancelled", "")))
}

func TestOrderSaysWhatItEarned(t *testing.T) {
	t.Parallel()
	says := func(status string, points int64) []Record {
		return []Record{{State: status, Points: points, PlacedAt: placed}}
	}
	award, revoke := Record{State: "award", Points: 28}, Record{State: "revoke", Points: -28}
	tell := verdict{UnrecordedPoints, announcePoints, awaited{"order", "points.awarded"}}
	for _, c := range []struct {
		entries, orders []Record
		want            verdict
	}{
		{[]Record{award}, says("dispatched", 28), consistent},
		{[]Record{award}, says("dispatched", 0), tell},
		{[]Record{award}, says("placed", 29), tell},
		{[]Record{award, revoke}, says("placed", 28), tell},
		{[]Record{award, award}, says("placed", 28), consistent},
		{[]Record{award}, says("cancelled", 0), consistent},
		{nil, says("placed", 0), consistent},
		{nil, says("placed", 5), verdict{class: UnrecordedPoints}},
		{[]Record{award}, nil, consistent},
	} {
		require.Equal(t, c.want, judgeRecorded(c.entries, c.orders), "%+v %+v", c.entries, c.orders)
	}
}

func TestPointsThatAPaymentCannotHaveEarnedAreTakenOffTheOrder(t *testing.T) {
	t.Parallel()
	free := row("succeeded", "")
	free[0].Amount = 99
	require.Equal(t, verdict{UnrecordedPoints, announcePayment, awaited{"points", "payment.succeeded"}}, judgeUnearned(free))
	require.Equal(t, consistent, judgeUnearned(row("succeeded", "")), "they are missing in the ledger")
	require.Equal(t, consistent, judgeUnearned(row("refused", "")))
	require.Equal(t, consistent, judgeUnearned(nil))
}
