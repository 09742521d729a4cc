package app

import (
	"bytes"
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Orders is what customers and the other services can do with orders.
type Orders struct{ store Store[OrderTx] }

// NewOrders returns the use cases over the order service's database.
func NewOrders(store Store[OrderTx]) *Orders { return &Orders{store} }

// PlaceOrder asks for a new order.
type PlaceOrder struct {
	ID      order.ID // chosen by the client, or new
	Name    string
	Money   domain.Money
	Request *Request // nil if the client sent no idempotency key
}

// Request is a request that must have one effect and one answer however often it is sent.
type Request struct {
	Key         string
	Fingerprint [32]byte
	Answer      func(order.Snapshot) ([]byte, error) // makes the body that is stored and sent again
}

// Placement is how an order was placed.
type Placement struct {
	Order  order.Snapshot
	Answer []byte // the stored body, nil if the request had no key
	Before bool   // another request had placed the order
}

// Place stores a new order and, in the same transaction, the event that announces it and the answer to the request.
// Placing the same order again changes nothing and is no error. It is Invalid if a value breaks a rule or the key
// was used for another request, Conflict if the id belongs to another order, and Busy if the same request is being
// answered right now.
func (s *Orders) Place(ctx context.Context, cmd PlaceOrder) (Placement, error) {
	o, err := order.Place(cmd.ID, cmd.Name, cmd.Money, time.Now())
	if err != nil {
		return Placement{}, err
	}
	answer, err := cmd.Request.answer(o)
	if err != nil {
		return Placement{}, err
	}
	var placed Placement
	runs := 0
	err = s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		runs++
		placed = Placement{Order: o.Snapshot()}
		if answer != nil {
			placed.Answer = answer.Body
			err := tx.Answers.Add(ctx, *answer)
			if domain.KindOf(err) == domain.Conflict {
				placed, err = replay(ctx, tx, *answer, runs > 1)
				return err
			}
			if err != nil {
				return err
			}
		}
		err := tx.Orders.Add(ctx, o)
		if domain.KindOf(err) == domain.Conflict {
			placed, err = placedBefore(ctx, tx, o, cmd.Request, runs > 1)
			return err
		}
		if err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, placedEvent(o.Snapshot()))
	})
	return placed, err
}

// answer returns what to store for the request: what the client is sent when o is placed now.
func (r *Request) answer(o *order.Order) (*Answer, error) {
	if r == nil {
		return nil, nil
	}
	body, err := r.Answer(o.Snapshot())
	if err != nil {
		return nil, err
	}
	return &Answer{Key: r.Key, Fingerprint: r.Fingerprint, OrderID: o.Snapshot().ID, Body: body}, nil
}

// replay returns the answer that is stored under the key. If this call ran before and it is the very answer that it
// would have stored, that run was committed without our knowing, and the order is this call's own.
func replay(ctx context.Context, tx OrderTx, now Answer, ranBefore bool) (Placement, error) {
	stored, err := tx.Answers.Get(ctx, now.Key)
	if err != nil {
		return Placement{}, err
	}
	if stored.Fingerprint != now.Fingerprint {
		return Placement{}, domain.InvalidField("Idempotency-Key", "idempotency_key_reused",
			"this Idempotency-Key was used for another request; send a new key with a new request")
	}
	o, err := tx.Orders.Get(ctx, stored.OrderID)
	if err != nil {
		return Placement{}, err
	}
	return Placement{Order: o.Snapshot(), Answer: stored.Body, Before: !ranBefore || !bytes.Equal(stored.Body, now.Body)}, nil
}

// placedBefore tells an order that is placed again from another one with the same id. The same order may be stored
// because the client sends it again, because the answer to this call's own COMMIT was lost, or because the
// compensation was faster.
func placedBefore(ctx context.Context, tx OrderTx, o *order.Order, r *Request, ranBefore bool) (Placement, error) {
	stored, err := tx.Orders.Get(ctx, o.Snapshot().ID)
	if err != nil {
		return Placement{}, err
	}
	if !stored.SameRequest(o) {
		return Placement{}, domain.Errorf(domain.Conflict, "order_id_taken",
			"order %s exists with other content; choose another order_id", o.Snapshot().ID)
	}
	p := Placement{Order: stored.Snapshot(), Before: !ranBefore || stored.AsPlaced() != o.AsPlaced()}
	if r == nil {
		return p, nil
	}
	if p.Answer, err = r.Answer(stored.AsPlaced()); err != nil {
		return Placement{}, err
	}
	return p, tx.Answers.Amend(ctx, r.Key, p.Answer)
}

func placedEvent(o order.Snapshot) event.OrderPlaced {
	return event.OrderPlaced{
		OrderID: o.ID.String(), Name: o.Name, Amount: o.Money.Amount(), Currency: o.Money.Currency(),
		Status: o.Status.String(), Version: o.Version, PlacedAt: o.PlacedAt,
	}
}

// MarkDispatched records on the order that a courier has it. NotFound if there is no such order, or not yet.
func (s *Orders) MarkDispatched(ctx context.Context, e event.DispatchAssigned) error {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		return tx.Orders.Update(ctx, id, func(o *order.Order) bool {
			return o.MarkDispatched(e.CourierID, e.AssignedAt)
		})
	})
}

// Get returns the order. NotFound if there is none.
func (s *Orders) Get(ctx context.Context, id order.ID) (order.Snapshot, error) {
	var o *order.Order
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		o, err = tx.Orders.Get(ctx, id)
		return err
	})
	if err != nil {
		return order.Snapshot{}, err
	}
	return o.Snapshot(), nil
}

// List returns a page of orders, newest first.
func (s *Orders) List(ctx context.Context, q order.Query) (order.Page, error) {
	var page order.Page
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		page, err = tx.Orders.List(ctx, q)
		return err
	})
	return page, err
}
