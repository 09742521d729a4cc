// Package domain holds the rules and facts of ordering and dispatching. It knows the standard library and nothing
// else: no database, no broker, no HTTP.
package domain

import (
	"errors"
	"fmt"
)

// Kind says what can be done about an error. Each port has one table from Kind to its own answer: HTTP a status,
// a message handler a decision between retrying and keeping.
type Kind int

// The kinds. Unknown is every error that nobody gave a kind: a bug or a fault of a dependency.
const (
	Unknown     Kind = iota
	Invalid          // the input breaks a rule; the same input will always break it
	NotFound         // nothing is stored under that id, or not yet
	Conflict         // the state of what is stored forbids it
	Busy             // somebody else is changing the very same thing right now; ask again
	Exhausted        // what is needed is all in use right now; ask again
	Unavailable      // a dependency is away or does not work; the input is not the problem
)

// Error is an error with a kind and a code. The message is written for the person who can act on it and never
// contains a secret.
type Error struct {
	Kind    Kind
	Code    string // stable, snake_case, for programs: "name_too_long"
	Field   string // the input it is about, empty if none: "name"
	Message string
	Cause   error // what went wrong underneath, for the log and never for a client; nil if nothing did
}

// Error returns the message, and the cause if there is one.
func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Message + ": " + e.Cause.Error()
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Errorf returns an Error of a kind with a formatted message.
func Errorf(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Message: fmt.Sprintf(format, args...)}
}

// InvalidField returns an Invalid error about one input.
func InvalidField(field, code, format string, args ...any) *Error {
	return &Error{Kind: Invalid, Code: code, Field: field, Message: fmt.Sprintf(format, args...)}
}

// KindOf returns the kind of the first Error in err's chain, Unknown if there is none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Unknown
}
