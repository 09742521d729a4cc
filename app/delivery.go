package app

import (
	"context"
	"errors"
	"fmt"
	"time"

	"takeout/domain/order"
)

// MetadataUndeliverable is the message metadata key under which a broker says why it will not try a message
// again, for example because its delivery limit is reached. A consumer keeps such a message for a person
// instead of handling it once more: it may be what killed the process.
const MetadataUndeliverable = "takeout-undeliverable"

// Delivery says which message is being handled, and by whom. It travels in the context, as a request id does, so
// that no handler can forget to deduplicate. A transaction never travels in a context: it is always a parameter.
type Delivery struct {
	Consumer string   // the queue's name
	EventID  string   // the event's id, 1 to event.MaxID bytes
	Hash     [32]byte // SHA-256 of the message's body
	OrderID  string
}

// ErrDuplicate says that what was asked for had been done before. Nothing was changed.
var ErrDuplicate = errors.New("done before")

// Recorded is the error of a transaction with several deliveries, some of which the inbox knows. It has the answer to each
// of those: ErrDuplicate, or an Invalid error if the message was another one. Nothing was changed.
type Recorded map[Delivery]error

// Error implements error.
func (r Recorded) Error() string {
	return fmt.Sprintf("%d of the messages were handled before", len(r))
}

type deliveryKey struct{}

// WithDelivery returns a context that carries the delivery.
func WithDelivery(ctx context.Context, d Delivery) context.Context {
	return WithDeliveries(ctx, d)
}

// WithDeliveries returns a context that carries the deliveries, which are of one consumer and are handled together: all
// of them in one transaction, or none.
func WithDeliveries(ctx context.Context, all ...Delivery) context.Context {
	return context.WithValue(ctx, deliveryKey{}, all)
}

// WithoutDelivery returns a context that carries no delivery, for what a handler does beside the transaction that
// handles the message.
func WithoutDelivery(ctx context.Context) context.Context {
	return context.WithValue(ctx, deliveryKey{}, nil)
}

// DeliveriesFrom returns the deliveries that ctx carries, none if it carries none.
func DeliveriesFrom(ctx context.Context) []Delivery {
	all, _ := ctx.Value(deliveryKey{}).([]Delivery)
	return all
}

// DeliveryFrom returns the delivery that ctx carries, and whether it carries one and no others.
func DeliveryFrom(ctx context.Context) (Delivery, bool) {
	if all := DeliveriesFrom(ctx); len(all) == 1 {
		return all[0], true
	}
	return Delivery{}, false
}

const (
	// mostDeliveries is how many messages one transaction handles. Those of one queue that are in flight are as many.
	mostDeliveries = 200
	// deliveryPatience is how long the messages of a queue wait for a transaction that handles earlier ones. More than one
	// at a time would be more and smaller transactions for the same number of messages, and those of other queues run
	// beside them anyhow.
	deliveryPatience = 100 * time.Millisecond
)

// HandleTogether returns a handler that calls one for a message that comes alone, and many for those that waited while
// others were being handled: they share a transaction. many does for each what one does, or returns an
// error and does nothing: then those that the inbox knows are told so, and others are tried again in smaller numbers, in
// the end by one, in their own goroutines. Messages that are Apart do not come to many.
//
// rest is Together.Rest: the longer, the fewer transactions there are, and the later their messages are handled.
func HandleTogether[E any](rest time.Duration, one func(ctx context.Context, e E) error, many func(ctx context.Context, all []E) error) func(ctx context.Context, e E) error {
	type message struct {
		delivery Delivery
		event    E
	}
	together := &Together[message]{
		Most: mostDeliveries, Parallel: 1, Patience: deliveryPatience, Rest: rest,
		One: func(ctx context.Context, m message) error { return one(ctx, m.event) }, // the inbox knows what is done
		Many: func(ctx context.Context, all []message) (map[int]error, error) {
			deliveries, events := make([]Delivery, len(all)), make([]E, len(all))
			for i, m := range all {
				deliveries[i], events[i] = m.delivery, m.event
			}
			err := many(WithDeliveries(ctx, deliveries...), events)
			var own map[int]error
			if recorded, ok := errors.AsType[Recorded](err); ok {
				own = make(map[int]error, len(recorded))
				for i, m := range all {
					if answer, is := recorded[m.delivery]; is {
						own[i] = answer
					}
				}
			}
			return own, err
		},
	}
	return func(ctx context.Context, e E) error {
		d, ok := DeliveryFrom(ctx)
		if !ok || IsApart(ctx) {
			return one(ctx, e)
		}
		err := together.Do(ctx, message{d, e})
		if cause := context.Cause(ctx); cause != nil && (errors.Is(err, cause) || errors.Is(err, ErrUnsettled)) {
			return ctx.Err() // as from a database: the message goes back, and whether it was handled is found then
		}
		return err
	}
}

type apartKey struct{}

// Apart returns the context of a message that is not to be handled together with others: it failed, or it came before
// and was not settled. It may be a copy of what is done, or kill the process, and would spoil it for the others again.
func Apart(ctx context.Context) context.Context { return context.WithValue(ctx, apartKey{}, true) }

// IsApart reports whether ctx is that of such a message. A message that is retried is one.
func IsApart(ctx context.Context) bool {
	return ctx.Value(apartKey{}) != nil || RetryFrom(ctx) != Retry{}
}

// byOrder returns what is about each order. ErrAlone if two are about the same.
func byOrder[T any](all []T, orderOf func(T) (order.ID, error)) (map[order.ID]T, []order.ID, error) {
	of, ids := make(map[order.ID]T, len(all)), make([]order.ID, 0, len(all))
	for _, one := range all {
		id, err := orderOf(one)
		if err != nil {
			return nil, nil, err
		}
		of[id], ids = one, append(ids, id)
	}
	if len(of) < len(all) {
		return nil, nil, ErrAlone
	}
	return of, ids, nil
}
