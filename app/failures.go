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
	Attempts  int
	Headers   map[string]string
	Payload   []byte // as it came
}

// Metadata of a message that comes from the retry table instead of the broker.
const (
	MetadataRetryQueue = "takeout-retry-queue"      // the consumer that it is for
	MetadataRetryTier  = "takeout-retry-tier"       // which delay it has waited: 1 for the first, 0 if a person asked for it
	MetadataFailureID  = "takeout-retry-failure-id" // the number of the failure that is retried, if a person asked for it
	MetadataRetryBatch = "takeout-retry-batch"      // the retries that stop together when one fails, if they do
)

// Failures keeps what a consumer could not handle, in the consumer's own database.
type Failures interface {
	// Delay stores the message so that it comes to its consumer again, and to no other, after the time. tier is the
	// number of this delay, from 1. Delaying the same message again in the same tier changes nothing.
	Delay(ctx context.Context, f Failure, tier int, after time.Duration) error
	// Keep stores a message that was given up durably, for a person. Keeping the same message again updates what is
	// known of it, and opens it again if it was closed by being handled. If it was retried in a batch that stops
	// together, those of the batch that still wait are not retried, and are open again.
	Keep(ctx context.Context, f Failure) error
	// Resolve closes the failure of that number, because its retry was handled. It does nothing if it is closed.
	Resolve(ctx context.Context, failureID int64) error
}
