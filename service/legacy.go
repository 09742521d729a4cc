package service

import (
	"context"
	"math/rand/v2"
	"time"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/event"
	"takeout/ports/messaging"
)

const earlyWarning = "orders are announced before they are stored (--publish=before-commit), and some are not stored then; for demonstrations only"

func (s *Service) announcesEarly() bool {
	return s.cfg.Publish == "before-commit" && s.cfg.has(messaging.Order)
}

// announceEarly makes the order service announce orders in the legacy way if the settings say so, and keeps saying it.
func (s *Service) announceEarly() error {
	if !s.announcesEarly() {
		return nil
	}
	s.useCases.Orders.PublishBeforeCommit(app.LegacyPublishing{
		Publish: s.publishNow,
		Fail:    func() bool { return rand.Float64() < s.cfg.FailAfterPublish },
	})
	s.alongside(func(ctx context.Context) {
		for ctx.Err() == nil {
			s.logger.Warn(earlyWarning, "fail_after_publish", s.cfg.FailAfterPublish)
			select {
			case <-ctx.Done():
			case <-time.After(time.Minute):
			}
		}
	})
	return nil
}

// publishNow sends an event to the broker without an outbox.
func (s *Service) publishNow(ctx context.Context, e event.Event) error {
	msg, err := sqlstore.NewMessage(e, s.cfg.eventKeys())
	if err != nil {
		return err
	}
	msg.SetContext(ctx)
	return s.broker.Publish(e.Key(), msg)
}
