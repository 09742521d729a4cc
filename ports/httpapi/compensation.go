package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"takeout/app"
)

// CompensationBody is the state of the compensation as operators see it.
type CompensationBody struct {
	Stopped   bool   `json:"stopped" doc:"Missing orders are not made again until somebody resumes it; their events wait, and nothing is lost."`
	Why       string `json:"why" doc:"Why it is stopped; empty if it is not."`
	Missing   int    `json:"missing" doc:"Orders made again within the last minute, or within the one in which it stopped."`
	Announced int    `json:"announced" doc:"Orders of which an event came within the same minute."`
	Limit     int    `json:"limit" doc:"It stops when more orders than this are missing, and these are more than half of all announced."`
}

func compensationBody(c app.CompensationState) CompensationBody {
	return CompensationBody{Stopped: c.Why != "", Why: c.Why, Missing: c.Missing, Announced: c.Announced, Limit: c.Limit}
}

type compensationView struct{ Body CompensationBody }

type resumeBody struct {
	Reason string `json:"reason" minLength:"1" maxLength:"200" doc:"What made sure that the orders are really missing. It goes to the log."`
}

func (s *server) registerCompensation(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-compensation", Method: http.MethodGet, Path: "/v1/compensation", Summary: "Is the compensation stopped?",
		Description: "The compensation makes orders again that were announced and are not stored. It is this process's own state.",
		Tags:        []string{"compensation"},
	}, func(context.Context, *struct{}) (*compensationView, error) {
		return &compensationView{compensationBody(s.Compensation.State())}, nil
	})
	register[resumeBody](api, huma.Operation{
		OperationID: "resume-compensation", Method: http.MethodPost, Path: "/v1/compensation/resume", Summary: "Let the compensation go on",
		Tags: []string{"compensation"},
	}, s.resumeCompensation)
}

func (s *server) resumeCompensation(ctx context.Context, in *rawBody) (*compensationView, error) {
	var body resumeBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	before := s.Compensation.State()
	if err := s.Compensation.Resume(body.Reason); err != nil {
		return nil, s.problem(ctx, err)
	}
	s.logger.Warn("the compensation was resumed", "request_id", requestID(ctx), "reason", body.Reason, "was_stopped_because", before.Why)
	return &compensationView{compensationBody(s.Compensation.State())}, nil
}
