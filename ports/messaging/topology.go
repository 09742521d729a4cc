// Package messaging is the door through which events come in: which queue feeds which use case, and what happens to
// a message whose handling fails. Read topology.go first and consumer.go second.
package messaging

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/app"
	"takeout/domain/event"
)

// Role is a part of the work that a process can do.
type Role string

// The roles. Order and Dispatch serve HTTP and handle their service's messages; Relay carries events from the
// outboxes to the broker.
const (
	Order    Role = "order"
	Relay    Role = "relay"
	Dispatch Role = "dispatch"
)

// Roles are all of them.
var Roles = []Role{Order, Relay, Dispatch}

// Topology is the whole flow of messages. The queue's name is the handler's name and the inbox key: under another name
// whatever is in flight would be handled again.
func Topology(orders *app.Orders, dispatches *app.Dispatches) []Route {
	return []Route{
		on(Dispatch, "dispatch.assign-courier", dispatches.Assign),
		on(Order, "order.mark-dispatched", orders.MarkDispatched),
	}
}

// Route binds one queue to one event and one use case.
type Route struct {
	Role  Role
	Event string // the routing key
	Queue string

	handle func(message *message.Message, queue string) error
}

// on makes the route of events of type E. The use case's parameter decides which events come.
func on[E event.Event](role Role, queue string, useCase func(context.Context, E) error) Route {
	var e E
	return Route{Role: role, Event: e.Key(), Queue: queue, handle: handler(useCase)}
}

// WriteTopology prints the routes as a table, one line for each queue.
func WriteTopology(w io.Writer, routes []Route) error {
	var table strings.Builder
	columns := tabwriter.NewWriter(&table, 0, 0, 3, ' ', 0)
	fmt.Fprintln(columns, "EVENT\tQUEUE\tROLE\tTRIES\tTHEN")
	for _, r := range routes {
		fmt.Fprintf(columns, "%s\t%s\t%s\t%d at once\tkept in the %s database\n", r.Event, r.Queue, r.Role, immediateTries, r.Role)
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
