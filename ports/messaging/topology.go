// Package messaging is the port through which events come in: which queue feeds which use case, and what happens to
// a message whose handling fails. Read topology.go first and consumer.go second.
package messaging

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
)

// Role is a part of the work that a process can do.
type Role string

// The roles. Order, Dispatch, Payment and Points serve HTTP and handle their service's messages; Compensation makes
// lost orders again in the order service's database; Relay carries events from the outboxes to the broker; Reconcile
// compares the services' databases, and is the operators' API for all of them.
const (
	Order        Role = "order"
	Relay        Role = "relay"
	Dispatch     Role = "dispatch"
	Compensation Role = "compensation"
	Payment      Role = "payment"
	Points       Role = "points"
	Reconcile    Role = "reconcile"
)

// Roles are all of them.
var Roles = []Role{Order, Relay, Dispatch, Compensation, Payment, Points, Reconcile}

// Service returns whose database the role handles messages in. Relay and Reconcile handle none.
func (r Role) Service() string {
	if r == Compensation {
		return string(Order)
	}
	return string(r)
}

// Topology is the whole flow of messages. The queue's name is the handler's name and the inbox key: under another name
// whatever is in flight would be handled again.
func Topology(u app.UseCases, withPayment bool) []Route {
	routes := []Route{
		onMany(Dispatch, "dispatch.assign-courier", urgent, u.Dispatches.AssignPlaced, u.Dispatches.AssignPlacedMany),
		onMany(Compensation, "compensation.recreate-order", patient, u.Compensation.Recreate, u.Compensation.RecreateMany),
		onMany(Order, "order.mark-dispatched", patient, u.Orders.MarkDispatched, u.Orders.MarkDispatchedMany),
		on(Order, "order.mark-delivered", u.Orders.MarkDelivered),
		on(Order, "order.cancel-undispatchable", u.Orders.CancelUndispatchable),
		on(Dispatch, "dispatch.release-courier", u.Dispatches.Release),
		on(Compensation, "compensation.recreate-cancelled-order", u.Compensation.RecreateCancelled),
	}
	if !withPayment {
		return routes
	}
	return append(routes,
		on(Payment, "payment.charge-order", u.Payments.Charge),
		on(Order, "order.cancel-unpaid", u.Orders.CancelUnpaid),
		onMany(Dispatch, "dispatch.assign-courier-when-paid", urgent, u.Dispatches.AssignPaid, u.Dispatches.AssignPaidMany),
		onMany(Points, "points.award-points", patient, u.Points.Award, u.Points.AwardMany),
		onMany(Order, "order.record-points", patient, u.Orders.RecordPoints, u.Orders.RecordPointsMany),
		on(Payment, "payment.refund-order", u.Payments.Refund),
		on(Points, "points.revoke-points", u.Points.Revoke),
	)
}

// Route binds one queue to one event and one use case.
type Route struct {
	Role  Role
	Event string // the routing key
	Queue string

	handle func(message *message.Message, queue string, accept Acceptance) error
	check  func(messageID string, body []byte) error
}

// on makes the route of events of type E. The use case's parameter decides which events come.
func on[E event.Event](role Role, queue string, useCase func(context.Context, E) error) Route {
	var e E
	return Route{Role: role, Event: e.Key(), Queue: queue, handle: handler(useCase), check: func(messageID string, body []byte) error {
		_, _, err := event.Decode[E](messageID, body)
		return err
	}}
}

// The least time from one batch of a queue to the next. Without it each queue would run as many and as small transactions as
// the processor allows, and what a person waits for would compete with what nobody waits for.
const (
	urgent  = 3 * time.Millisecond // somebody waits for the courier
	patient = 10 * time.Millisecond
)

// onMany is on for a use case that can handle many events at once, as app.HandleTogether says.
func onMany[E event.Event](role Role, queue string, rest time.Duration, one func(context.Context, E) error, many func(context.Context, []E) error) Route {
	return on(role, queue, app.HandleTogether(rest, one, many))
}

// Validator returns what says whether a queue's consumer could read a message. Its error is Invalid.
func Validator(routes []Route) func(queue, messageID string, body []byte) error {
	return func(queue, messageID string, body []byte) error {
		for _, r := range routes {
			if r.Queue == queue {
				return r.check(messageID, body)
			}
		}
		return domain.Errorf(domain.Invalid, "queue_unknown", "there is no consumer %s any more", queue)
	}
}

// WriteTopology prints the routes as a table, one line for each queue.
func WriteTopology(w io.Writer, routes []Route, delays []time.Duration) error {
	then := ""
	for _, delay := range delays {
		then += ", " + short(delay)
	}
	var table strings.Builder
	columns := tabwriter.NewWriter(&table, 0, 0, 3, ' ', 0)
	fmt.Fprintln(columns, "EVENT\tQUEUE\tROLE\tTRIES\tTHEN AFTER\tTHEN")
	for _, r := range routes {
		fmt.Fprintf(columns, "%s\t%s\t%s\t%d at once\t%s\tkept in the %s database\n",
			r.Event, r.Queue, r.Role, immediateTries, strings.TrimPrefix(then, ", "), r.Role.Service())
	}
	if err := columns.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(table.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// short is a duration without the units that are zero.
func short(d time.Duration) string {
	return strings.NewReplacer("h0m0s", "h", "m0s", "m").Replace(d.String())
}
