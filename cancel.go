package main

import (
	"context"
	"net/http"
	"net/url"

	"takeout/ports/httpapi"
)

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
