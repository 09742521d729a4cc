package check

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"fmt"

	"takeout/domain/event"
	"takeout/verify/history"
)

// triesAtOnce is how often a message is tried in a row, before each delay and after the last.
const triesAtOnce = 4

// keep names a failure: a message that a consumer keeps for a person.
type keep struct {
	consumer, eventID string
	body              [sha256.Size]byte
}

// readFailures reads what waits for its next attempt, and what was given up.
func (c *checker) readFailures(ctx context.Context) error {
	wanted, kept := map[keep]Foreign{}, map[keep]bool{}
	for _, f := range c.in.Foreign {
		for _, r := range c.routes {
			if f.Want == Kept && r.Event == f.Key {
				wanted[keep{r.Queue, f.EventID, f.Body}] = f
			}
		}
	}
	for _, service := range services {
		if err := c.readRetries(ctx, service); err != nil {
			return err
		}
		if err := c.readKept(ctx, service, wanted, kept); err != nil {
			return err
		}
	}
	for k, f := range wanted {
		if !kept[k] {
			c.add("I9", "lost", f.OrderID, -1, says("the foreign message %q of key %s must be a failure of %s, with its bytes as they came, and is not",
				f.EventID, f.Key, k.consumer))
		}
	}
	return nil
}

// setAside notes that the consumer neither handled the message nor lost it.
func (c *checker) setAside(consumer, eventID string) {
	c.aside[messageOf(consumer, history.Hash(eventID))] = true
}

func messageOf(consumer string, event uint64) uint64 { return history.Hash(consumer) ^ event }

// addAbout adds a violation about a message, and marks its order as one of which more needs not be said.
func (c *checker) addAbout(id, invariant, class string, text tell) {
	i, known := c.find(id)
	if !known {
		c.add(invariant, class, id, -1, text)
		return
	}
	c.records[i].set(pending)
	c.addTo(i, verdict{invariant, class, text})
}

func (c *checker) readRetries(ctx context.Context, service string) error {
	var queue, eventID, id, text string
	var tier int
	return c.each(ctx, service, "retry", "queue, uuid, order_id, tier, error_text", func(scan func(...any) error) error {
		if err := scan(&queue, &eventID, &id, &tier, &text); err != nil {
			return err
		}
		c.search(text, says("the error text of a retry in the %s database", service), id)
		c.setAside(queue, eventID)
		c.addAbout(id, "I4", "stuck", says("message %s waits in the %s database for its delay %d at %s; nothing should wait any more", eventID, service, tier, queue))
		return nil
	})
}

func (c *checker) readKept(ctx context.Context, service string, wanted map[keep]Foreign, kept map[keep]bool) error {
	var (
		number, size                             int64
		consumer, eventID, id, class, code, text string
		fingerprint, headers                     []byte
		attempts, times                          int
		state                                    string
	)
	return c.each(ctx, service, "failure", "id, consumer, fingerprint, message_id, order_id, error_class, error_code, error_text, attempts, headers, "+
		"payload_size, state, occurrences", func(scan func(...any) error) error {
		err := scan(&number, &consumer, &fingerprint, &eventID, &id, &class, &code, &text, &attempts, &headers, &size, &state, &times)
		if err != nil {
			return err
		}
		c.report.Failures++
		c.search(text, says("the error text of failure %d in the %s database", number, service), id)
		c.setAside(consumer, eventID)
		body, print, length, err := c.payload(ctx, service, number, eventID, headers)
		if err != nil {
			return err
		}
		if length != size || string(print[:]) != string(fingerprint) && len(eventID) < 255 {
			c.add("I9", "mismatch", id, -1, says("failure %d of the %s database must hold the %d bytes of message %q as they came, and holds %d that have another fingerprint",
				number, service, size, eventID, length))
		}
		if most := triesAtOnce * (c.in.RetryDelays + 1) * times; attempts > most {
			c.add("I10", "unbounded", id, -1, says("failure %d of the %s database, message %s at %s, was tried %d times; %d is the most", number, service, eventID, consumer, attempts, most))
		}
		for _, k := range []keep{{consumer, eventID, body}, {consumer, "", body}} {
			if _, explained := wanted[k]; explained {
				kept[k] = true
				return nil
			}
		}
		if c.collects(id, consumer, code) || state != "open" && state != "retrying" {
			return nil
		}
		c.addAbout(id, "I8", "given_up", says("%s gave up message %s, which nobody planted: failure %d of the %s database, %s, %s: %s",
			consumer, eventID, number, service, class, code, text))
		return nil
	})
}

// collects reports whether the failure is one that only a person can end: the courier had brought the order before its
// payment was refused.
func (c *checker) collects(id, consumer, code string) bool {
	i, known := c.find(id)
	return known && consumer == "order.cancel-unpaid" && code == "order_delivered" && c.records[i].is(delivered) && c.records[i].payment == refused
}

// payload returns the SHA-256 of a failure's bytes, the fingerprint that they have with the message's id and signature, and how many
// they are.
func (c *checker) payload(ctx context.Context, service string, number int64, eventID string, headers []byte) (body, fingerprint [sha256.Size]byte, length int64, err error) {
	plain, marked := sha256.New(), sha256.New()
	_, _ = marked.Write([]byte(eventID + "\x00"))
	err = c.page(ctx, service, "SELECT bytes FROM failure_payload WHERE failure_id = ? ORDER BY part", []any{number}, func(rows *sql.Rows) error {
		var part sql.RawBytes
		if err := rows.Scan(&part); err != nil {
			return err
		}
		length += int64(len(part))
		_, _ = plain.Write(part)
		_, _ = marked.Write(part)
		return nil
	})
	fingerprint = [sha256.Size]byte(marked.Sum(nil))
	var came map[string]string
	if _ = json.Unmarshal(headers, &came); came[event.SignatureHeader] != "" {
		fingerprint = sha256.Sum256(fmt.Appendf(nil, "%x %x", fingerprint, came[event.SignatureHeader]))
	}
	return [sha256.Size]byte(plain.Sum(nil)), fingerprint, length, err
}
