package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

type livez struct {
	Body struct {
		Status string `json:"status" enum:"alive"`
	}
}

type readyz struct {
	Status int
	Body   Health
}

func (s *server) registerHealth(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "livez", Method: http.MethodGet, Path: "/livez", Summary: "Is the process alive?", Tags: []string{"health"},
	}, func(context.Context, *struct{}) (*livez, error) {
		out := &livez{}
		out.Body.Status = "alive"
		return out, nil
	})
	huma.Register(api, huma.Operation{
		OperationID: "readyz", Method: http.MethodGet, Path: "/readyz", Summary: "Can it do its work?",
		Description: "A broker that is away does not make a process unready: orders are taken and wait in the outbox.",
		Tags:        []string{"health"},
	}, func(ctx context.Context, in *struct {
		Verbose string `query:"verbose" doc:"Accepted and ignored: the answer is always verbose."`
	}) (*readyz, error) {
		out := &readyz{Status: http.StatusOK, Body: s.Health(ctx)}
		if out.Body.Status == "unavailable" {
			out.Status = http.StatusServiceUnavailable
		}
		return out, nil
	})
}
