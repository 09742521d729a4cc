package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"takeout/ports/httpapi"
)

// dispatchCmd are the commands about dispatches.
type dispatchCmd struct {
	Get       dispatchGetCmd       `cmd:"" help:"Show an order's dispatch."`
	Delivered dispatchDeliveredCmd `cmd:"" help:"Say that the courier brought the order."`
}

type dispatchGetCmd struct {
	client
	OrderID string `arg:"" name:"order-id" help:"The order's id."`
}

// Run shows the dispatch.
func (c *dispatchGetCmd) Run(out output) error {
	return c.dispatch(out, http.MethodGet, "/v1/dispatches/"+url.PathEscape(c.OrderID))
}

type dispatchDeliveredCmd struct {
	client
	OrderID string `arg:"" name:"order-id" help:"The order's id."`
}

// Run marks the dispatch as delivered. Doing so again changes nothing.
func (c *dispatchDeliveredCmd) Run(out output) error {
	return c.dispatch(out, http.MethodPost, "/v1/dispatches/"+url.PathEscape(c.OrderID)+"/delivered")
}

func (c *client) dispatch(out output, method, path string) error {
	var d httpapi.DispatchBody
	if err := c.call(context.Background(), method, path, nil, "", &d); err != nil {
		return err
	}
	courier := "-"
	if d.CourierID != nil {
		courier = *d.CourierID
	}
	return out.write(c.formatFlag, d, [][]string{
		{"ORDER", "STATE", "COURIER", "AMOUNT", "NAME"},
		{d.OrderID, d.State, courier, fmt.Sprintf("%d %s", d.Amount, d.Currency), d.Name},
	})
}

// courierCmd are the commands about couriers.
type courierCmd struct {
	List   courierListCmd   `cmd:"" help:"Show the roster."`
	Add    courierAddCmd    `cmd:"" help:"Put a courier on the roster."`
	Change courierChangeCmd `cmd:"" help:"Change a courier."`
}

type courierListCmd struct{ client }

// Run shows the roster.
func (c *courierListCmd) Run(out output) error {
	var roster struct {
		Items []httpapi.CourierBody `json:"items"`
	}
	if err := c.call(context.Background(), http.MethodGet, "/v1/couriers", nil, "", &roster); err != nil {
		return err
	}
	return out.couriers(c.formatFlag, roster, roster.Items...)
}

type courierAddCmd struct {
	client
	Name      string `arg:"" help:"The courier's name."`
	CourierID string `name:"courier-id" help:"The courier's id; takeout makes one if absent."`
	OnDuty    bool   `name:"on-duty" default:"true" negatable:"" help:"Whether the courier takes orders."`
	Capacity  int    `help:"How many orders the courier carries at the same time; 0 for no limit."`
}

// Run adds the courier.
func (c *courierAddCmd) Run(out output) error {
	body := map[string]any{"name": c.Name, "on_duty": c.OnDuty, "capacity": c.Capacity}
	if c.CourierID != "" {
		body["courier_id"] = c.CourierID
	}
	var courier httpapi.CourierBody
	if err := c.call(context.Background(), http.MethodPost, "/v1/couriers", body, "", &courier); err != nil {
		return err
	}
	return out.couriers(c.formatFlag, courier, courier)
}

type courierChangeCmd struct {
	client
	CourierID string  `arg:"" name:"courier-id" help:"The courier's id."`
	Name      *string `help:"The courier's name."`
	OnDuty    *bool   `name:"on-duty" negatable:"" help:"Whether the courier takes orders."`
	Capacity  *int    `help:"How many orders the courier carries at the same time; 0 for no limit."`
}

// Run changes what is given.
func (c *courierChangeCmd) Run(out output) error {
	body := map[string]any{}
	if c.Name != nil {
		body["name"] = *c.Name
	}
	if c.OnDuty != nil {
		body["on_duty"] = *c.OnDuty
	}
	if c.Capacity != nil {
		body["capacity"] = *c.Capacity
	}
	var courier httpapi.CourierBody
	if err := c.call(context.Background(), http.MethodPatch, "/v1/couriers/"+url.PathEscape(c.CourierID), body, "", &courier); err != nil {
		return err
	}
	return out.couriers(c.formatFlag, courier, courier)
}

// couriers writes couriers as a table, or value as JSON.
func (o output) couriers(format formatFlag, value any, couriers ...httpapi.CourierBody) error {
	rows := [][]string{{"COURIER", "NAME", "ON DUTY", "ORDERS", "CAPACITY"}}
	for _, c := range couriers {
		capacity := "no limit"
		if c.Capacity > 0 {
			capacity = strconv.Itoa(c.Capacity)
		}
		rows = append(rows, []string{c.CourierID, c.Name, map[bool]string{true: "yes", false: "no"}[c.OnDuty], strconv.Itoa(c.Active), capacity})
	}
	return o.write(format, value, rows)
}
