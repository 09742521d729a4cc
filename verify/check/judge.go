package check

import (
	"context"
	"fmt"
	"strings"

	"takeout/verify/history"
)

// verdict is what a rule says of an order that breaks it; nil if it does not.
type verdict struct {
	invariant, class string
	text             tell
}

func breaks(invariant, class, format string, args ...any) *verdict {
	return &verdict{invariant, class, says(format, args...)}
}

// over is the verdict that there is nothing more to say about an order.
var over = &verdict{}

// order is what the rules look at: one order with all that is known of it.
type order struct {
	*record
	*checker
	i    int32
	seen history.Seen
	more *more // nil for most
}

// rules are what must hold for every order, the gravest first. Only the first that is broken is reported: what follows
// from it is broken too.
var rules = []func(order) *verdict{
	existence, identity, contest, uniqueness, effects, values, cancellation, delivery,
	underWay, conservation, repair, dispatch, payment, points, announcements, fold, answers,
}

// judgeAll applies the rules to every order.
func (c *checker) judgeAll(ctx context.Context) error {
	for i := range c.records {
		if i%pageRows == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		o := order{record: &c.records[i], checker: c, i: int32(i), more: c.more[int32(i)]}
		if i < c.in.Plan.Orders {
			o.seen = c.in.History.Of(i)
			o.count()
		}
		for _, rule := range rules {
			if v := rule(o); v != nil {
				if v != over {
					c.addTo(o.i, *v)
				}
				break
			}
		}
	}
	for id := range c.invited {
		if i, known := c.find(id); !known || !c.records[i].stored() {
			c.add("I12", "lost", id, -1, says("a foreign message announced the order, so it must be made again in order_info; it is not there"))
		}
	}
	return nil
}

// count counts what the clients were answered.
func (o order) count() {
	switch o.seen.Place {
	case history.OK:
		o.report.Acknowledged++
	case history.Unknown:
		o.report.Unknown++
		if o.stored() {
			o.report.Recovered++
		}
	case history.Refused:
		o.report.Refused++
	case history.NotAsked:
		o.report.NotAsked++
	}
}

// existence: what was acknowledged is stored, and nothing is that was not asked for.
func existence(o order) *verdict {
	switch {
	case o.has(twin):
		return breaks("I1", "duplicated", "order_info has a second row of the same order; there must be one")
	case o.has(stranger):
		return breaks("I7", "unexpected", "order_info has an order that nobody asked for")
	case o.has(invited):
		if o.more == nil || o.more.recreated == 0 {
			return breaks("I12", "unexpected", "order_info has the order, which only a foreign message announced, and no step recreated in the history of the order database")
		}
		if o.more.recreated > 1 {
			return breaks("I12", "duplicated", "the order was made again %d times", o.more.recreated)
		}
	case o.stored() && o.seen.Place == history.Refused:
		return breaks("I7", "unexpected", "the client was told that the order is refused; order_info has it, %s", o.order)
	case o.stored() && o.seen.Place == history.NotAsked:
		return breaks("I7", "unexpected", "order_info has the order before anybody placed it")
	case !o.stored() && o.seen.Place == history.OK:
		return breaks("I1", "lost", "the client was told that the order is placed; order_info does not have it")
	case !o.stored() && o.id != 0:
		return breaks("I2", "orphan", "order_info does not have the order; dispatch %s, payment %s, points %d, announced: %s",
			o.platoon, o.payment, o.awarded+o.revoked, o.announcedKeys())
	case !o.stored():
		return over
	}
	return nil
}

// identity: a client was told one id, that of the order.
func identity(o order) *verdict {
	switch {
	case o.seen.Wrong:
		return breaks("I6", "duplicated", "an answer contradicts one before, or is not what was asked for")
	case o.seen.ID != 0 && o.seen.ID != o.id:
		return breaks("I6", "duplicated", "the client was told another id than the one in order_info")
	}
	return nil
}

// uniqueness: each table has the order once.
func uniqueness(o order) *verdict {
	for _, table := range []struct {
		flag flags
		name string
	}{{twoDispatches, "platoon"}, {twoPayments, "payment"}, {twoCharges, "simulated_charge"}, {twoEntries, "points_entry"}} {
		if o.has(table.flag) {
			return breaks("I3", "duplicated", "%s has more than one row of the order, and must have one of each kind", table.name)
		}
	}
	return nil
}

// effects: whatever is announced happened once. The log of announcements has no unique key that could hide a second time.
func effects(o order) *verdict {
	if o.more == nil {
		return nil
	}
	var times [len(o.events)]int
	for _, event := range o.more.extra {
		times[o.extra[event].key]++
	}
	for k, n := range times {
		if explained := o.more.again[announcer(o.keys[k])]; n > explained {
			return breaks("I3", "duplicated", "%s happened %d times; the history of the %s database explains %d of them as repetitions",
				o.keys[k], n+1, announcer(o.keys[k]), explained)
		}
	}
	return nil
}

// values: name, amount, currency and time are the same in every table, and those that the client sent.
func values(o order) *verdict {
	var tables []string
	for _, t := range []struct {
		flag           flags
		service, table string
	}{
		{orderDiffers, "order", "order_info"}, {dispatchDiffers, "dispatch", "platoon"}, {paymentDiffers, "payment", "payment"},
		{booksDiffer, "payment", "simulated_charge"}, {pointsDiffer, "points", "points_entry"},
	} {
		if o.has(t.flag) {
			tables = append(tables, t.table)
		}
	}
	if tables == nil {
		return nil
	}
	return &verdict{"I16", "mismatch", func() string {
		asked := "what order_info says"
		if int(o.i) < o.in.Plan.Orders {
			p := o.in.Plan.Order(int(o.i))
			asked = fmt.Sprintf("%q, %d %s, as the client sent, and the placed_at of order_info", p.Name, p.Amount, p.Currency)
		}
		return fmt.Sprintf("all tables must say %s; %s does not: %s", asked, strings.Join(tables, " and "), o.rows())
	}}
}

// cancellation: a cancelled order stays so, and is cancelled for a reason.
func cancellation(o order) *verdict {
	switch {
	case o.seen.Cancel == history.OK && !o.is(cancelled):
		return breaks("I5", "resurrected", "the client was told that the order is cancelled; order_info says %s", o.order)
	case o.announced(o.key["order.cancelled"]) && !o.is(cancelled):
		return breaks("I5", "resurrected", "order.cancelled was announced; order_info says %s", o.order)
	case !o.is(cancelled):
		return nil
	case (o.platoon == assigned || o.platoon == waiting) && o.handled("dispatch.release-courier"):
		return breaks("I5", "resurrected", "order_info says cancelled and dispatch.release-courier has marked that as handled; platoon says %s", o.platoon)
	case o.reason == byCustomer && o.seen.Cancel != history.OK && o.seen.Cancel != history.Unknown && !o.has(invited):
		return breaks("I7", "unexpected", "order_info says that the customer cancelled; %s", asked(o.seen.Cancel))
	}
	return nil
}

func asked(a history.Answer) string {
	if a == history.Refused {
		return "the client was told that this is refused"
	}
	return "nobody asked for it"
}

// delivery: an order is delivered if the courier was heard, and only then.
func delivery(o order) *verdict {
	switch {
	case o.seen.Deliver == history.OK && o.platoon != delivered:
		return breaks("I1", "lost", "the client was told that the order is delivered; platoon says %s", o.platoon)
	case o.platoon == delivered && o.seen.Deliver != history.OK && o.seen.Deliver != history.Unknown && !o.has(invited):
		return breaks("I7", "unexpected", "platoon says delivered; %s", asked(o.seen.Deliver))
	}
	return nil
}

// underWay: where something about the order is stuck or was given up, which was reported, more may be missing.
func underWay(o order) *verdict {
	if o.has(pending) {
		return over
	}
	return nil
}

// conservation: each event was handled by each consumer that is bound to it, or is kept by it.
func conservation(o order) *verdict {
	for k, event := range o.events {
		if event == 0 {
			continue
		}
		if v := o.conserved(k, event, o.marked); v != nil {
			return v
		}
	}
	if o.more == nil {
		return nil
	}
	for _, event := range o.more.extra {
		e := o.extra[event]
		if v := o.conserved(e.key, event, e.marked); v != nil {
			return v
		}
	}
	return nil
}

// conserved checks one event, of that key, which the inboxes of the marked routes have.
func (o order) conserved(key int, event uint64, marked uint16) *verdict {
	for _, i := range o.bound[key] {
		queue, bit := o.routes[i].Queue, uint16(1)<<i
		switch {
		case marked&bit != 0, o.aside[messageOf(queue, event)], o.leavesNothing(queue):
			continue
		case o.absorbs(queue, bit):
			o.report.Absorbed++
			continue
		case o.in.Destroyed:
			o.report.Destroyed++
			continue
		}
		return &verdict{"I8", "lost", func() string {
			return fmt.Sprintf("%s, event %s, was confirmed by the broker, and %s neither handled nor kept it", o.keys[key], o.eventID(key, event), queue)
		}}
	}
	return nil
}

// leavesNothing reports whether the consumer handles an event without a trace in its inbox: because there is nothing to
// make again, or because it leaves the order to another consumer.
func (o order) leavesNothing(queue string) bool {
	switch queue {
	case "compensation.recreate-order", "compensation.recreate-cancelled-order":
		return true
	case "dispatch.assign-courier":
		return o.in.AfterPayment
	case "dispatch.assign-courier-when-paid":
		return !o.in.AfterPayment
	}
	return false
}

// absorbs reports whether the consumer changes nothing on an event because it did the same on another one: on the same
// announcement under another id, or on the end of the order that came first.
func (o order) absorbs(queue string, bit uint16) bool {
	again := o.any&bit != 0
	switch queue {
	case "dispatch.assign-courier", "dispatch.assign-courier-when-paid":
		return again || o.platoon == released && !o.has(sent) && o.handled("dispatch.release-courier")
	case "payment.charge-order":
		return again || o.payment == void && o.handled("payment.refund-order")
	case "points.award-points":
		return again || o.has(revoke) && o.awarded == 0 && o.handled("points.revoke-points")
	case "points.revoke-points":
		return again
	}
	return false
}

// handled reports whether the consumer's inbox has an event about the order.
func (o order) handled(queue string) bool { return o.any&(1<<o.route[queue]) != 0 }

// repair: what is repaired was broken, which it must not be unless queues were destroyed.
func repair(o order) *verdict {
	switch {
	case o.has(unresolved):
		return breaks("I1", "unresolved", "reconciliation found %s", o.more.class)
	case o.in.Destroyed || o.has(invited):
		return nil
	case o.has(repaired):
		return breaks("I8", "repaired", "something was repaired, and nothing can have been broken: %s", o.more.step)
	case o.has(found):
		return breaks("I8", "repaired", "reconciliation found %s, and nothing can have been broken", o.more.class)
	}
	return nil
}

// pairs are the states of order and dispatch that agree.
var pairs = map[[2]state]bool{
	{placed, waiting}: true, {dispatched, assigned}: true, {delivered, delivered}: true,
	{cancelled, released}: true, {cancelled, impossible}: true, {cancelled, delivered}: true, // the courier was faster
}

// dispatch: every order has one dispatch, which agrees with it.
func dispatch(o order) *verdict {
	switch {
	case o.platoon == none && o.handled(o.assigning()):
		return breaks("I1", "lost", "platoon does not have the order, which is %s; %s has marked it as handled", o.order, o.assigning())
	case o.platoon == none:
		return breaks("I1", "lost", "platoon does not have the order, which is %s", o.order)
	case !pairs[[2]state{o.order, o.platoon}]:
		return breaks("I1", "mismatch", "order_info says %s, and platoon %s", o.order, o.platoon)
	case o.has(courierDiffers):
		return &verdict{"I1", "mismatch", func() string { return "order_info and platoon must name the same courier and times; " + o.rows() }}
	case o.platoon == waiting && o.room:
		return breaks("I4", "stuck", "the order waits for a courier, and one on duty has room")
	}
	return nil
}

func (o order) assigning() string {
	if o.in.AfterPayment {
		return "dispatch.assign-courier-when-paid"
	}
	return "dispatch.assign-courier"
}

// payment: every order has one payment, which agrees with it and with the gateway's books.
func payment(o order) *verdict {
	switch {
	case o.payment == none && o.handled("payment.charge-order"):
		return breaks("I1", "lost", "there is no payment of the order, which is %s; payment.charge-order has marked it as handled", o.order)
	case o.payment == none:
		return breaks("I1", "lost", "there is no payment of the order, which is %s", o.order)
	case o.payment == charging:
		return breaks("I4", "stuck", "the payment is still being charged")
	case o.is(cancelled) && o.payment == succeeded:
		return breaks("I1", "mismatch", "the order is cancelled, and its payment is not paid back")
	case !o.is(cancelled) && o.payment != succeeded && !(o.is(delivered) && o.payment == refused):
		return breaks("I1", "mismatch", "the order is %s, and its payment %s", o.order, o.payment)
	case o.held() != (o.payment == succeeded):
		return breaks("I1", "mismatch", "the payment is %s; the gateway's books: %s", o.payment, o.books())
	case o.payment == refunded && !o.has(charged):
		return breaks("I1", "mismatch", "the payment is refunded; the gateway's books: %s", o.books())
	}
	return nil
}

func (o order) books() string {
	switch {
	case !o.has(inBooks):
		return "no line"
	case o.held():
		return "charged"
	case o.has(charged):
		return "charged and given back"
	}
	return "not charged"
}

// points: what is paid earns points, and what is paid back none.
func points(o order) *verdict {
	earned := int64(0)
	if o.payment == succeeded {
		earned = o.earns()
	}
	switch {
	case o.payment == succeeded && !o.has(award) && earned == 0 && o.in.Destroyed: // an award of nothing is missed by nobody
		return nil
	case o.payment == succeeded && !o.has(award):
		return breaks("I1", "lost", "the payment succeeded, and points_entry has no award; it must be of %d", earned)
	case o.payment == refunded && !o.has(revoke):
		return breaks("I1", "lost", "the payment is refunded, and points_entry has no revoke")
	case o.payment != succeeded && o.payment != refunded && o.has(award|revoke), o.payment == succeeded && o.has(revoke):
		return breaks("I1", "mismatch", "the payment is %s, and points_entry has an award of %d and a revoke of %d", o.payment, o.awarded, o.revoked)
	case o.awarded+o.revoked != earned, o.awarded != 0 && o.awarded != o.earns():
		return breaks("I16", "mismatch", "the payment is %s and earns %d; points_entry has an award of %d and a revoke of %d", o.payment, earned, o.awarded, o.revoked)
	case !o.is(cancelled) && o.points != earned, o.is(cancelled) && o.points != 0:
		return breaks("I16", "mismatch", "the order is %s and its payment %s, so it earns %d points; order_info says %d", o.order, o.payment, earned, o.points)
	}
	return nil
}

// announcements: what happened is announced, and only that. What was repaired may have happened elsewhere.
func announcements(o order) *verdict {
	if o.has(repaired) {
		return nil
	}
	for _, a := range []struct {
		key      string
		happened bool
	}{
		{"order.placed", true},
		{"order.cancelled", o.is(cancelled)},
		{"dispatch.assigned", o.has(sent)},
		{"dispatch.delivered", o.platoon == delivered},
		{"dispatch.impossible", o.platoon == impossible},
		{"payment.succeeded", o.payment == succeeded || o.payment == refunded},
		{"payment.refused", o.payment == refused},
		{"payment.refunded", o.payment == refunded},
		{"points.awarded", o.has(award) && (o.awarded != 0 || !o.has(revoke))},
	} {
		announced := o.announced(o.key[a.key])
		switch {
		case a.happened && !announced:
			return breaks("I8", "lost", "%s happened, and neither outbox nor outbox_confirmed of the %s database has the event", a.key, announcer(a.key))
		case announced && !a.happened && !(a.key == "points.awarded" && o.has(award)):
			return breaks("I8", "unexpected", "%s was announced and did not happen: order %s, dispatch %s, payment %s", a.key, o.order, o.platoon, o.payment)
		}
	}
	return nil
}

// fold: what order_info says is what its changes add up to, in whatever order they came.
func fold(o order) *verdict {
	want := map[state]int64{placed: 1, dispatched: 2, delivered: 3, cancelled: 2}[o.order]
	if o.is(cancelled) && o.has(hasCourier) {
		want = 3
	}
	early := o.is(delivered) && o.version == 2 // the delivery was heard of before the assignment
	switch {
	case o.version != want && !early && !(o.version > want && o.has(repaired)):
		return breaks("I11", "mismatch", "an order that is %s after these changes has version %d; order_info says %d", o.order, want, o.version)
	case !o.is(cancelled) && o.has(hasCourier) == o.is(placed), o.has(timesWrong):
		return &verdict{"I11", "mismatch", func() string { return "courier and times must fit the status; " + o.rows() }}
	case o.reason == noCourier && o.platoon != impossible, o.reason == notPaid && o.payment != refused, o.reason == cancelWasLost && !o.has(repaired):
		return &verdict{"I11", "mismatch", func() string { return "the reason of the cancellation must be what happened; " + o.rows() }}
	case o.has(newer):
		return &verdict{"I11", "mismatch", func() string { return "a service was told a version that order_info does not have; " + o.rows() }}
	}
	return nil
}

// answers: a request with an Idempotency-Key that was acknowledged has its answer stored.
func answers(o order) *verdict {
	if o.seen.Place == history.OK && !o.has(answered) {
		if key := o.in.Plan.Order(int(o.i)).Key; key != "" {
			return breaks("I6", "lost", "the request was acknowledged under the key %q, and idempotency_answer does not have it", key)
		}
	}
	return nil
}

// announcedKeys lists what was announced about the order.
func (o order) announcedKeys() string {
	var keys []string
	for k, key := range o.keys {
		if o.announced(k) {
			keys = append(keys, key)
		}
	}
	return strings.Join(keys, ", ")
}

// rows describes what all tables have of the order.
func (o order) rows() string {
	id := o.orderID(o.i)
	var all []string
	for _, t := range [][2]string{{"order", "order_info"}, {"dispatch", "platoon"}, {"payment", "payment"}, {"payment", "simulated_charge"}, {"points", "points_entry"}} {
		all = append(all, t[1]+": "+o.describe(t[0], t[1], id))
	}
	return strings.Join(all, " | ")
}
