package httpapi

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"takeout/app/reconcile"
)

const (
	// reconcileTimeout is how long an answer waits for a run. Less than the time that a connection has for its answer.
	reconcileTimeout = 10 * time.Second
	// openShown is how many findings are shown.
	openShown = 1000
)

// ReconciliationBody is the state of the reconciliation.
type ReconciliationBody struct {
	Report *reconcile.Report   `json:"report,omitempty" doc:"Of the last run; absent before the first."`
	Open   []reconcile.Finding `json:"open" doc:"What is not resolved, the oldest first, 1000 at most."`
}

type reconciliationView struct{ Body ReconciliationBody }

type reportView struct {
	Status   int
	Location string `header:"Location"`
	Body     struct {
		*reconcile.Report
		Running bool `json:"running" doc:"The run goes on; GET shows its report when it has ended."`
	}
}

type reconcileBody struct {
	Repair bool       `json:"repair,omitempty" doc:"Repair what can be. Amounts never are."`
	From   *time.Time `json:"from,omitempty" doc:"Only orders placed from then on."`
	To     *time.Time `json:"to,omitempty" doc:"Only orders placed before then."`
	Full   bool       `json:"full,omitempty" doc:"Everything, whether it was compared before or not."`
}

func (s *server) registerReconciliation(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-reconciliation", Method: http.MethodGet, Path: "/v1/reconciliation", Summary: "Show what the last comparison of the services found",
		Tags: []string{"reconciliation"}, Errors: []int{503},
	}, s.getReconciliation)
	register[reconcileBody](api, huma.Operation{
		OperationID: "reconcile", Method: http.MethodPost, Path: "/v1/reconciliation", Summary: "Compare the services now",
		Description: "Answers 202 when it takes longer than ten seconds; it then goes on.",
		Tags:        []string{"reconciliation"}, Errors: []int{503},
	}, s.reconcile)
}

func (s *server) getReconciliation(ctx context.Context, _ *struct{}) (*reconciliationView, error) {
	report, ran, err := s.Reconciliation.Last(ctx)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	open, err := s.Reconciliation.Unresolved(ctx, openShown)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	out := &reconciliationView{ReconciliationBody{Open: open}}
	if ran {
		out.Body.Report = &report
	}
	return out, nil
}

func (s *server) reconcile(ctx context.Context, in *rawBody) (*reportView, error) {
	var body reconcileBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	q := reconcile.Request{Repair: body.Repair, Full: body.Full}
	if body.From != nil {
		q.From = *body.From
	}
	if body.To != nil {
		q.To = *body.To
	}
	// A run takes longer than a use case may.
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), reconcileTimeout)
	defer cancel()
	report, err := s.Reconcile(wait, q)
	out := &reportView{Status: http.StatusOK}
	switch {
	case errors.Is(err, context.DeadlineExceeded) && wait.Err() != nil:
		out.Status, out.Location, out.Body.Running = http.StatusAccepted, "/v1/reconciliation", true
	case err != nil:
		return nil, s.problem(ctx, err)
	default:
		out.Body.Report = &report
	}
	return out, nil
}
