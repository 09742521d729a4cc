package app

import (
	"bytes"
	"context"
	"errors"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

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
// answered right now. It is Unavailable with the code outcome_unknown if the order may be stored or not.
//
// Orders that are placed at the same time are stored together, which is many times faster; each has its own answer.
func (s *Orders) Place(ctx context.Context, cmd PlaceOrder) (Placement, error) {
	o, err := order.Place(cmd.ID, cmd.Name, cmd.Money, time.Now())
	if err != nil {
		return Placement{}, err
	}
	answer, err := cmd.Request.answer(o)
	if err != nil {
		return Placement{}, err
	}
	p := &placing{order: o, request: cmd.Request, answer: answer}
	crashpoint.Here("order.place/before-transaction")
	if s.legacy != nil {
		err = s.placeOne(ctx, p)
	} else {
		err = p.known(ctx, s.together.Do(ctx, p))
	}
	crashpoint.Here("order.place/after-commit")
	if err != nil {
		return Placement{}, err // others may still work on p
	}
	return p.placement, nil
}

// placing is an order that is being placed.
type placing struct {
	order   *order.Order
	request *Request
	answer  *Answer // nil if request is

	ran       bool // a transaction that stored it with others came to its COMMIT
	placement Placement
}

// known classifies err, which came from placing p together with others.
func (p *placing) known(ctx context.Context, err error) error {
	kind := domain.KindOf(err)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrUnsettled), p.ran && (kind == domain.Unavailable || kind == domain.Busy || ctx.Err() != nil):
		return &domain.Error{
			Kind: domain.Unavailable, Code: "outcome_unknown", Cause: err,
			Message: "it is not known whether the order is stored; ask again with the same id or key",
		}
	case kind == domain.Unknown && errors.Is(err, context.DeadlineExceeded):
		return &domain.Error{Kind: domain.Unavailable, Code: "database_slow", Message: "the order could not be stored in time", Cause: err}
	}
	return err
}

// placeMany places orders whose ids and keys nobody has used before. Those of others are answered alone.
func (s *Orders) placeMany(ctx context.Context, many []*placing) (map[int]error, error) {
	var answers []Answer
	var orders []*order.Order
	var events []event.Event
	own, keys, ids := map[int]error{}, map[string]bool{}, map[order.ID]bool{}
	for i, p := range many {
		id := p.order.ID()
		if ids[id] || p.answer != nil && keys[p.answer.Key] {
			own[i] = ErrAlone // of two who ask for the same
			continue
		}
		ids[id] = true
		if p.answer != nil {
			keys[p.answer.Key] = true
			answers = append(answers, *p.answer)
		}
		orders, events = append(orders, p.order), append(events, placedEvent(p.order.Snapshot()))
	}
	err := s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		if err := tx.Answers.AddMany(ctx, answers); err != nil {
			return err
		}
		crashpoint.Here("order.place/after-answer")
		if err := tx.Orders.AddMany(ctx, orders); err != nil {
			return err
		}
		if err := tx.Outbox.Publish(ctx, events...); err != nil {
			return err
		}
		for i, p := range many {
			if own[i] == nil {
				p.ran, p.placement = true, p.fresh()
			}
		}
		crashpoint.Here("order.place/before-commit")
		return nil
	})
	if domain.KindOf(err) == domain.Conflict {
		s.used(ctx, many, own)
	}
	return own, err
}

// used notes which of the orders have a key or an id that was used before. If it cannot be read, each finds out alone.
func (s *Orders) used(ctx context.Context, many []*placing, own map[int]error) {
	keys, ids := []string{}, make([]order.ID, len(many))
	for i, p := range many {
		ids[i] = p.order.ID()
		if p.answer != nil {
			keys = append(keys, p.answer.Key)
		}
	}
	usedKeys, usedIDs := map[string]bool{}, map[order.ID]bool{}
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) error {
		answered, err := tx.Answers.Used(ctx, keys)
		if err != nil {
			return err
		}
		for _, key := range answered {
			usedKeys[key] = true
		}
		placed, err := tx.Orders.GetMany(ctx, ids)
		for _, o := range placed {
			usedIDs[o.ID()] = true
		}
		return err
	})
	if err != nil {
		return
	}
	for i, p := range many {
		if usedIDs[ids[i]] || p.answer != nil && usedKeys[p.answer.Key] {
			own[i] = ErrAlone
		}
	}
}

// fresh is the placement of an order that was not placed before.
func (p *placing) fresh() Placement {
	placement := Placement{Order: p.order.Snapshot()}
	if p.answer != nil {
		placement.Answer = p.answer.Body
	}
	return placement
}

// placeOne places an order alone. p.ran tells which of two requests with one key, that were tried together and could not,
// placed the order.
func (s *Orders) placeOne(ctx context.Context, p *placing) error {
	o, answer, runs := p.order, p.answer, 0
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		runs++
		ranBefore := p.ran || runs > 1
		p.placement = p.fresh()
		if answer != nil {
			err := tx.Answers.Add(ctx, *answer)
			if domain.KindOf(err) == domain.Conflict {
				p.placement, err = replay(ctx, tx, *answer, ranBefore)
				return err
			}
			if err != nil {
				return err
			}
			crashpoint.Here("order.place/after-answer")
		}
		err := tx.Orders.Add(ctx, o)
		if domain.KindOf(err) == domain.Conflict {
			p.placement, err = placedBefore(ctx, tx, o, p.request, ranBefore)
			return err
		}
		if err != nil {
			return err
		}
		err = s.announce(ctx, tx, placedEvent(o.Snapshot()))
		crashpoint.Here("order.place/before-commit")
		return err
	})
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
	if !p.Before {
		p.Order = o.Snapshot() // whatever others have done to it since
	}
	if r == nil {
		return p, nil
	}
	if p.Answer, err = r.Answer(stored.AsPlaced()); err != nil {
		return Placement{}, err
	}
	return p, tx.Answers.Amend(ctx, r.Key, p.Answer)
}

// LegacyPublishing is how a service without an outbox announces orders: straight to the broker, before its COMMIT. An
// order whose transaction then fails was announced and is not stored. It is for showing what the compensation heals.
type LegacyPublishing struct {
	Publish func(ctx context.Context, e event.Event) error
	Fail    func() bool // whether to roll back after publishing
}

// PublishBeforeCommit makes Place announce orders in the legacy way.
func (s *Orders) PublishBeforeCommit(l LegacyPublishing) { s.legacy = &l }

func (s *Orders) announce(ctx context.Context, tx OrderTx, e event.OrderPlaced) error {
	if s.legacy == nil {
		return tx.Outbox.Publish(ctx, e)
	}
	if err := s.legacy.Publish(ctx, e); err != nil {
		return &domain.Error{Kind: domain.Unavailable, Code: "not_announced", Message: "the order could not be announced and is not stored", Cause: err}
	}
	if s.legacy.Fail() {
		return domain.Errorf(domain.Unavailable, "rolled_back_on_purpose",
			"order %s was announced and then rolled back on purpose: this program runs with --fail-after-publish", e.OrderID)
	}
	return nil
}
