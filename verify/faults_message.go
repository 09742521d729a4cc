//go:build unix

package verify

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/sqldb"
	"takeout/domain/event"
	"takeout/verify/check"
)

// payloadCanary is in payloads that nobody can read, and must be in no log.
const payloadCanary = "canary-of-a-payload-77b0"

// messageFaults send what a stranger, a mistaken producer or a replay would.
var messageFaults = []kind{
	{name: "another-id", group: "message", inflict: anotherID},
	{name: "duplicate", group: "message", inflict: duplicate},
	{name: "forged", group: "message", inflict: forged},
	{name: "old-event", group: "message", inflict: oldEvent},
	{name: "poison", group: "message", inflict: poison},
	{name: "recreate", group: "message", inflict: recreate},
	{name: "early", group: "message", inflict: early},
}

func newMessage(p amqp.Publishing) *message.Message {
	msg := message.NewMessage(p.MessageId, p.Body)
	for name, value := range p.Headers {
		msg.Metadata.Set(name, fmt.Sprint(value))
	}
	return msg
}

// announce sends an event, signed with the key unless that is empty.
func (r *run) announce(ctx context.Context, e event.Event, at time.Time, key string, copies int, want check.Fate) error {
	id := "evt_" + uuid.Must(uuid.NewV7()).String()
	body, err := event.Encode(id, at, e)
	if err != nil {
		return err
	}
	headers := amqp.Table{}
	if key != "" {
		keys, err := event.ParseKeys(key)
		if err != nil {
			return err
		}
		headers[event.SignatureHeader] = keys.Sign(body)
	}
	return r.send(ctx, e.Key(), copies, amqp.Publishing{
		MessageId: id, Headers: headers, Body: body, ContentType: "application/json", DeliveryMode: amqp.Persistent,
	}, check.Foreign{EventID: id, OrderID: e.Subject(), Key: e.Key(), Body: sha256.Sum256(body), Want: want})
}

func (r *run) send(ctx context.Context, key string, copies int, p amqp.Publishing, expect check.Foreign) error {
	if err := r.stack.publish(ctx, key, copies, p); err != nil {
		return err
	}
	r.foreign = append(r.foreign, expect)
	return nil
}

// placedOrder returns one of the newest orders as it was announced.
func (r *run) placedOrder(ctx context.Context, rnd *rand.Rand) (event.Order, error) {
	db, err := sqldb.Open("order", r.stack.databases["order"], r.stack.logger)
	if err != nil {
		return event.Order{}, err
	}
	defer db.Close()
	var o event.Order
	err = db.Reader().QueryRowContext(ctx, "SELECT orderId, name, order_money, currency, placed_at FROM order_info ORDER BY id DESC LIMIT 1 OFFSET ?",
		rnd.IntN(50)).Scan(&o.OrderID, &o.Name, &o.Amount, &o.Currency, &o.PlacedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return event.Order{}, fmt.Errorf("%w: there is no order yet", errMissed)
	}
	o.Status, o.Version, o.PlacedAt = "placed", 1, o.PlacedAt.UTC()
	return o, err
}

// anotherID announces an order again under another event id, which the inbox cannot know.
func anotherID(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	for range 5 {
		o, err := r.placedOrder(ctx, rnd)
		if err != nil {
			return "", err
		}
		if err := r.announce(ctx, event.OrderPlaced{Order: o}, time.Now(), eventKey, 1, check.NoEffect); err != nil {
			return "", err
		}
	}
	return "five orders announced again", nil
}

// duplicate sends one event a thousand times.
func duplicate(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	o, err := r.placedOrder(ctx, rnd)
	if err != nil {
		return "", err
	}
	copies := 1000
	if r.stack.amqpURL == "" {
		copies = 100
	}
	err = r.announce(ctx, event.OrderPlaced{Order: o}, time.Now(), eventKey, copies, check.NoEffect)
	return fmt.Sprintf("%d copies of one event", copies), err
}

// strange is an order that nobody placed.
func strange(rnd *rand.Rand) event.Order {
	return event.Order{
		OrderID: "strange-" + uuid.NewString(), Name: "Nobody's dinner", Amount: 1 + rnd.Int64N(1000), Currency: "CNY", Status: "placed", Version: 1,
		PlacedAt: time.Now().UTC().Truncate(time.Microsecond),
	}
}

// forged announces orders that nobody placed, without the key or with another one.
func forged(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	for _, key := range []string{"", "another-key-of-16-bytes-or-more"} {
		if err := r.announce(ctx, event.OrderPlaced{Order: strange(rnd)}, time.Now(), key, 1, check.Kept); err != nil {
			return "", err
		}
	}
	return "one unsigned, one signed by somebody else", nil
}

// oldEvent announces orders of a time of which nobody remembers what was handled, and of a time to come.
func oldEvent(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	for _, at := range []time.Time{time.Now().AddDate(-1, 0, 0), time.Now().AddDate(0, 0, 1)} {
		if err := r.announce(ctx, event.OrderPlaced{Order: strange(rnd)}, at, eventKey, 1, check.Kept); err != nil {
			return "", err
		}
	}
	return "one of last year, one of tomorrow", nil
}

// poison sends what nobody can read.
func poison(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	keys, err := event.ParseKeys(eventKey)
	if err != nil {
		return "", err
	}
	all := routes()
	for _, body := range [][]byte{
		{}, []byte("{"), []byte(`"` + payloadCanary + `"`), []byte("\xff\xfe" + payloadCanary), []byte(`{"specversion":"1.0","data":{"amount":"` + payloadCanary + `"}}`),
	} {
		id := "poison-" + uuid.NewString()
		key := all[rnd.IntN(len(all))].Event
		headers := amqp.Table{event.SignatureHeader: keys.Sign(body)} // whoever has the key can be mistaken, too
		if err := r.send(ctx, key, 1, amqp.Publishing{MessageId: id, Headers: headers, Body: body, DeliveryMode: amqp.Persistent},
			check.Foreign{EventID: id, Key: key, Body: sha256.Sum256(body), Want: check.Kept}); err != nil {
			return "", err
		}
	}
	return "five that nobody can read", nil
}

// recreate announces orders that are not stored, as a producer does whose transaction failed after it had announced them.
func recreate(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	for range 3 {
		if err := r.announce(ctx, event.OrderPlaced{Order: strange(rnd)}, time.Now(), eventKey, 2, check.Recreated); err != nil {
			return "", err
		}
	}
	return "three orders announced that were rolled back", nil
}

// early tells of the dispatch of an order that nobody knows, or not yet: it must be tried again later, several times, and then
// be kept.
func early(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	o := strange(rnd)
	return "one of an order that never comes", r.announce(ctx, event.DispatchAssigned{
		OrderID: o.OrderID, CourierID: "nobody", AssignedAt: time.Now().UTC(), Version: 1,
	}, time.Now(), eventKey, 1, check.Kept)
}
