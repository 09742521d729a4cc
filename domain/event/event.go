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

// Order is what most events say of the order they are about. It is enough to build the order again, so that every
// service can work with what it is told, and each keeps what another may have lost.
type Order struct {
	OrderID  string    `json:"order_id"`
	Name     string    `json:"name"`
	Amount   int64     `json:"amount"` // minor units
	Currency string    `json:"currency"`
	Status   string    `json:"status"` // of the order at this version
	Version  int64     `json:"version"`
	PlacedAt time.Time `json:"placed_at"` // UTC
}

// Subject returns the order's id.
func (o Order) Subject() string { return o.OrderID }

// OrderVersion returns the order's version.
func (o Order) OrderVersion() int64 { return o.Version }

// OrderPlaced says that an order is stored. When it is announced again later, for somebody who lost it, it also says
// who brings or brought it.
type OrderPlaced struct {
	Order
	Dispatch *Courier `json:"dispatch,omitzero"`

	// BeforePayments says that the order was placed before payments were taken here: it must not be charged.
	BeforePayments bool `json:"before_payments,omitzero"`
}

// Courier is who brings an order, as the order service knows it.
type Courier struct {
	CourierID   string     `json:"courier_id"`
	AssignedAt  time.Time  `json:"assigned_at"`           // UTC
	DeliveredAt *time.Time `json:"delivered_at,omitzero"` // UTC, absent until delivered
}

// Key returns order.placed.
func (OrderPlaced) Key() string { return "order.placed" }

// OrderCancelled says that an order is not wanted any more, or cannot be served.
type OrderCancelled struct {
	Order
	Reason      string    `json:"reason"`       // as order.Cancel takes it
	CancelledAt time.Time `json:"cancelled_at"` // UTC
}

// Key returns order.cancelled.
func (OrderCancelled) Key() string { return "order.cancelled" }

// DispatchAssigned says that a courier takes the order.
type DispatchAssigned struct {
	OrderID    string    `json:"order_id"`
	CourierID  string    `json:"courier_id"`
	AssignedAt time.Time `json:"assigned_at"` // UTC
	Version    int64     `json:"version"`     // of the order that was dispatched

	// Correction says that the order service may have heard of another courier, and that this one is right.
	Correction bool `json:"correction,omitzero"`
}

// Key returns dispatch.assigned.
func (DispatchAssigned) Key() string { return "dispatch.assigned" }

// Subject returns the order's id.
func (e DispatchAssigned) Subject() string { return e.OrderID }

// OrderVersion returns the version of the order that was dispatched.
func (e DispatchAssigned) OrderVersion() int64 { return e.Version }

// DispatchDelivered says that the courier brought the order.
type DispatchDelivered struct {
	OrderID     string    `json:"order_id"`
	CourierID   string    `json:"courier_id"`
	AssignedAt  time.Time `json:"assigned_at"`         // UTC
	DeliveredAt time.Time `json:"delivered_at"`        // UTC
	Version     int64     `json:"version"`             // of the order that was dispatched
	Correction  bool      `json:"correction,omitzero"` // as in DispatchAssigned
}

// Key returns dispatch.delivered.
func (DispatchDelivered) Key() string { return "dispatch.delivered" }

// Subject returns the order's id.
func (e DispatchDelivered) Subject() string { return e.OrderID }

// OrderVersion returns the version of the order that was dispatched.
func (e DispatchDelivered) OrderVersion() int64 { return e.Version }

// DispatchImpossible says that no courier was found in time.
type DispatchImpossible struct {
	Order
	GivenUpAt time.Time `json:"given_up_at"` // UTC
}

// Key returns dispatch.impossible.
func (DispatchImpossible) Key() string { return "dispatch.impossible" }

// PaymentSucceeded says that the order is paid.
type PaymentSucceeded struct {
	Order
	Reference string    `json:"reference"` // the gateway's
	PaidAt    time.Time `json:"paid_at"`   // UTC
}

// Key returns payment.succeeded.
func (PaymentSucceeded) Key() string { return "payment.succeeded" }

// PaymentRefused says that the order will not be paid.
type PaymentRefused struct {
	Order
	Reason    string    `json:"reason"`     // the gateway's
	RefusedAt time.Time `json:"refused_at"` // UTC
}

// Key returns payment.refused.
func (PaymentRefused) Key() string { return "payment.refused" }

// PaymentRefunded says that what was paid for the order is paid back.
type PaymentRefunded struct {
	Order
	Reference  string    `json:"reference"`   // the gateway's, of the payment
	RefundedAt time.Time `json:"refunded_at"` // UTC
}

// Key returns payment.refunded.
func (PaymentRefunded) Key() string { return "payment.refunded" }

// PointsAwarded says that the order earned points.
type PointsAwarded struct {
	OrderID   string    `json:"order_id"`
	Points    int64     `json:"points"`
	AwardedAt time.Time `json:"awarded_at"` // UTC
	Version   int64     `json:"version"`    // of the order that was paid
}

// Key returns points.awarded.
func (PointsAwarded) Key() string { return "points.awarded" }

// Subject returns the order's id.
func (e PointsAwarded) Subject() string { return e.OrderID }

// OrderVersion returns the version of the order that was paid.
func (e PointsAwarded) OrderVersion() int64 { return e.Version }
