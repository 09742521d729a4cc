package httpapi

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"takeout/domain"
)

// Problem is every error that this API answers with: RFC 9457, application/problem+json.
type Problem struct {
	Type      string         `json:"type" doc:"Names the kind of problem; the part after # is its code." example:"https://takeout.example/problems#order_not_found"`
	Title     string         `json:"title" doc:"The status in words." example:"Not Found"`
	Status    int            `json:"status" doc:"The HTTP status." example:"404"`
	Detail    string         `json:"detail" doc:"What is wrong and what to do about it, for people." example:"there is no order o1"`
	Code      string         `json:"code" doc:"What is wrong, for programs; it does not change." example:"order_not_found"`
	Instance  string         `json:"instance,omitempty" doc:"The path of the request." example:"/v1/orders/o1"`
	RequestID string         `json:"request_id,omitempty" doc:"Names this request in the log." example:"req_0198"`
	OrderID   string         `json:"order_id,omitempty" doc:"The order that may have been placed, when that is not known: ask for it, or place it again under this id."`
	Errors    []FieldProblem `json:"errors,omitempty" doc:"The inputs that are wrong."`

	retryAfter string
}

// FieldProblem is what is wrong with one input.
type FieldProblem struct {
	Field  string `json:"field" doc:"The input: a member of the body, a parameter or a header." example:"amount"`
	Code   string `json:"code" example:"amount_out_of_range"`
	Detail string `json:"detail" example:"amount must be between 1 and 2147483647 minor units"`
}

// maxErrors is how many wrong parameters a problem names.
const maxErrors = 3

const problemBase = "https://takeout.example/problems#"

func newProblem(status int, code, detail string) *Problem {
	return &Problem{Type: problemBase + code, Title: http.StatusText(status), Status: status, Code: code, Detail: detail}
}

// Error implements error.
func (p *Problem) Error() string { return p.Detail }

// GetStatus implements huma.StatusError.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType implements huma.ContentTypeFilter.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// GetHeaders implements huma.HeadersError.
func (p *Problem) GetHeaders() http.Header {
	if p.retryAfter == "" {
		return nil
	}
	return http.Header{"Retry-After": {p.retryAfter}}
}

// complete adds what only the request knows.
func (p *Problem) complete(r *http.Request) {
	p.RequestID = requestID(r.Context())
	if path := r.URL.EscapedPath(); len(path) <= 256 {
		p.Instance = path
	}
}

// statusOf is the one table from the kind of an error to an HTTP status. What is not in it is a 500, whose text stays
// in the log.
var statusOf = map[domain.Kind]int{
	domain.Invalid:     http.StatusUnprocessableEntity,
	domain.NotFound:    http.StatusNotFound,
	domain.Conflict:    http.StatusConflict,
	domain.Busy:        http.StatusConflict,
	domain.Exhausted:   http.StatusServiceUnavailable,
	domain.Unavailable: http.StatusServiceUnavailable,
}

// problem turns an error of a use case into an answer. An error that nobody expected is logged and not shown.
func (s *server) problem(ctx context.Context, err error) *Problem {
	if p, ok := errors.AsType[*Problem](err); ok {
		return p
	}
	known, ok := errors.AsType[*domain.Error](err)
	if !ok || statusOf[known.Kind] == 0 {
		if errors.Is(err, context.Canceled) {
			return newProblem(http.StatusServiceUnavailable, "client_gone", "the client closed the connection before the answer") // nobody reads it
		}
		s.logger.Error("a request failed", "request_id", requestID(ctx), "error", err)
		return newProblem(http.StatusInternalServerError, "internal_error", "something unexpected went wrong; the log has it under the request_id")
	}
	p := newProblem(statusOf[known.Kind], known.Code, known.Message)
	if known.Field != "" {
		p.Errors = []FieldProblem{{known.Field, known.Code, known.Message}}
	}
	switch known.Kind {
	case domain.Busy, domain.Unavailable, domain.Exhausted:
		p.retryAfter = "1"
		if tell, leftOut := s.refusals.tell(known.Code, time.Now()); tell {
			s.logger.Warn("a request cannot be served now", "request_id", requestID(ctx), "code", known.Code, "error", err, "left_out_before", leftOut)
		}
	}
	return p
}

// refusals keep one trouble from flooding the log, which is needed most then.
type refusals struct {
	mu     sync.Mutex
	byCode map[string]refused
}

// refused is how often requests were refused with a code since then, and of them those that were not told.
type refused struct {
	since         time.Time
	times, untold int
}

// mostTold is how many refusals with one code are told in a second.
const mostTold = 10

// tell says whether another refusal is to be told now, and how many before it were not.
func (r *refusals) tell(code string, now time.Time) (tell bool, untold int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.byCode[code]
	if now.Sub(one.since) >= time.Second {
		one.since, one.times = now, 0
	}
	if one.times++; one.times > mostTold {
		one.untold++
	} else {
		tell, untold, one.untold = true, one.untold, 0
	}
	r.byCode[code] = one
	return tell, untold
}

// humaProblem makes a Problem of what huma finds wrong before a handler runs. With bodies decoded by us, a 422 of
// huma's is about a parameter of the URL or a header, which is a request that nobody could read: 400.
func humaProblem(status int, detail string, errs ...error) huma.StatusError {
	code := map[int]string{
		http.StatusBadRequest:            "bad_request",
		http.StatusUnprocessableEntity:   "parameter_invalid",
		http.StatusRequestEntityTooLarge: "body_too_large",
		http.StatusRequestTimeout:        "body_too_slow",
		http.StatusUnsupportedMediaType:  "content_type_unsupported",
		http.StatusNotAcceptable:         "not_acceptable",
	}[status]
	if code == "" {
		code, detail = "internal_error", "something unexpected went wrong"
	}
	if status == http.StatusUnprocessableEntity {
		status, detail = http.StatusBadRequest, "a parameter is not valid"
	}
	if detail == "request body is required" {
		code, detail = "body_empty", "the body must be a JSON object; it is empty"
	}
	p := newProblem(status, code, detail)
	for _, err := range errs {
		if problem, ok := errors.AsType[*Problem](err); ok {
			return problem
		}
		if len(p.Errors) == maxErrors {
			break
		}
		if d, ok := err.(huma.ErrorDetailer); ok {
			p.Errors = append(p.Errors, FieldProblem{named(d.ErrorDetail().Location), code, d.ErrorDetail().Message})
		}
	}
	return p
}
