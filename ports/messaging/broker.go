package messaging

import (
	"context"

	"github.com/ThreeDotsLabs/watermill/message"
)

// Broker carries messages between the services. rabbitmq and sqlbroker implement it; tests/broker_contract_test.go
// is what an implementation must pass.
//
// Publish returns nil only when every message is stored in every queue that is bound to the topic. It returns an
// error when no queue is bound, when the broker refuses, cannot be reached or does not confirm in time, and once
// Close has begun; a message may then be stored all the same, so publishing again makes a duplicate and never a loss.
//
// Close stops taking messages, waits a bounded time for those under way, and releases what the broker holds.
type Broker interface {
	message.Publisher

	// Bind makes the durable queue exist and keep every message published to topic from then on, even before
	// anyone reads it. A broker that is away is not an error: the binding is remembered and made before
	// anything is published or read.
	Bind(topic, queue string) error

	// Subscriber returns a reader of queues: the topic that its Subscribe takes is a queue's name. Many
	// deliveries are in flight at once, and one that is not acked is delivered again. Closing it takes no new
	// deliveries, lets those in flight finish within a bounded time, and settles them.
	//
	// A message that was delivered too often without being settled comes one last time, with the reason in its
	// metadata under app.MetadataUndeliverable.
	Subscriber() message.Subscriber

	// WaitReady returns nil once messages can be published, be it not to all topics, and ctx's error if it ends while they
	// cannot.
	WaitReady(ctx context.Context) error

	// Check says why messages, or those to a topic, cannot be published right now: unreachable, blocked, a queue refused.
	// Nil if all can.
	Check() error

	// Reading says for each queue that a Subscriber reads why nothing can be read from it right now, nil if it can.
	Reading() map[string]error
}
