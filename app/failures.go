package app

import "context"

// Failure is a message that a consumer gave up on, with all that a person needs to understand and repair it.
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

// Failures keeps messages that a consumer gave up on, in the consumer's own database.
type Failures interface {
	// Keep stores the failure durably. Keeping the same message again updates what is known of it.
	Keep(ctx context.Context, f Failure) error
}
