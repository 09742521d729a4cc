package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"takeout/domain/order"
)

// TimelineBody is the way of an order.
type TimelineBody struct {
	OrderID     string     `json:"order_id"`
	Steps       []StepBody `json:"steps" doc:"The oldest first."`
	NotAsked    []string   `json:"not_asked" doc:"Databases that this process does not open: their steps are missing." example:"payment: runs elsewhere"`
	Unavailable []string   `json:"unavailable" doc:"Databases that do not answer: their steps are missing." example:"dispatch: does not answer"`
}

// StepBody is one step of an order's way.
type StepBody struct {
	At        time.Time `json:"at" doc:"UTC, by the clock of the process that did it."`
	Step      string    `json:"step" doc:"placed, in_outbox, confirmed, handled, attempt_failed, retry_waits, kept, failure_action, waiting, dispatched, delivered, cancelled, released, impossible, charging, paid, payment_refused, payment_void, refunded, points_awarded, points_revoked, recreated, drift_found, drift_resolved and others; left_out stands for older ones of which there are too many." example:"confirmed"`
	Database  string    `json:"database" doc:"Of the service whose database says so." example:"order"`
	Detail    string    `json:"detail" doc:"For people."`
	Event     string    `json:"event,omitempty" doc:"The routing key of the event that it is about." example:"order.placed"`
	EventID   string    `json:"event_id,omitempty" doc:"The event or message that it is about."`
	Handler   string    `json:"handler,omitempty" doc:"The queue whose handler it was." example:"dispatch.assign-courier"`
	FailureID int64     `json:"failure_id,omitempty" doc:"The failure that it is about."`
}

type timelineView struct{ Body TimelineBody }

func (s *server) registerTimeline(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-order-timeline", Method: http.MethodGet, Path: "/v1/orders/{order_id}/timeline", Summary: "Show an order's way",
		Description: "Every step that is stored, but of each kind no more than that of the newest thousand rows, from all databases that this process opens and that answer. Each bears the time at which it " +
			"happened: a handler may be done before the broker's confirm is noted. The first attempts of a handler follow at once and are not " +
			"stored; what comes of them is: handled, attempt_failed with a further attempt that waits, or kept for a person. An event that was " +
			"confirmed twice was sent twice. Steps that are older than --history-retention, --dedup-horizon or --failure-retention may be gone.",
		Tags: []string{"orders"}, Errors: []int{404, 503},
	}, s.getTimeline)
}

func (s *server) getTimeline(ctx context.Context, in *orderIDInput) (*timelineView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil { // no order can have this id
		return nil, newProblem(http.StatusNotFound, "order_not_found", "there is no such order")
	}
	way, err := s.Timeline.Of(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	body := TimelineBody{OrderID: id.String(), Steps: []StepBody{}, NotAsked: []string{}, Unavailable: []string{}}
	for _, step := range way.Steps {
		body.Steps = append(body.Steps, StepBody{
			At: step.At, Step: step.Name, Database: step.Database, Detail: step.Detail,
			Event: step.Event, EventID: step.EventID, Handler: step.Handler, FailureID: step.FailureID,
		})
	}
	for _, service := range way.NotAsked {
		body.NotAsked = append(body.NotAsked, service+": runs elsewhere")
	}
	for _, service := range way.Unavailable {
		body.Unavailable = append(body.Unavailable, service+": does not answer")
	}
	return &timelineView{body}, nil
}
