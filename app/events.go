package app

import (
	"time"

	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// placedEvent announces the order with all that is known of it.
func placedEvent(o order.Snapshot) event.OrderPlaced {
	e := event.OrderPlaced{Order: facts(o)}
	if o.CourierID != "" {
		e.Dispatch = &event.Courier{CourierID: o.CourierID, AssignedAt: o.AssignedAt}
		if !o.DeliveredAt.IsZero() {
			e.Dispatch.DeliveredAt = &o.DeliveredAt
		}
	}
	return e
}

func cancelledEvent(o order.Snapshot) event.OrderCancelled {
	return event.OrderCancelled{Order: facts(o), Reason: o.CancelReason, CancelledAt: o.CancelledAt}
}

func facts(o order.Snapshot) event.Order {
	return event.Order{
		OrderID: o.ID.String(), Name: o.Name, Amount: o.Money.Amount(), Currency: o.Money.Currency(),
		Status: o.Status.String(), Version: o.Version, PlacedAt: o.PlacedAt,
	}
}

// orderEvent is termsOf the other way round.
func orderEvent(t order.Terms) event.Order {
	return facts(order.Snapshot{
		ID: t.OrderID, Name: t.Name, Money: t.Money, PlacedAt: t.PlacedAt, Status: order.Placed, Version: t.Version,
	})
}

// rebuild returns the order of the event as it was placed. The rules of an order hold for one that is announced, too.
func rebuild(e event.Order) (*order.Order, error) {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return nil, err
	}
	money, err := domain.NewMoney(e.Amount, e.Currency)
	if err != nil {
		return nil, err
	}
	if err := domain.CheckTime("placed_at", e.PlacedAt); err != nil {
		return nil, err
	}
	return order.Place(id, e.Name, money, e.PlacedAt)
}

// termsOf returns what the event says was ordered. The rules of an order hold for one that is announced, too: whatever is
// dispatched or charged could have been placed.
func termsOf(e event.Order) (order.Terms, error) {
	o, err := rebuild(e)
	if err != nil {
		return order.Terms{}, err
	}
	return termsAt(o, e.Version), nil
}

func placedTerms(e event.OrderPlaced) (order.Terms, error) {
	o, err := asAnnounced(e)
	if err != nil {
		return order.Terms{}, err
	}
	return termsAt(o, e.Version), nil
}

func cancelledTerms(e event.OrderCancelled) (order.Terms, error) {
	o, err := asCancelled(e)
	if err != nil {
		return order.Terms{}, err
	}
	return termsAt(o, e.Version), nil
}

// termsAt returns what was ordered, as an event told it that has this version.
func termsAt(o *order.Order, version int64) order.Terms {
	s := o.Snapshot()
	return order.Terms{OrderID: s.ID, Name: s.Name, Money: s.Money, PlacedAt: s.PlacedAt, Version: version}
}

// asAnnounced returns the order of the event as far as it had come. One that is announced while it is on its way comes
// with its courier: without one it would be sent out again. All consumers of the event ask here, or placedTerms: what one
// refuses, no other may act on.
func asAnnounced(e event.OrderPlaced) (*order.Order, error) {
	o, err := rebuild(e.Order)
	if err != nil {
		return nil, err
	}
	if e.Version > maxAnnounced {
		return nil, domain.InvalidField("version", "version_out_of_range", "version must be at most %d", maxAnnounced)
	}
	if d := e.Dispatch; d != nil {
		courier, err := courierOf(d.CourierID, d.AssignedAt)
		if err != nil {
			return nil, err
		}
		o.MarkDispatched(courier.String(), d.AssignedAt)
		if d.DeliveredAt != nil {
			if err := domain.CheckTime("delivered_at", *d.DeliveredAt); err != nil {
				return nil, err
			}
			o.MarkDelivered(courier.String(), d.AssignedAt, *d.DeliveredAt)
		}
	}
	if o.Snapshot().Status.String() != e.Status {
		return nil, domain.Errorf(domain.Invalid, "event_contradictory",
			"the event says that order %s is in another status than follows from its dispatch", e.OrderID)
	}
	o.CatchUp(e.Version)
	return o, nil
}

// maxAnnounced is the highest version of a placed order that is believed. It leaves room: an order that is made again goes
// on from there, and what it announces later must be a version that events can have.
const maxAnnounced = 1 << 30

// asCancelled is asAnnounced of an order that is cancelled.
func asCancelled(e event.OrderCancelled) (*order.Order, error) {
	o, err := rebuild(e.Order)
	if err != nil {
		return nil, err
	}
	if err := domain.CheckTime("cancelled_at", e.CancelledAt); err != nil {
		return nil, err
	}
	if _, err := o.Cancel(e.Reason, e.CancelledAt); err != nil {
		return nil, err
	}
	o.CatchUp(min(e.Version, event.MaxVersion-1)) // which has a next
	return o, nil
}

// courierOf returns the courier of an event, who was assigned at that time, which may not be known any more.
func courierOf(id string, assigned time.Time) (dispatch.CourierID, error) {
	if !assigned.IsZero() {
		if err := domain.CheckTime("assigned_at", assigned); err != nil {
			return dispatch.CourierID{}, err
		}
	}
	return dispatch.ParseCourierID(id)
}

// earner is the order that earned what the event says. It is Invalid if no order can earn that much.
func earner(e event.PointsAwarded) (order.ID, error) {
	if e.Points < 0 || e.Points > domain.MaxAmount {
		return order.ID{}, domain.InvalidField("points", "points_out_of_range", "points must be between 0 and %d", domain.MaxAmount)
	}
	return order.ParseID(e.OrderID)
}
