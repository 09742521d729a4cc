package messaging

import (
	"context"
	"errors"

	"takeout/domain"
)

// class is what an error says about the message that was being handled.
type class string

const (
	done           class = "done"           // nothing is wrong
	permanent      class = "permanent"      // it will never work
	transient      class = "transient"      // it may work in a moment
	infrastructure class = "infrastructure" // the message is not the problem: wait, and spend no attempt
	shutdown       class = "shutdown"       // this process stops: the message goes back
	undeliverable  class = "undeliverable"  // the broker gave it up; perhaps it kills the process
)

// errStopping ends waiting for a better time when the consumer stops.
var errStopping = errors.New("the consumer is stopping")

// classify is the one place that decides what an error says about a message.
func classify(err error) class {
	switch {
	case err == nil:
		return done
	case errors.Is(err, errStopping), errors.Is(err, context.Canceled):
		return shutdown
	}
	switch domain.KindOf(err) {
	case domain.Invalid:
		return permanent
	case domain.Unavailable, domain.Busy, domain.Exhausted:
		return infrastructure
	default: // NotFound too: messages have no order across queues, and this one may only be early
		return transient
	}
}

// Classify returns what an error says about the message that was being handled: done if there is none, permanent,
// transient, infrastructure or shutdown.
func Classify(err error) string { return string(classify(err)) }
