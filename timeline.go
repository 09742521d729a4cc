package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"takeout/ports/httpapi"
)

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
