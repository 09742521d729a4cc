package rabbitmq

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/app"
	"takeout/domain"
)

// contentType is what our messages carry: events in CloudEvents' structured JSON.
const contentType = "application/cloudevents+json"

// propertyPrefix marks metadata that Unmarshal made of AMQP properties.
const propertyPrefix = "amqp-"

var errTooMuchMetadata error = domain.Errorf(domain.Invalid, "metadata_too_big",
	"the metadata does not fit into one AMQP frame")

// Marshaler is between Watermill's messages and AMQP's: the UUID is the message id, metadata are headers.
//
// watermill-amqp's own refuses every header that is not text, and RabbitMQ adds such headers to a message that is
// delivered again or was dead-lettered, so that it would never be handled.
type Marshaler struct{}

var _ wamqp.Marshaler = Marshaler{}

// Marshal returns a persistent AMQP message. An Invalid error means that AMQP cannot carry it: a UUID or metadata
// key over 255 bytes, or a key that RabbitMQ takes for an instruction.
//
// Metadata that Unmarshal made and RabbitMQ's records of earlier deliveries are left out: they are not true of a new
// message, and RabbitMQ expects its own records in a form of its own.
func (Marshaler) Marshal(msg *message.Message) (amqp.Publishing, error) {
	if len(msg.UUID) > maxName {
		return amqp.Publishing{}, domain.Errorf(domain.Invalid, "message_id_too_long",
			"a message's UUID has at most %d bytes", maxName)
	}
	headers := make(amqp.Table, len(msg.Metadata))
	for key, value := range msg.Metadata {
		switch {
		case len(key) > maxName:
			return amqp.Publishing{}, domain.Errorf(domain.Invalid, "metadata_key_too_long",
				"metadata key %.40q… has over %d bytes", key, maxName)
		case key == "CC" || key == "BCC":
			return amqp.Publishing{}, domain.Errorf(domain.Invalid, "metadata_key_reserved",
				"metadata key %s is reserved: RabbitMQ routes by it", key)
		case !brokerOwned(key):
			headers[key] = value
		}
	}
	return amqp.Publishing{
		Headers:      headers,
		ContentType:  contentType,
		DeliveryMode: amqp.Persistent,
		MessageId:    msg.UUID,
		Body:         msg.Payload,
	}, nil
}

// brokerOwned says whether a header is RabbitMQ's or this adapter's record about one message on one queue.
func brokerOwned(key string) bool {
	for _, prefix := range []string{propertyPrefix, "x-death", "x-first-death-", "x-last-death-", "x-delivery-count",
		"x-acquired-count"} {
		if strings.HasPrefix(key, prefix) {
			return true
		}
	}
	return key == app.MetadataUndeliverable
}

// Unmarshal returns the message and never an error, because a message that cannot be read could never be settled.
// Headers become text, tables and lists as JSON. The AMQP properties that are set become metadata too, from
// "amqp-content-type" to "amqp-redelivered". The UUID is empty if another program sent no message id.
func (Marshaler) Unmarshal(d amqp.Delivery) (*message.Message, error) {
	msg := message.NewMessage(d.MessageId, d.Body)
	for key, value := range d.Headers {
		msg.Metadata[strings.ToValidUTF8(key, "\uFFFD")] = text(value)
	}
	// Only the queue that a message comes from can say so.
	delete(msg.Metadata, app.MetadataUndeliverable)

	for _, property := range []struct{ key, value string }{
		{"exchange", d.Exchange},
		{"routing-key", d.RoutingKey},
		{"content-type", d.ContentType},
		{"content-encoding", d.ContentEncoding},
		{"correlation-id", d.CorrelationId},
		{"reply-to", d.ReplyTo},
		{"expiration", d.Expiration},
		{"type", d.Type},
		{"user-id", d.UserId},
		{"app-id", d.AppId},
	} {
		if property.value != "" {
			msg.Metadata[propertyPrefix+property.key] = strings.ToValidUTF8(property.value, "\uFFFD")
		}
	}
	if !d.Timestamp.IsZero() {
		msg.Metadata[propertyPrefix+"timestamp"] = text(d.Timestamp)
	}
	if d.Redelivered {
		msg.Metadata[propertyPrefix+"redelivered"] = "true"
	}
	return msg, nil
}

// undeliverable says why the broker gave up a message that comes from a dead letter queue.
func undeliverable(d amqp.Delivery, deliveryLimit int) string {
	deaths, _ := d.Headers["x-death"].([]any)
	if len(deaths) == 0 {
		return "found among the undeliverable messages, without a reason"
	}
	last, _ := deaths[0].(amqp.Table)
	switch reason := text(last["reason"]); reason {
	case "delivery_limit":
		return fmt.Sprintf("delivered again %d times without success; the broker's delivery limit is reached",
			deliveryLimit)
	case "rejected":
		return "rejected by a consumer that did not want it again"
	case "expired":
		return "expired before it was handled"
	default:
		return "given up by the broker: " + reason
	}
}

// text returns a header's value for people.
func text(value any) string {
	switch v := value.(type) {
	case string:
		return strings.ToValidUTF8(v, "\uFFFD")
	case []byte:
		if utf8.Valid(v) {
			return string(v)
		}
		return base64.StdEncoding.EncodeToString(v)
	case bool:
		return strconv.FormatBool(v)
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case amqp.Decimal:
		return decimal(v)
	case amqp.Table, []any:
		encoded, err := json.Marshal(plain(v))
		if err != nil { // a float that JSON has no form for
			return strings.ToValidUTF8(fmt.Sprint(v), "\uFFFD")
		}
		return string(encoded)
	case nil:
		return ""
	default: // all that is left are numbers
		return fmt.Sprint(v)
	}
}

// plain returns a header's value with everything inside it in a form that JSON shows well.
func plain(value any) any {
	switch v := value.(type) {
	case amqp.Table:
		fields := make(map[string]any, len(v))
		for key, field := range v {
			fields[key] = plain(field)
		}
		return fields
	case []any:
		items := make([]any, len(v))
		for i, item := range v {
			items[i] = plain(item)
		}
		return items
	case []byte, time.Time, amqp.Decimal:
		return text(v)
	default:
		return v
	}
}

func decimal(d amqp.Decimal) string {
	digits := strconv.Itoa(int(d.Value))
	if d.Scale == 0 {
		return digits
	}
	return digits + "e-" + strconv.Itoa(int(d.Scale))
}

// headerSize returns at most how many bytes the properties of a message take in AMQP. They must fit into one frame:
// RabbitMQ closes the connection over a longer one, with everything that is under way on it.
func headerSize(p amqp.Publishing) int {
	const fixed = 100 // the frame, the property flags, lengths, delivery mode
	size := fixed + len(p.ContentType) + len(p.MessageId)
	for key, value := range p.Headers {
		size += 1 + len(key) + 1 + 4 + len(value.(string))
	}
	return size
}
