package app

import (
	"context"
	"errors"
)

// MetadataUndeliverable is the message metadata key under which a broker says why it will not try a message
// again, for example because its delivery limit is reached. A consumer keeps such a message for a person
// instead of handling it once more: it may be what killed the process.
const MetadataUndeliverable = "takeout-undeliverable"

// Delivery says which message is being handled, and by whom. It travels in the context, as a request id does, so
// that no handler can forget to deduplicate; the transaction never does.
type Delivery struct {
	Consumer string   // the queue's name
	EventID  string   // the event's id, 1 to event.MaxID bytes
	Hash     [32]byte // SHA-256 of the message's body
	OrderID  string
}

// ErrDuplicate says that what was asked for had been done before. Nothing was changed.
var ErrDuplicate = errors.New("done before")

type deliveryKey struct{}

// WithDelivery returns a context that carries the delivery.
func WithDelivery(ctx context.Context, d Delivery) context.Context {
	return context.WithValue(ctx, deliveryKey{}, d)
}

// WithoutDelivery returns a context that carries no delivery, for what a handler does beside the transaction that
// handles the message.
func WithoutDelivery(ctx context.Context) context.Context {
	return context.WithValue(ctx, deliveryKey{}, nil)
}

// DeliveryFrom returns the delivery that ctx carries, and whether it carries one.
func DeliveryFrom(ctx context.Context) (Delivery, bool) {
	d, ok := ctx.Value(deliveryKey{}).(Delivery)
	return d, ok
}
