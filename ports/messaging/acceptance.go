package messaging

import (
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/domain"
	"takeout/domain/event"
)

// fastClock is how far ahead a producer's clock may be.
const fastClock = 5 * time.Minute

// Acceptance says which events are acted on. What is not accepted is kept for a person.
type Acceptance struct {
	Keys event.Keys // if there are any, an event must be signed with one of them
	// Horizon is how old an event may be, whether the broker delivers it or a person retries it. It must not be longer
	// than it is remembered which events were handled.
	Horizon time.Duration
}

// signed returns an Invalid error unless the message comes from somebody who has one of the keys.
func (a Acceptance) signed(msg *message.Message) error {
	return a.Keys.Verify(msg.Metadata.Get(event.SignatureHeader), msg.Payload)
}

// timely returns an Invalid error if the event was not made at a time from which an event can come.
func (a Acceptance) timely(made time.Time) error {
	switch age := time.Since(made); {
	case age > a.Horizon:
		return domain.Errorf(domain.Invalid, "too_old", "the event was made at %s, which is longer ago than it is remembered what was handled "+
			"(--dedup-horizon); see whether the order is right, and correct it by hand", made.Format(time.RFC3339))
	case age < -fastClock:
		return domain.Errorf(domain.Invalid, "bad_time", "the event was made at %s, which is in the future; set its producer's clock",
			made.Format(time.RFC3339))
	}
	return nil
}
