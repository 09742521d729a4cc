package service

import (
	"context"
	"fmt"
	"time"

	"takeout/ports/httpapi"
	"takeout/ports/messaging"
)

const (
	// waitingEvery is how often orders that wait for a courier are looked at: what makes room may happen in another
	// process, and a deadline passes by itself.
	waitingEvery = time.Second
	// waitedTooLong is how long orders may wait for a courier before somebody should know.
	waitedTooLong = time.Minute
)

// assignWaiting keeps giving couriers to orders that wait, in the role that dispatches.
func (s *Service) assignWaiting() error {
	if !s.cfg.has(messaging.Dispatch) {
		return nil
	}
	s.alongside(func(ctx context.Context) {
		for failing := false; ctx.Err() == nil; {
			more, err := s.useCases.Dispatches.AssignWaiting(ctx)
			if err != nil && ctx.Err() == nil && !failing {
				s.logger.Warn("orders that wait cannot be given to couriers now; this is tried again", "error", err)
			}
			failing = err != nil
			if more {
				continue
			}
			select {
			case <-ctx.Done():
			case <-s.useCases.Dispatches.Room():
			case <-time.After(waitingEvery):
			}
		}
	})
	return nil
}

// checkWaiting says how many orders wait for a courier, and reports whether somebody should do something about it.
func (s *Service) checkWaiting(ctx context.Context) (httpapi.Check, error) {
	b, err := s.useCases.Dispatches.Backlog(ctx)
	if err != nil {
		return httpapi.Check{}, err
	}
	if b.Waiting == 0 {
		return httpapi.Check{OK: true, Detail: "no order waits for a courier"}, nil
	}
	check := httpapi.Check{
		OK:     b.OnDuty && time.Since(b.Oldest) < waitedTooLong,
		Detail: fmt.Sprintf("%s orders wait for a courier, the oldest since %s", atLeast(b.Waiting), b.Oldest.Format(time.RFC3339)),
	}
	if !b.OnDuty {
		check.Detail += "; no courier is on duty"
	}
	return check, nil
}
