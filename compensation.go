package main

import (
	"context"
	"net/http"
	"strconv"

	"takeout/ports/httpapi"
)

// compensationCmd are the commands about the compensation of a running takeout.
type compensationCmd struct {
	Status compensationStatusCmd `cmd:"" help:"Show whether it is stopped, and why."`
	Resume compensationResumeCmd `cmd:"" help:"Let it go on, after making sure that the orders are really missing."`
}

type compensationStatusCmd struct{ client }

// Run shows the state.
func (c *compensationStatusCmd) Run(out output) error {
	var state httpapi.CompensationBody
	if err := c.call(context.Background(), http.MethodGet, "/v1/compensation", nil, "", &state); err != nil {
		return err
	}
	return out.compensation(c.formatFlag, state)
}

type compensationResumeCmd struct {
	client
	Reason string `arg:"" help:"What made sure that the orders are really missing."`
}

// Run resumes, and shows the state.
func (c *compensationResumeCmd) Run(out output) error {
	var state httpapi.CompensationBody
	body := map[string]any{"reason": c.Reason}
	if err := c.call(context.Background(), http.MethodPost, "/v1/compensation/resume", body, "", &state); err != nil {
		return err
	}
	return out.compensation(c.formatFlag, state)
}

func (o output) compensation(format formatFlag, s httpapi.CompensationBody) error {
	state := "running"
	if s.Stopped {
		state = "stopped: " + s.Why
	}
	return o.write(format, s, [][]string{
		{"MISSING", "ANNOUNCED", "LIMIT", "STATE"},
		{strconv.Itoa(s.Missing), strconv.Itoa(s.Announced), strconv.Itoa(s.Limit), state},
	})
}
