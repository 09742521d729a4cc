package app

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/event"
)

// Patient makes placements wait for those that are being stored however long these take.
func (s *Orders) Patient() { s.together.Patience = 0 }

// Waiting returns how many placements wait to be stored.
func (s *Orders) Waiting() int {
	s.together.mu.Lock()
	defer s.together.mu.Unlock()
	return len(s.together.queue)
}

// AtOnce returns how many transactions Place has at the same time.
func (s *Orders) AtOnce() int { return s.together.Parallel }

// SettleTogether stores in one transaction that the gateway has charged the orders.
func (s *Payments) SettleTogether(ctx context.Context, orders ...event.Order) error {
	var all []charged
	for _, o := range orders {
		bill, err := termsOf(o)
		if err != nil {
			return err
		}
		all = append(all, charged{order: o, id: bill.OrderID, reference: "ref", at: domain.Micro(time.Now())})
	}
	return s.settleMany(ctx, all)
}
