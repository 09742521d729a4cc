// Package event is what the services tell each other. An event is a fact in the past tense; it carries all that
// its readers need, so that none has to ask back, and the version of the order that it tells of, so that one that
// comes late or again cannot undo a newer one.
package event

import "time"

// Event is a fact that one service announces.
type Event interface {
	// Key is the routing key: the event's name, "order.placed".
	Key() string
	// Subject is the id of the order that the event is about.
	Subject() string
	// OrderVersion is the version of that order which the event tells of or acts on, 1 or more.
	OrderVersion() int64
}

// OrderPlaced says that an order is stored. It is enough to build the order again.
type OrderPlaced struct {
	OrderID  string    `json:"order_id"`
	Name     string    `json:"name"`
	Amount   int64     `json:"amount"` // minor units
	Currency string    `json:"currency"`
	Status   string    `json:"status"` // placed
	Version  int64     `json:"version"`
	PlacedAt time.Time `json:"placed_at"` // UTC
}

// Key returns order.placed.
func (OrderPlaced) Key() string { return "order.placed" }

// Subject returns the order's id.
func (e OrderPlaced) Subject() string { return e.OrderID }

// OrderVersion returns the order's version.
func (e OrderPlaced) OrderVersion() int64 { return e.Version }

// DispatchAssigned says that a courier takes the order.
type DispatchAssigned struct {
	OrderID    string    `json:"order_id"`
	CourierID  string    `json:"courier_id"`
	AssignedAt time.Time `json:"assigned_at"` // UTC
	Version    int64     `json:"version"`     // of the order that was dispatched
}

// Key returns dispatch.assigned.
func (DispatchAssigned) Key() string { return "dispatch.assigned" }

// Subject returns the order's id.
func (e DispatchAssigned) Subject() string { return e.OrderID }

// OrderVersion returns the version of the order that was dispatched.
func (e DispatchAssigned) OrderVersion() int64 { return e.Version }
