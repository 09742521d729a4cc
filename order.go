package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	"takeout/ports/httpapi"
)

// orderCmd are the commands that talk to a running takeout, over its HTTP API as every other client does.
type orderCmd struct {
	Place    orderPlaceCmd    `cmd:"" help:"Place an order."`
	Get      orderGetCmd      `cmd:"" help:"Show an order."`
	List     orderListCmd     `cmd:"" help:"List orders, newest first."`
	Watch    orderWatchCmd    `cmd:"" help:"Show an order each time it changes, until it is dispatched or at its end."`
	Cancel   orderCancelCmd   `cmd:"" help:"Cancel an order that is not delivered."`
	Timeline orderTimelineCmd `cmd:"" help:"Show every stored step of an order's way, the oldest first."`
}

type client struct {
	formatFlag
	URL string `name:"url" env:"TAKEOUT_URL" default:"http://127.0.0.1:8080" help:"Where takeout serves HTTP."`

	operator string // who acts, empty if nobody needs to know
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
	if err != nil {
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	for seen := int64(0); ; {
		order, err := c.get(ctx, c.OrderID)
		if err != nil && !retryable(err) {
			return err
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
			return fmt.Errorf("order %s was not dispatched within %s", c.OrderID, c.Timeout)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *client) get(ctx context.Context, id string) (httpapi.OrderBody, error) {
	var order httpapi.OrderBody
	err := c.call(ctx, http.MethodGet, "/v1/orders/"+url.PathEscape(id), nil, "", &order)
	return order, err
}

// errUnknown is an error after which the same request may be sent again under the same key.
type errUnknown struct{ error }

func retryable(err error) bool {
	_, ok := errors.AsType[errUnknown](err)
	return ok
}

// call sends a request and decodes the answer. What the server says is wrong becomes the error.
func (c *client) call(ctx context.Context, method, path string, body any, key string, answer any) error {
	var payload io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		payload = bytes.NewReader(encoded)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	server, err := url.Parse(c.URL)
	if err != nil || server.Scheme != "http" && server.Scheme != "https" || server.Host == "" {
		return usage(fmt.Errorf("--url (TAKEOUT_URL): must be such as http://127.0.0.1:8080"))
	}
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.URL, "/")+path, payload)
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if strings.ContainsFunc(key+c.operator, unicode.IsControl) {
		return usage(errors.New("--idempotency-key and --operator: must be one line of text")) // or it would not even be sent
	}
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	if c.operator != "" {
		request.Header.Set("X-Operator", c.operator)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return errUnknown{fmt.Errorf("no takeout answers at %s: %w; is takeout serve running there? (--url)", server.Redacted(), errors.Unwrap(err))}
	}
	defer response.Body.Close()
	if response.StatusCode >= http.StatusBadRequest {
		var problem httpapi.Problem
		if err := json.NewDecoder(response.Body).Decode(&problem); err != nil || problem.Detail == "" {
			problem.Detail = response.Status
		}
		err := fmt.Errorf("%s", problem.Detail)
		for _, field := range problem.Errors {
			if field.Detail != problem.Detail {
				err = fmt.Errorf("%w; %s: %s", err, field.Field, field.Detail)
			}
		}
		if response.StatusCode >= http.StatusInternalServerError {
			return errUnknown{err}
		}
		return err
	}
	return json.NewDecoder(response.Body).Decode(answer)
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
