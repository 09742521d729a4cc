package tests

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"takeout/domain/event"
	"takeout/service"
	"takeout/verify/check"
	"takeout/verify/history"
)

// verified is a system that was asked what a plan says and has settled, and the clients' history of it.
type verified struct {
	*system
	input check.Input
}

const canarySecret, canaryDish = "correct-horse-battery", "PAYLOAD-CANARY"

// verify asks everything that the plan says, lets a stranger send one message of each fate, and waits until the checker
// finds every promise kept. Then the system is stopped.
func verify(t testing.TB, st stack, plan history.Plan) *verified {
	t.Helper()
	s := startWith(t, st, func(cfg *service.Config) {
		cfg.ReconcileEvery, cfg.RetryDelays = 0, []time.Duration{200 * time.Millisecond, time.Second}
	})
	s.addCourier(t, "qian", 1000)
	log := filepath.Join(t.TempDir(), "takeout.log")
	require.NoError(t, os.WriteFile(log, []byte("order placed\n"), 0o600))
	v := &verified{s, check.Input{
		Plan: plan, History: history.New(plan.Orders), RetryDelays: 2, Logs: []string{log}, Canaries: []string{canarySecret, canaryDish},
		Databases: map[string]string{"order": st.order, "dispatch": st.dispatch, "payment": st.payment, "points": st.points},
	}}
	for i := range plan.Orders {
		v.order(t, i)
	}
	for i := range plan.Orders {
		v.finish(t, i)
	}
	v.meddle(t)
	eventually(t, "every promise is kept", func() error {
		r, err := check.Run(t.Context(), v.input, nil)
		if err == nil && !r.OK() {
			err = fmt.Errorf("%v: %v", r.ViolationCount, r.Violations)
		}
		return err
	})
	s.stop(t)
	return v
}

// order places one order of the plan, as often as it says.
func (v *verified) order(t testing.TB, number int) {
	t.Helper()
	o := v.input.Plan.Order(number)
	id, headers := "", []string{}
	if o.ID != "" {
		id = fmt.Sprintf(`"order_id":%q,`, o.ID)
	}
	if o.Key != "" {
		headers = []string{"Idempotency-Key", o.Key}
	}
	for range o.Again + 1 {
		a := mustSend(t, http.MethodPost, v.api+"/v1/orders", fmt.Sprintf(`{%s"name":%q,"amount":%d,"currency":%q}`, id, o.Name, o.Amount, o.Currency), headers...)
		if o.Amount == 0 {
			require.Equal(t, http.StatusUnprocessableEntity, a.status, "%s", a)
			v.input.History.Placed(number, history.Refused, "")
			continue
		}
		require.Less(t, a.status, 300, "%s", a)
		v.input.History.Placed(number, history.OK, a.order(t).OrderID)
	}
}

// finish cancels or delivers one order of the plan once it is paid and its courier is on the way, if the plan says so.
func (v *verified) finish(t testing.TB, number int) {
	t.Helper()
	o := v.input.Plan.Order(number)
	if o.Amount == 0 || !o.Cancel && !o.Deliver {
		return
	}
	var id string
	require.NoError(t, database(t, v.stack.order).QueryRow("SELECT orderId FROM order_info WHERE name = ?", o.Name).Scan(&id))
	v.awaitDispatched(t, id)
	eventually(t, "its points are recorded", func() error {
		if got := v.get(t, id).Points; got != o.Amount/100 {
			return fmt.Errorf("%d", got)
		}
		return nil
	})
	if o.Cancel {
		v.cancel(t, id)
		v.input.History.Cancelled(number, history.OK)
		return
	}
	require.Equal(t, http.StatusOK, v.deliver(t, id).status)
	v.input.History.Delivered(number, history.OK)
}

const invitedID = "foreign-1"

// meddle sends one message of each fate.
func (v *verified) meddle(t testing.TB) {
	t.Helper()
	send := v.stranger(t)
	foreign := func(key, id, orderID string, body []byte, want check.Fate) {
		send(key, id, body, nil)
		v.input.Foreign = append(v.input.Foreign, check.Foreign{EventID: id, OrderID: orderID, Key: key, Want: want, Body: sha256.Sum256(body)})
	}
	o := v.get(t, v.pick(t, "dispatched"))
	again := newEventID()
	body := encode(t, again, time.Now(), event.OrderPlaced{Order: event.Order{
		OrderID: o.OrderID, Name: o.Name, Amount: o.Amount, Currency: o.Currency, Status: "placed", Version: 1, PlacedAt: o.PlacedAt,
	}})
	foreign("order.placed", again, o.OrderID, body, check.NoEffect)
	foreign("order.placed", again, o.OrderID, body, check.NoEffect)
	foreign("order.cancelled", newEventID(), "", []byte("not JSON"), check.Kept)
	invited := newEventID()
	foreign("order.placed", invited, invitedID, encode(t, invited, time.Now(), placedAs(invitedID)), check.Recreated)
}

// pick returns the id of the first order with that status.
func (v *verified) pick(t testing.TB, status string) string {
	t.Helper()
	var id string
	query := "SELECT orderId FROM order_info WHERE status = ? AND orderId <> '" + invitedID + "' AND orderId NOT IN (SELECT orderId FROM idempotency_answer) ORDER BY id LIMIT 1"
	if status == "keyed" {
		query = "SELECT orderId FROM idempotency_answer WHERE ? <> '' ORDER BY request_key LIMIT 1"
	}
	require.NoError(t, database(t, v.stack.order).QueryRow(query, status).Scan(&id))
	return id
}

// defect is a way in which a system can break a promise. The statements take the order's id where they have :id.
type defect struct {
	name   string
	status string // of the order that is broken
	at     string // the service in whose database
	sql    []string
	input  func(in *check.Input, number int) // changes what is known beside the databases
	want   string                            // the only violation; empty if it is none
	also   string                            // others that follow of necessity
}

// oneMore is the statement that notes an event about the order once more, under that id.
func oneMore(id, key string) string {
	return fmt.Sprintf("INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) SELECT %s, event_key, order_id, created_at, confirmed_at FROM outbox_confirmed WHERE order_id = ':id' AND event_key = '%s'", id, key)
}

var defects = []defect{
	// I1: every accepted order is stored, dispatched and paid.
	{name: "order deleted", status: "dispatched", at: "order", sql: []string{"DELETE FROM order_info WHERE orderId = ':id'"}, want: "I1 lost", also: "I2 orphan"},
	{name: "order stored twice", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO order_info (orderId, name, order_money, currency, status, version, courier_id, assigned_at, placed_at, points) " +
			"SELECT 'twin', name, order_money, currency, status, version, courier_id, assigned_at, placed_at, points FROM order_info WHERE orderId = ':id'"}, want: "I1 duplicated"},
	{name: "dispatch deleted, or marked before it was done", status: "dispatched", at: "dispatch", sql: []string{"DELETE FROM platoon WHERE orderId = ':id'"}, want: "I1 lost"},
	{name: "payment deleted", status: "dispatched", at: "payment", sql: []string{"DELETE FROM payment WHERE orderId = ':id'"}, want: "I1 lost"},
	{name: "points deleted", status: "dispatched", at: "points", sql: []string{"DELETE FROM points_entry WHERE orderId = ':id'"}, want: "I1 lost"},
	{name: "points not taken back", status: "cancelled", at: "points", sql: []string{"DELETE FROM points_entry WHERE orderId = ':id' AND kind = 'revoke'"}, want: "I1 lost"},
	{name: "delivery undone", status: "delivered", at: "dispatch", sql: []string{"UPDATE platoon SET state = 'assigned' WHERE orderId = ':id'"}, want: "I1 lost"},
	{name: "courier unheard of", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET status = 'placed' WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "other courier", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET courier_id = 'sun' WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "assigned at another time", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET assigned_at = placed_at WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "not paid back", status: "cancelled", at: "payment", sql: []string{"UPDATE payment SET state = 'succeeded' WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "not paid back, and points not taken back", status: "cancelled", at: "payment", sql: []string{"UPDATE payment SET state = 'succeeded' WHERE orderId = ':id'",
		"UPDATE simulated_charge SET cancelled_at = NULL WHERE orderId = ':id'", "!points DELETE FROM points_entry WHERE orderId = ':id' AND kind = 'revoke'"}, want: "I1 mismatch"},
	{name: "paid back for no reason", status: "dispatched", at: "payment", sql: []string{"UPDATE payment SET state = 'refunded' WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "gateway keeps the money", status: "cancelled", at: "payment", sql: []string{"UPDATE simulated_charge SET cancelled_at = NULL WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "gateway took no money", status: "dispatched", at: "payment", sql: []string{"UPDATE simulated_charge SET charged_at = NULL WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "finding not resolved", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO finding (orderId, class, minute, state, evidence, repair, first_seen, last_seen) VALUES (':id', 'x', 1, 'person', '{}', '', '2026-01-01', '2026-01-01')"}, want: "I1 unresolved"},

	{name: "finding about nobody", at: "order", sql: []string{
		"INSERT INTO finding (orderId, class, minute, state, evidence, repair, first_seen, last_seen) VALUES ('nobody', 'lost', 1, 'person', '{}', '', '2026-01-01', '2026-01-01')"}, want: "I1 unresolved"},
	{name: "dispatch never made", status: "dispatched", at: "dispatch", sql: []string{"DELETE FROM platoon WHERE orderId = ':id'",
		"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'dispatch.assign-courier'"}, want: "I8 lost"},
	{name: "gateway gave back what it never took", status: "cancelled", at: "payment", sql: []string{"UPDATE simulated_charge SET charged_at = NULL WHERE orderId = ':id'"}, want: "I1 mismatch"},
	{name: "points of a payment that was refused", status: "cancelled", at: "payment", sql: []string{"UPDATE payment SET state = 'refused' WHERE orderId = ':id'"}, want: "I1 mismatch"},

	// I2: no effect lacks its order.
	{name: "dispatch of no order", status: "dispatched", at: "dispatch", sql: []string{
		"INSERT INTO platoon (orderId, state, name, order_money, currency, placed_at, order_version) SELECT 'orphan', 'waiting', name, order_money, currency, placed_at, 1 FROM platoon WHERE orderId = ':id'"}, want: "I2 orphan"},
	{name: "payment of no order", status: "dispatched", at: "payment", sql: []string{
		"INSERT INTO payment (orderId, state, name, order_money, currency, placed_at, order_version, reference, reason) SELECT 'orphan', 'charging', name, order_money, currency, placed_at, 1, '', '' FROM payment WHERE orderId = ':id'"}, want: "I2 orphan"},
	{name: "announcement of no order", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) VALUES ('evt_2', 'order.placed', 'orphan', '2026-01-01', '2026-01-01')"}, want: "I2 orphan"},

	{name: "points of no order", status: "dispatched", at: "points", sql: []string{"UPDATE points_entry SET orderId = 'orphan' WHERE orderId = ':id'"}, want: "I2 orphan", also: "I1 lost"},
	{name: "charge of no order", status: "dispatched", at: "payment", sql: []string{
		"INSERT INTO simulated_charge (orderId, amount, currency, reference, calls) VALUES ('orphan', 1, 'CNY', '', 1)"}, want: "I2 orphan"},

	// I3: one effect.
	{name: "paid twice", status: "dispatched", at: "payment", sql: []string{"!payment",
		"INSERT INTO payment (id, orderId, state, name, order_money, currency, placed_at, order_version, reference, reason) SELECT 9999, orderId, state, name, order_money, currency, placed_at, order_version, reference, reason FROM payment WHERE orderId = ':id'"}, want: "I3 duplicated"},
	{name: "charged twice", status: "dispatched", at: "payment", sql: []string{"!simulated_charge",
		"INSERT INTO simulated_charge (id, orderId, amount, currency, reference, charged_at, calls) SELECT 9999, orderId, amount, currency, reference, charged_at, calls FROM simulated_charge WHERE orderId = ':id'"}, want: "I3 duplicated"},
	{name: "dispatched twice", status: "dispatched", at: "dispatch", sql: []string{"!platoon",
		"INSERT INTO platoon (id, orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at) SELECT 9999, orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at FROM platoon WHERE orderId = ':id'"}, want: "I3 duplicated"},
	{name: "points awarded twice", status: "dispatched", at: "points", sql: []string{"!points_entry",
		"INSERT INTO points_entry (id, orderId, kind, points, placed_at, at) SELECT 9999, orderId, kind, points, placed_at, at FROM points_entry WHERE orderId = ':id'"}, want: "I3 duplicated"},
	{name: "order announced twice", status: "dispatched", at: "order", sql: []string{oneMore("'evt_2'", "order.placed")}, want: "I3 duplicated"},
	{name: "assignment announced twice", status: "dispatched", at: "dispatch", sql: []string{oneMore("'evt_2'", "dispatch.assigned")}, want: "I3 duplicated"},
	{name: "payment announced twice", status: "dispatched", at: "payment", sql: []string{oneMore("'evt_2'", "payment.succeeded")}, want: "I3 duplicated"},

	// I4: nothing is left.
	{name: "event in the outbox", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO outbox (uuid, payload, created_at, event_id, event_key, order_id) SELECT 'x', '', created_at, event_id, event_key, order_id FROM outbox_confirmed WHERE order_id = ':id' AND event_key = 'order.placed'"}, want: "I4 stuck"},
	{name: "retry left", status: "dispatched", at: "payment", sql: []string{
		"INSERT INTO retry (queue, uuid, fingerprint, tier, order_id, payload, error_text, created_at, available_at) VALUES ('payment.charge-order', 'evt_2', '', 1, ':id', '', 'x', '2026-01-01', 1)"}, want: "I4 stuck"},
	{name: "payment not decided", status: "dispatched", at: "payment", sql: []string{"UPDATE payment SET state = 'charging' WHERE orderId = ':id'"}, want: "I4 stuck"},
	{name: "waits although there is room", status: "dispatched", at: "dispatch", sql: []string{
		"UPDATE platoon SET state = 'waiting', takeout_userId = NULL, assigned_at = NULL WHERE orderId = ':id'",
		"!order UPDATE order_info SET status = 'placed', courier_id = NULL, assigned_at = NULL WHERE orderId = ':id'"}, want: "I4 stuck"},
	{name: "messages in a queue", input: func(in *check.Input, _ int) { in.Queues = map[string]int{"payment.charge-order": 1, "x": 0} }, want: "I4 stuck"},

	// I5: cancelled is cancelled.
	{name: "cancelled and active again", status: "cancelled", at: "order", sql: []string{"UPDATE order_info SET status = 'dispatched', cancelled_at = NULL WHERE orderId = ':id'"}, want: "I5 resurrected"},
	{name: "cancellation announced and undone", status: "cancelled", at: "order", sql: []string{"UPDATE order_info SET status = 'placed', cancelled_at = NULL WHERE orderId = ':id'"},
		input: reanswer(func(h *history.History, n int) {
			h.Placed(n, history.OK, "")
			h.Cancelled(n, history.Unknown)
		}), want: "I5 resurrected"},
	{name: "courier sent for a cancelled order", status: "cancelled", at: "dispatch", sql: []string{
		"UPDATE platoon SET state = 'assigned' WHERE orderId = ':id'"}, want: "I5 resurrected"},
	{name: "cancel acknowledged and not done", status: "dispatched", input: func(in *check.Input, n int) { in.History.Cancelled(n, history.OK) }, want: "I5 resurrected"},

	// I6: one request, one answer.
	{name: "told another id", status: "dispatched", input: func(in *check.Input, n int) { in.History.Placed(n, history.OK, "another") }, want: "I6 duplicated"},
	{name: "answers that contradict each other", status: "dispatched", input: func(in *check.Input, n int) { in.History.Wrong(n) }, want: "I6 duplicated"},
	{name: "answer with an order that is not there", status: "keyed", at: "order", sql: []string{
		"INSERT INTO idempotency_answer (request_key, fingerprint, orderId, body, created_at) SELECT X'6F74686572', fingerprint, 'nobody', body, created_at FROM idempotency_answer WHERE orderId = ':id'"}, want: "I6 lost"},
	{name: "answer under another key", status: "keyed", at: "order", sql: []string{"UPDATE idempotency_answer SET request_key = X'6F74686572' WHERE orderId = ':id'"}, want: "I6 mismatch"},
	{name: "answer that cannot be read", status: "keyed", at: "order", sql: []string{"UPDATE idempotency_answer SET body = 'x' WHERE orderId = ':id'"}, want: "I6 mismatch"},
	{name: "answer deleted", status: "keyed", at: "order", sql: []string{"DELETE FROM idempotency_answer WHERE orderId = ':id'"}, want: "I6 lost"},
	{name: "answer with another order", status: "keyed", at: "order", sql: []string{
		"UPDATE idempotency_answer SET body = REPLACE(body, '\"version\":1', '\"version\":2') WHERE orderId = ':id'"}, want: "I6 mismatch"},

	// I7: what was refused, or never asked, has no effect.
	{name: "refused and stored", status: "dispatched", input: reanswer(func(h *history.History, n int) { h.Placed(n, history.Refused, "") }), want: "I7 unexpected"},
	{name: "never asked and stored", status: "dispatched", input: reanswer(func(*history.History, int) {}), want: "I7 unexpected"},
	{name: "order of nobody", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO order_info (orderId, name, order_money, currency, status, version, placed_at) SELECT 'nobody', 'x', 1, 'CNY', 'placed', 1, placed_at FROM order_info WHERE orderId = ':id'"}, want: "I7 unexpected"},
	{name: "cancelled and nobody asked", status: "cancelled", input: reanswer(func(h *history.History, n int) { h.Placed(n, history.OK, "") }), want: "I7 unexpected"},
	{name: "cancelled although refused", status: "cancelled", input: reanswer(func(h *history.History, n int) {
		h.Placed(n, history.OK, "")
		h.Cancelled(n, history.Refused)
	}), want: "I7 unexpected"},
	{name: "delivered and nobody asked", status: "delivered", input: reanswer(func(h *history.History, n int) { h.Placed(n, history.OK, "") }), want: "I7 unexpected"},

	// I8: no message is lost.
	{name: "handled without a mark", status: "dispatched", at: "dispatch", sql: []string{"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'dispatch.assign-courier'"}, want: "I8 lost"},
	{name: "assignment never handled", status: "dispatched", at: "order", sql: []string{
		"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'order.mark-dispatched'",
		"UPDATE order_info SET status = 'placed', version = 1, courier_id = NULL, assigned_at = NULL WHERE orderId = ':id'"}, want: "I8 lost"},
	{name: "cancellation never handled", status: "cancelled", at: "payment", sql: []string{"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'payment.refund-order'"}, want: "I8 lost"},
	{name: "never announced", status: "dispatched", at: "order", sql: []string{"DELETE FROM outbox_confirmed WHERE order_id = ':id' AND event_key = 'order.placed'"}, want: "I8 lost", also: "I8 unexpected"},
	{name: "announced and not so", status: "dispatched", at: "payment", sql: []string{
		"INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) VALUES ('evt_2', 'payment.refused', ':id', '2026-01-01', '2026-01-01')",
		"!order INSERT INTO inbox (consumer, event_id, body_hash, handled_at, order_id) VALUES ('order.cancel-unpaid', 'evt_2', '', '2026-01-01', ':id')"}, want: "I8 unexpected"},
	{name: "event of another service", status: "dispatched", at: "dispatch", sql: []string{
		"INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) VALUES ('evt_2', 'order.placed', ':id', '2026-01-01', '2026-01-01')"}, want: "I8 unexpected"},
	{name: "event of nobody handled", status: "dispatched", at: "points", sql: []string{
		"INSERT INTO inbox (consumer, event_id, body_hash, handled_at, order_id) VALUES ('points.award-points', 'evt_2', '', '2026-01-01', ':id')"}, want: "I8 unexpected"},
	{name: "handled by nobody who is known", status: "dispatched", at: "points", sql: []string{
		"INSERT INTO inbox (consumer, event_id, body_hash, handled_at, order_id) VALUES ('payment.charge-order', 'evt_2', '', '2026-01-01', ':id')"}, want: "I8 unexpected"},
	{name: "healthy message given up", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO failure (id, consumer, fingerprint, message_id, order_id, error_class, error_code, error_text, attempts, headers, payload_size, state, first_failed_at, last_failed_at) " +
			"VALUES (9999, 'order.mark-dispatched', X'0cd0f9c8b8a0a5e8a04a6a1fd1f1d3c4d0c6d1b5b2b7b7c4c3f0a3c3f0d8a9b1', 'evt_2', ':id', 'transient', 'x', 'x', 4, '{}', 0, 'open', '2026-01-01', '2026-01-01')"}, want: "I8 given_up", also: "I9 mismatch"},
	{name: "repaired for no reason", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO history (order_id, at, step, detail) VALUES (':id', '2026-01-01', 'announced_again', 'x')"}, want: "I8 repaired"},
	{name: "found for no reason", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO finding (orderId, class, minute, state, evidence, repair, first_seen, last_seen) VALUES (':id', 'x', 1, 'resolved', '{}', '', '2026-01-01', '2026-01-01')"}, want: "I8 repaired"},

	// I9: what is kept is whole.
	{name: "foreign message lost", at: "dispatch", sql: []string{"DELETE FROM failure"}, want: "I9 lost"},
	{name: "foreign message cut", at: "dispatch", sql: []string{"UPDATE failure_payload SET bytes = 'not JSO'"}, want: "I9 mismatch", also: "I9 lost,I8 given_up"},

	// I10: tries have a bound.
	{name: "tried for ever", at: "payment", sql: []string{"UPDATE failure SET attempts = 13"}, want: "I10 unbounded"},

	{name: "delayed for ever", status: "dispatched", at: "order", sql: slices.Repeat([]string{
		"INSERT INTO history (order_id, at, step, detail) VALUES (':id', '2026-01-01', 'attempt_failed', 'order.mark-dispatched: message evt_2 failed, and is tried again in 5s: x')"}, 17), want: "I10 unbounded"},

	// I11: the state is what the changes add up to.
	{name: "version skipped", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET version = 5 WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "version behind", status: "cancelled", at: "order", sql: []string{"UPDATE order_info SET version = 2 WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "delivered without a time", status: "delivered", at: "order", sql: []string{"UPDATE order_info SET delivered_at = NULL WHERE orderId = ':id'",
		"!dispatch UPDATE platoon SET delivered_at = NULL WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "cancelled for a reason that is none", status: "cancelled", at: "order", sql: []string{"UPDATE order_info SET cancel_reason = 'the payment was refused' WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "cancelled because no courier was found, and one was", status: "cancelled", at: "order", sql: []string{"UPDATE order_info SET cancel_reason = 'no courier was found in time' WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "version of the future", status: "dispatched", at: "payment", sql: []string{"UPDATE payment SET order_version = 3 WHERE orderId = ':id'"}, want: "I11 mismatch"},
	{name: "courier's room is wrong", at: "dispatch", sql: []string{"UPDATE courier SET active = active + 1 WHERE courier_id = 'qian'"}, want: "I11 mismatch"},

	// I12: made again once, with a trace.
	{name: "made again without a trace", at: "order", sql: []string{"DELETE FROM history WHERE step = 'recreated'"}, want: "I12 unexpected"},
	{name: "made again twice", at: "order", sql: []string{"INSERT INTO history (order_id, at, step, detail) SELECT order_id, at, step, detail FROM history WHERE step = 'recreated'"}, want: "I12 duplicated"},
	{name: "not made again", at: "order", sql: []string{"DELETE FROM order_info WHERE orderId = '" + invitedID + "'"}, want: "I12 lost", also: "I2 orphan"},

	// I15: canaries are found nowhere.
	{name: "secret in an error", at: "payment", sql: []string{"UPDATE failure SET error_text = 'cannot log in with " + canarySecret + "'"}, want: "I15 leaked"},
	{name: "payload in a finding", status: "dispatched", at: "order", sql: []string{
		"INSERT INTO finding (orderId, class, minute, state, evidence, repair, first_seen, last_seen) VALUES ('" + invitedID + "', 'x', 1, 'resolved', '{}', '" + canaryDish + "', '2026-01-01', '2026-01-01')"}, want: "I15 leaked"},
	{name: "payload in a log", input: func(in *check.Input, _ int) {
		_ = os.WriteFile(in.Logs[0]+".2", []byte(strings.Repeat("x", 1<<20-3)+canaryDish+"\n"), 0o600)
		in.Logs = append(slices.Clone(in.Logs), in.Logs[0]+".2")
	}, want: "I15 leaked"},

	// What is no defect.
	{name: "event confirmed twice", status: "dispatched", at: "order", sql: []string{oneMore("event_id", "order.placed")}},
	{name: "unknown and stored", status: "dispatched", input: reanswer(func(h *history.History, n int) { h.Placed(n, history.Unknown, "") })},
	{name: "cancelled by one whose answer was lost", status: "cancelled", input: reanswer(func(h *history.History, n int) {
		h.Placed(n, history.OK, "")
		h.Cancelled(n, history.Unknown)
	})},
	{name: "destroyed and repaired", status: "dispatched", at: "dispatch", sql: []string{oneMore("'evt_2'", "dispatch.assigned"),
		"INSERT INTO history (order_id, at, step, detail) VALUES (':id', '2026-01-01', 'announced_again', 'x')",
		"!order UPDATE inbox SET event_id = 'evt_2' WHERE consumer = 'order.mark-dispatched' AND order_id = ':id'"},
		input: func(in *check.Input, _ int) { in.Destroyed = true }},
	{name: "destroyed and not repaired", status: "dispatched", at: "order", sql: []string{
		"DELETE FROM inbox WHERE consumer = 'order.mark-dispatched' AND order_id = ':id'",
		"UPDATE order_info SET status = 'placed', version = 1, courier_id = NULL, assigned_at = NULL WHERE orderId = ':id'"},
		input: func(in *check.Input, _ int) { in.Destroyed = true }, want: "I1 mismatch"},

	{name: "announcement destroyed before its dispatch", status: "dispatched", at: "dispatch", sql: []string{"DELETE FROM platoon WHERE orderId = ':id'",
		"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'dispatch.assign-courier'"}, input: func(in *check.Input, _ int) { in.Destroyed = true }, want: "I1 lost"},
	{name: "announcement destroyed before its payment", status: "dispatched", at: "payment", sql: []string{"DELETE FROM payment WHERE orderId = ':id'",
		"DELETE FROM inbox WHERE order_id = ':id' AND consumer = 'payment.charge-order'"}, input: func(in *check.Input, _ int) { in.Destroyed = true }, want: "I1 lost"},

	// I16: money and names are the same everywhere.
	{name: "amount at the order", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET order_money = order_money - 1 + 2 WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "currency at the dispatch", status: "dispatched", at: "dispatch", sql: []string{"UPDATE platoon SET currency = 'XXX' WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "name at the order", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET name = 'x' WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "name at the payment", status: "dispatched", at: "payment", sql: []string{"UPDATE payment SET name = 'x' WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "time at the points", status: "dispatched", at: "points", sql: []string{"UPDATE points_entry SET placed_at = '2026-01-01 00:00:00' WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "amount at the gateway", status: "dispatched", at: "payment", sql: []string{"UPDATE simulated_charge SET amount = amount + 1 WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "points", status: "dispatched", at: "points", sql: []string{"UPDATE points_entry SET points = points + 1 WHERE orderId = ':id'"}, want: "I16 mismatch"},
	{name: "points at the order", status: "dispatched", at: "order", sql: []string{"UPDATE order_info SET points = points + 1 WHERE orderId = ':id'"}, want: "I16 mismatch"},
}

// reanswer makes the clients have seen something else of one order, and of the others what they saw.
func reanswer(answer func(h *history.History, number int)) func(in *check.Input, number int) {
	return func(in *check.Input, number int) {
		before := in.History
		in.History = copyOf(before, number)
		answer(in.History, number)
	}
}

// copyOf returns a copy of the history without one order. Ids are not in it, because a history only keeps their hashes.
func copyOf(h *history.History, without int) *history.History {
	c := history.New(h.Len())
	for n := range h.Len() {
		if seen := h.Of(n); n != without {
			c.Placed(n, seen.Place, "")
			c.Cancelled(n, seen.Cancel)
			c.Delivered(n, seen.Deliver)
		}
	}
	return c
}

func TestCheckerFindsEachDefectAndNothingElse(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		v := verify(t, st, history.Plan{Seed: 4, Orders: 60})
		healthy, err := check.Run(t.Context(), v.input, nil)
		require.NoError(t, err)
		require.Positive(t, healthy.Refused)
		require.Equal(t, 60, healthy.Acknowledged+healthy.Refused)
		require.Equal(t, healthy.Acknowledged+1, healthy.Stored)
		require.EqualValues(t, 1, healthy.Recreated)
		require.Positive(t, healthy.Cancelled)
		require.Positive(t, healthy.Delivered)
		urls := v.input.Databases
		saved := map[string]*copies{}
		for service, url := range urls {
			saved[service] = saveTables(t, url)
		}
		for _, d := range defects {
			id, in := "", v.input
			if d.status != "" {
				id = v.pick(t, d.status)
			}
			if d.input != nil {
				number := -1
				if id != "" {
					number, _ = in.Plan.Number(v.name(t, id))
				}
				in.History = copyOf(in.History, -1)
				d.input(&in, number)
			}
			changed := map[string]bool{}
			for _, statement := range d.sql {
				at := d.at
				if strings.HasPrefix(statement, "!") {
					word, rest, more := strings.Cut(statement[1:], " ")
					if !more {
						saved[at].dropUnique(t, word)
						continue
					}
					at, statement = word, rest
				}
				changed[at] = true
				require.Positive(t, alter(t, urls[at], strings.ReplaceAll(statement, ":id", id)), "%s: %s", d.name, statement)
			}
			if changed["dispatch"] && d.name != "courier's room is wrong" { // what the couriers carry is not what is broken
				alter(t, urls["dispatch"], "UPDATE courier SET active = (SELECT COUNT(*) FROM platoon WHERE takeout_userId = courier_id AND state = 'assigned') WHERE capacity > 0")
			}
			r, err := check.Run(t.Context(), in, nil)
			require.NoError(t, err, d.name)
			want := strings.FieldsFunc(d.want+","+d.also, func(r rune) bool { return r == ',' })
			assert.ElementsMatch(t, want, slices.Collect(maps.Keys(r.ViolationCount)), "%s: %v", d.name, r.Violations)
			require.NotContains(t, fmt.Sprint(r.Violations), canarySecret, d.name)
			for service := range changed {
				saved[service].restore(t)
			}
		}
		last, err := check.Run(t.Context(), v.input, nil)
		require.NoError(t, err)
		require.Equal(t, healthy, last)
	})
}

func (v *verified) name(t testing.TB, id string) string {
	t.Helper()
	var name string
	require.NoError(t, database(t, v.stack.order).QueryRow("SELECT name FROM order_info WHERE orderId = ?", id).Scan(&name))
	return name
}

// copies are the tables of a database as they were.
type copies struct {
	url    string
	tables []string
	bare   string // the table without its unique key, if one is
}

func saveTables(t testing.TB, url string) *copies {
	t.Helper()
	query := "SELECT TABLE_NAME FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE()"
	if strings.HasPrefix(url, "sqlite") {
		query = "SELECT name FROM sqlite_master WHERE type = 'table'"
	}
	rows, err := database(t, url).QueryContext(context.Background(), query)
	require.NoError(t, err)
	defer rows.Close()
	c := &copies{url: url}
	for rows.Next() {
		var name string
		require.NoError(t, rows.Scan(&name))
		if !strings.HasPrefix(name, "schema_") && !strings.HasPrefix(name, "sqlite_") {
			c.tables = append(c.tables, name)
		}
	}
	require.NoError(t, rows.Err())
	for _, table := range c.tables {
		alter(t, url, "CREATE TABLE saved_"+table+" AS SELECT * FROM "+table)
	}
	return c
}

// dropUnique makes the table one that takes the same order twice.
func (c *copies) dropUnique(t testing.TB, table string) {
	t.Helper()
	c.bare = table
	alter(t, c.url, "ALTER TABLE "+table+" RENAME TO kept_"+table)
	create := "CREATE TABLE " + table + " AS SELECT * FROM kept_" + table
	if strings.HasPrefix(c.url, "sqlite") { // which forgets the types of columns in a copy
		require.NoError(t, database(t, c.url).QueryRow("SELECT sql FROM sqlite_master WHERE name = ?", "kept_"+table).Scan(&create))
		create = strings.NewReplacer("kept_"+table, table, "UNIQUE (orderId)", "CHECK (1)", "UNIQUE (orderId, kind)", "CHECK (1)").Replace(create)
		alter(t, c.url, create)
		create = "INSERT INTO " + table + " SELECT * FROM kept_" + table
	}
	alter(t, c.url, create)
}

func (c *copies) restore(t testing.TB) {
	t.Helper()
	if c.bare != "" {
		alter(t, c.url, "DROP TABLE "+c.bare)
		alter(t, c.url, "ALTER TABLE kept_"+c.bare+" RENAME TO "+c.bare)
		c.bare = ""
	}
	for _, table := range c.tables {
		alter(t, c.url, "DELETE FROM "+table)
		alter(t, c.url, "INSERT INTO "+table+" SELECT * FROM saved_"+table)
	}
}

// What is legal and rare is legal: cancellations before and after the courier, payments that are refused or late, orders
// that wait because nobody has room, announcements that come once more under another id.
func TestCheckerFindsNothingWhereMuchHappensAtOnce(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		for _, dispatched := range []string{"placed", "paid"} {
			t.Run("dispatched when "+dispatched, func(t *testing.T) {
				st := st
				if dispatched == "paid" {
					st = map[string]func(testing.TB) stack{"embedded": embedded, "mysql+rabbitmq": production}[st.name](t)
				}
				s := startWith(t, st, func(cfg *service.Config) {
					cfg.ReconcileEvery, cfg.RetryDelays, cfg.DispatchAfter = 0, []time.Duration{200 * time.Millisecond, time.Second, time.Second, time.Second}, dispatched
					cfg.PaymentRefusals, cfg.PaymentTimeouts = 0.1, 0.1
				})
				s.limitCouriers(t, 80)
				v := &verified{s, check.Input{
					Plan: history.Plan{Seed: 5, Orders: 150}, History: history.New(150), AfterPayment: dispatched == "paid",
					Databases: map[string]string{"order": st.order, "dispatch": st.dispatch, "payment": st.payment, "points": st.points},
				}}
				v.rush(t, s.publisher(t))
				var r *check.Report
				eventually(t, "every promise is kept", func() (err error) {
					if r, err = check.Run(t.Context(), v.input, nil); err == nil && !r.OK() {
						err = fmt.Errorf("%v: %v", r.ViolationCount, r.Violations)
					}
					return err
				})
				t.Logf("%+v", *r)
				require.Positive(t, r.Placed, "some wait")
				require.Positive(t, r.Cancelled)
				require.Positive(t, r.Absorbed)
			})
		}
	})
}

// limitCouriers lets everybody on the roster carry so many orders between them.
func (s *system) limitCouriers(t testing.TB, capacity int) {
	t.Helper()
	couriers := s.dispatchRows(t, "SELECT COUNT(*) FROM courier")
	rows, err := database(t, s.dispatch).Query("SELECT courier_id FROM courier")
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var id string
		require.NoError(t, rows.Scan(&id))
		a := mustSend(t, http.MethodPatch, s.dispatchAPI+"/v1/couriers/"+id, fmt.Sprintf(`{"capacity":%d}`, capacity/couriers))
		require.Equal(t, http.StatusOK, a.status, "%s", a)
	}
	require.NoError(t, rows.Err())
}

// rush asks everything that the plan says in twelve clients at once, and announces every fifth order once more under
// another id while its first announcement is on its way.
func (v *verified) rush(t testing.TB, broker message.Publisher) {
	var mu sync.Mutex
	var tasks []func()
	for number := range v.input.Plan.Orders {
		tasks = append(tasks, func() {
			o := v.input.Plan.Order(number)
			v.order(t, number)
			var id string
			var placed time.Time
			if err := database(t, v.stack.order).QueryRow("SELECT orderId, placed_at FROM order_info WHERE name = ?", o.Name).Scan(&id, &placed); err != nil {
				t.Errorf("order %d: %v", number, err)
				return
			}
			if number%5 == 0 {
				again := newEventID()
				body := encode(t, again, time.Now(), event.OrderPlaced{Order: event.Order{
					OrderID: id, Name: o.Name, Amount: o.Amount, Currency: o.Currency, Status: "placed", Version: 1, PlacedAt: placed.UTC(),
				}})
				if err := broker.Publish("order.placed", message.NewMessage(again, body)); err != nil {
					t.Errorf("order %d: %v", number, err)
				}
				mu.Lock()
				v.input.Foreign = append(v.input.Foreign, check.Foreign{EventID: again, OrderID: id, Key: "order.placed", Want: check.NoEffect})
				mu.Unlock()
			}
			if o.Cancel {
				time.Sleep(time.Duration(number%7) * 10 * time.Millisecond) // before, while and after a courier is found
				v.input.History.Cancelled(number, answerOf(send(http.MethodPost, v.api+"/v1/orders/"+id+"/cancel", "")))
			}
			for try := 0; o.Deliver && try < 20 && v.input.History.Of(number).Deliver != history.OK; try++ {
				v.input.History.Delivered(number, answerOf(send(http.MethodPost, v.dispatchAPI+"/v1/dispatches/"+id+"/delivered", "")))
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	atOnceInTwelve(tasks)
}

func answerOf(a answer, err error) history.Answer {
	switch {
	case err != nil || a.status >= 500:
		return history.Unknown
	case a.status < 300:
		return history.OK
	}
	return history.Refused
}
