package app

import (
	"context"
	"time"
)

// Failure is a message that a consumer could not handle, with all that a person needs to understand and repair it.
type Failure struct {
	Consumer  string // the queue's name
	MessageID string // as it came, empty if it came with none
	OrderID   string // empty if the message could not be read
	Class     string // why trying again would not help: permanent, transient (tried often enough), undeliverable
	Code      string // of the error, for programs
	Error     string // of the error, for people, without secrets
	Attempts  int    // since it came from the broker, or since a person asked for it
	Headers   map[string]string
	Payload   []byte // as it came
	Retry     Retry  // which retry was given up
}

// Retry says how a message that is handled again came to be so. It travels in the context and not in the message's
// headers, so that nothing a message brings along can pretend to be it.
type Retry struct {
	Tier      int    // which delay it has waited, from 1; 0 if it comes from the broker, or because a person asked for it
	FailureID int64  // the failure that is retried, 0 if no person asked for it
	Batch     string // the retries that stop together when one is given up, empty if this one is on its own
}

type retryKey struct{}

// WithRetry returns a context that says which retry a message is.
func WithRetry(ctx context.Context, r Retry) context.Context {
	return context.WithValue(ctx, retryKey{}, r)
}

// RetryFrom returns which retry ctx says that a message is. It is zero for a message that comes from the broker.
func RetryFrom(ctx context.Context) Retry {
	r, _ := ctx.Value(retryKey{}).(Retry)
	return r
}

// Failures keeps what a consumer could not handle, in the consumer's own database.
type Failures interface {
	// Delay stores the message so that it comes to its consumer again, and to no other, after the time. tier is the
	// number of this delay, from 1. Delaying the same message again in the same tier changes nothing.
	Delay(ctx context.Context, f Failure, tier int, after time.Duration) error
	// Keep stores a message that was given up durably, for a person. Keeping the same message again updates what is
	// known of it, and opens it again if it was closed; but what a person closed while it was being retried stays
	// closed. If it was retried in a batch that stops together, those of the batch that still wait are not retried,
	// and are open again.
	Keep(ctx context.Context, f Failure) error
	// Resolve closes the failure of that number, because its retry was handled. It does nothing if it is closed.
	Resolve(ctx context.Context, failureID int64) error
}
