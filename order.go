package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"takeout/ports/httpapi"
)

// orderCmd are the commands about orders.
type orderCmd struct {
	Place    orderPlaceCmd    `cmd:"" help:"Place an order."`
	Get      orderGetCmd      `cmd:"" help:"Show an order."`
	List     orderListCmd     `cmd:"" help:"List orders, newest first."`
	Watch    orderWatchCmd    `cmd:"" help:"Show an order each time it changes, until it is dispatched or at its end."`
	Cancel   orderCancelCmd   `cmd:"" help:"Cancel an order that is not delivered."`
	Timeline orderTimelineCmd `cmd:"" help:"Show every stored step of an order's way, the oldest first."`
}

type orderPlaceCmd struct {
	client
	Name           string `arg:"" help:"What is ordered."`
	Amount         int64  `arg:"" help:"What it costs, in minor units: 2850 for 28.50."`
	Currency       string `default:"CNY" help:"ISO 4217 code."`
	OrderID        string `name:"order-id" help:"The order's id; takeout makes one if absent."`
	IdempotencyKey string `name:"idempotency-key" help:"Placing twice under one key places once; a new key if absent."`
}

// Run places the order. It tries again under the same key when it cannot know whether the order was placed.
func (c *orderPlaceCmd) Run(out output) error {
	body := map[string]any{"name": c.Name, "amount": c.Amount, "currency": c.Currency}
	if c.OrderID != "" {
		body["order_id"] = c.OrderID
	}
	if c.IdempotencyKey == "" {
		c.IdempotencyKey = uuid.NewString()
	}
	var order httpapi.OrderBody
	err := c.call(context.Background(), http.MethodPost, "/v1/orders", body, c.IdempotencyKey, &order)
	for tries := 1; retryable(err) && tries < 5; tries++ {
		fmt.Fprintf(out.err, "takeout: %v; trying again under the same key\n", err)
		time.Sleep(time.Second)
		err = c.call(context.Background(), http.MethodPost, "/v1/orders", body, c.IdempotencyKey, &order)
	}
	switch {
	case retryable(err):
		return fmt.Errorf("%w; to try again without placing it twice, add --idempotency-key %s", err, c.IdempotencyKey)
	case err != nil:
		return err
	}
	return out.orders(c.formatFlag, order, order)
}

type orderGetCmd struct {
	client
	OrderID string `arg:"" name:"order-id" help:"The order's id."`
}

// Run shows the order.
func (c *orderGetCmd) Run(out output) error {
	order, err := c.get(context.Background(), c.OrderID)
	if err != nil {
		return err
	}
	return out.orders(c.formatFlag, order, order)
}

type orderListCmd struct {
	client
	Status string `help:"Only orders with this status: placed, dispatched, delivered, cancelled."`
	Limit  int    `default:"20" help:"The most orders to list (1 to 200)."`
	Cursor string `help:"next_cursor of the page before."`
}

// Run lists a page of orders.
func (c *orderListCmd) Run(out output) error {
	query := url.Values{"limit": {strconv.Itoa(c.Limit)}}
	if c.Status != "" {
		query.Set("status", c.Status)
	}
	if c.Cursor != "" {
		query.Set("cursor", c.Cursor)
	}
	var page struct {
		Items      []httpapi.OrderBody `json:"items"`
		NextCursor string              `json:"next_cursor"`
	}
	if err := c.call(context.Background(), http.MethodGet, "/v1/orders?"+query.Encode(), nil, "", &page); err != nil {
		return err
	}
	if err := out.orders(c.formatFlag, page, page.Items...); err != nil {
		return err
	}
	if page.NextCursor != "" && out.table(c.formatFlag) {
		fmt.Fprintf(out.err, "more: takeout order list --cursor %s (with the same flags)\n", page.NextCursor)
	}
	return nil
}

type orderWatchCmd struct {
	client
	OrderID string        `arg:"" name:"order-id" help:"The order's id."`
	Timeout time.Duration `default:"1m" help:"Give up after this time."`
}

// Run shows the order each time that its version changes.
func (c *orderWatchCmd) Run(out output) error {
	watching, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(watching, c.Timeout)
	defer cancel()
	var unseen error // why the order could not be looked at the last time
	for seen := int64(0); ; {
		order, err := c.get(ctx, c.OrderID)
		if err != nil && !retryable(err) {
			return err
		}
		if seen == 0 || ctx.Err() == nil { // otherwise it is the end that broke the last look
			unseen = err
		}
		if err == nil && order.Version > seen {
			seen = order.Version
			if err := out.orders(c.formatFlag, order, order); err != nil {
				return err
			}
			if order.Status != "placed" {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			switch {
			case watching.Err() != nil:
				return fmt.Errorf("stopped before order %s was dispatched", c.OrderID)
			case unseen != nil:
				return fmt.Errorf("order %s cannot be seen: %w", c.OrderID, unseen)
			}
			return fmt.Errorf("order %s was not dispatched within %s", c.OrderID, c.Timeout)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

type orderCancelCmd struct {
	client
	OrderID string `arg:"" name:"order-id" help:"The order's id."`
	Reason  string `help:"Why, for people; at most 200 characters."`
}

// Run cancels the order. Cancelling again changes nothing, so it may be tried again.
func (c *orderCancelCmd) Run(out output) error {
	var order httpapi.OrderBody
	body := map[string]any{"reason": c.Reason}
	if err := c.call(context.Background(), http.MethodPost, "/v1/orders/"+url.PathEscape(c.OrderID)+"/cancel", body, "", &order); err != nil {
		return err
	}
	return out.orders(c.formatFlag, order, order)
}

type orderTimelineCmd struct {
	client
	OrderID string `arg:"" name:"order-id" help:"The order's id."`
}

// Run shows the order's way. What is missing because a database was not asked or does not answer is said on stderr.
func (c *orderTimelineCmd) Run(out output) error {
	var timeline httpapi.TimelineBody
	err := c.call(context.Background(), http.MethodGet, "/v1/orders/"+url.PathEscape(c.OrderID)+"/timeline", nil, "", &timeline)
	if err != nil {
		return err
	}
	rows := [][]string{{"TIME", "DATABASE", "STEP", "HANDLER", "EVENT", "DETAIL"}}
	for _, step := range timeline.Steps {
		rows = append(rows, []string{
			step.At.Format("2006-01-02T15:04:05.000000Z07:00"), step.Database, step.Step, step.Handler,
			strings.TrimSpace(step.Event + " " + step.EventID), step.Detail,
		})
	}
	if err := out.write(c.formatFlag, timeline, rows); err != nil {
		return err
	}
	if out.table(c.formatFlag) {
		for _, missing := range slices.Concat(timeline.NotAsked, timeline.Unavailable) {
			fmt.Fprintln(out.err, "without the steps of", missing)
		}
	}
	return nil
}

func (c *client) get(ctx context.Context, id string) (httpapi.OrderBody, error) {
	var order httpapi.OrderBody
	err := c.call(ctx, http.MethodGet, "/v1/orders/"+url.PathEscape(id), nil, "", &order)
	return order, err
}

// orders writes orders as a table, or value as JSON.
func (o output) orders(format formatFlag, value any, orders ...httpapi.OrderBody) error {
	rows := [][]string{{"ORDER", "STATUS", "COURIER", "AMOUNT", "NAME", "PLACED"}}
	for _, order := range orders {
		courier := "-"
		if order.Dispatch != nil {
			courier = order.Dispatch.CourierID
		}
		rows = append(rows, []string{
			order.OrderID, order.Status, courier, fmt.Sprintf("%d %s", order.Amount, order.Currency), order.Name,
			order.PlacedAt.Format(time.RFC3339),
		})
	}
	return o.write(format, value, rows)
}
