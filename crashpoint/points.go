package crashpoint

import (
	"slices"
	"strings"
)

// Point is a place in the program where a process can be made to die.
type Point struct {
	Name   string
	Where  string   // what has just happened there, and what has not
	Roles  []string // whose processes come there
	Broker string   // "amqp" or "sql" if only processes with such a broker come there; the embedded one is "sql"
}

// Points returns all points.
func Points() []Point {
	all := slices.Clone(places)
	for _, queue := range queues {
		role, _, _ := strings.Cut(queue, ".")
		for _, p := range phases {
			all = append(all, Point{Name: queue + "/" + p.name, Where: p.where, Roles: []string{role}})
		}
	}
	return all
}

func names() []string {
	var all []string
	for _, p := range Points() {
		all = append(all, p.Name)
	}
	return all
}

func known(name string) bool { return slices.Contains(names(), name) }

// consumers are the roles that handle messages.
var consumers = []string{"order", "compensation", "dispatch", "payment", "points"}

var (
	order     = []string{"order"}
	relay     = []string{"relay"}
	payment   = []string{"payment"}
	reconcile = []string{"reconcile"}
)

// places are the points but those of each consumer.
var places = []Point{
	{Name: "order.place/before-transaction", Where: "an order is asked for; nothing is stored", Roles: order},
	{Name: "order.place/after-answer", Where: "the row of the Idempotency-Key is written; the order is not", Roles: order},
	{Name: "order.place/before-commit", Where: "order and event are written; COMMIT is not sent", Roles: order},
	{Name: "order.place/after-commit", Where: "order and event are stored; the client has no answer", Roles: order},
	{Name: "order.cancel/before-commit", Where: "cancellation and event are written; COMMIT is not sent", Roles: order},
	{Name: "order.cancel/after-commit", Where: "cancellation and event are stored; nobody is told", Roles: order},

	{Name: "outbox/claimed", Where: "events are leased; none is published", Roles: relay},
	{Name: "outbox/acked", Where: "the broker has confirmed events; they are still in the outbox", Roles: relay},
	{Name: "outbox/deleted", Where: "events that the broker has are deleted; COMMIT is not sent", Roles: relay},
	{Name: "rabbitmq/published", Where: "an event is sent to the broker; it has not confirmed it", Roles: relay, Broker: "amqp"},
	{Name: "rabbitmq/confirmed", Where: "the broker has confirmed an event; the relay does not know it yet", Roles: relay, Broker: "amqp"},
	{Name: "sqlbroker/before-commit", Where: "messages are written into the queues; COMMIT is not sent", Roles: relay, Broker: "sql"},
	{Name: "sqlbroker/after-commit", Where: "messages are in the queues; the relay does not know it yet", Roles: relay, Broker: "sql"},

	{Name: "rabbitmq/delivered", Where: "a message has come from the broker; nothing is done about it", Roles: consumers, Broker: "amqp"},
	{Name: "rabbitmq/before-ack", Where: "messages are handled; the ack is not sent", Roles: consumers, Broker: "amqp"},
	{Name: "rabbitmq/acked", Where: "the ack is sent; the broker may not have it", Roles: consumers, Broker: "amqp"},
	{Name: "broker_message/claimed", Where: "messages are leased; nothing is done about them", Roles: consumers, Broker: "sql"},
	{Name: "broker_message/acked", Where: "messages are handled; they are still in the queue", Roles: consumers, Broker: "sql"},
	{Name: "broker_message/deleted", Where: "messages that are handled are out of the queue", Roles: consumers, Broker: "sql"},

	{Name: "consumer/delayed", Where: "a message that failed is stored for a later attempt; it is not acked", Roles: consumers},
	{Name: "consumer/kept", Where: "a message that was given up is stored for a person; it is not acked", Roles: consumers},
	{Name: "retry/claimed", Where: "messages whose next attempt has come are leased; nothing is done about them", Roles: consumers},
	{Name: "retry/acked", Where: "an attempt has ended; the message still waits for it", Roles: consumers},
	{Name: "retry/deleted", Where: "an attempt has ended, and the message does not wait for it any more", Roles: consumers},

	{Name: "dispatch.assign-waiting/before-commit", Where: "it is decided about orders that waited; COMMIT is not sent", Roles: []string{"dispatch"}},
	{Name: "dispatch.assign-waiting/after-commit", Where: "what was decided about orders that waited is stored", Roles: []string{"dispatch"}},
	{Name: "payment/charged", Where: "the gateway has the money, or has refused; the payment service has not stored it", Roles: payment},
	{Name: "payment/cancelled", Where: "the gateway has given the money back; the payment service has not stored it", Roles: payment},

	{Name: "reconcile/detected", Where: "the services are compared; nothing is verified or kept", Roles: reconcile},
	{Name: "reconcile/verified", Where: "findings are stored; none is repaired", Roles: reconcile},
	{Name: "reconcile/repaired", Where: "a repair is made; that it was is not stored, and others are to come", Roles: reconcile},
	{Name: "reconcile/before-settle", Where: "all repairs are made; it is not stored how far was compared", Roles: reconcile},

	{Name: "shutdown/before-drain", Where: "the process is told to stop; everything still works", Roles: append(slices.Clone(consumers), "relay", "reconcile")},
	{Name: "shutdown/half-drained", Where: "HTTP and relays are closed; messages are in flight", Roles: append(slices.Clone(consumers), "relay", "reconcile")},
}

// queues have a consumer each. They are those of messaging.Topology, which may not be imported here; a test compares.
var queues = []string{
	"dispatch.assign-courier",
	"compensation.recreate-order",
	"order.mark-dispatched",
	"order.mark-delivered",
	"order.cancel-undispatchable",
	"dispatch.release-courier",
	"compensation.recreate-cancelled-order",
	"payment.charge-order",
	"order.cancel-unpaid",
	"dispatch.assign-courier-when-paid",
	"points.award-points",
	"order.record-points",
	"payment.refund-order",
	"points.revoke-points",
}

// phases are the points of each consumer.
var phases = []struct{ name, where string }{
	{"before-inbox", "the consumer's transaction has begun; nothing is written"},
	{"after-inbox", "the inbox row is written; the message is not handled"},
	{"before-commit", "the message is handled in the transaction; COMMIT is not sent"},
	{"after-commit", "what the message did is stored; it is not acked"},
}
