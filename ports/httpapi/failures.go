package httpapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"takeout/app"
	"takeout/domain"
)

const (
	maxShownPayload = 256 << 10 // bytes
	maxReason       = 500       // characters
	maxOperator     = 64        // characters
)

// FailureBody is a failure as operators see it in a list.
type FailureBody struct {
	ID            string     `json:"id" example:"dispatch-17"`
	Handler       string     `json:"handler" doc:"The queue whose consumer gave the message up." example:"dispatch.assign-courier"`
	Class         string     `json:"class" doc:"permanent: it can never work; transient: it was tried often enough; undeliverable: the broker gave it up."`
	Code          string     `json:"code" doc:"Of the error, for programs."`
	Error         string     `json:"error"`
	OrderID       string     `json:"order_id" doc:"Empty if the message could not be read."`
	MessageID     string     `json:"message_id"`
	State         string     `json:"state" enum:"open,retrying,resolved,discarded,replaced"`
	Attempts      int        `json:"attempts"`
	Occurrences   int        `json:"occurrences" doc:"How often the same message was given up."`
	PayloadSize   int64      `json:"payload_size" doc:"Bytes."`
	FirstFailedAt time.Time  `json:"first_failed_at" doc:"UTC."`
	LastFailedAt  time.Time  `json:"last_failed_at" doc:"UTC."`
	ClosedAt      *time.Time `json:"closed_at" doc:"UTC; null while it is open or being retried."`
	ReplacedBy    string     `json:"replaced_by" doc:"The event id of the corrected message, empty if there is none."`
}

// FailureDetailBody is all that is known of a failure.
type FailureDetailBody struct {
	FailureBody
	Headers          map[string]string   `json:"headers"`
	Payload          string              `json:"payload"`
	PayloadEncoding  string              `json:"payload_encoding" enum:"text,base64" doc:"base64 if the message is not UTF-8."`
	PayloadTruncated bool                `json:"payload_truncated" doc:"There is more: /v1/failures/{id}/payload has it all."`
	Actions          []FailureActionBody `json:"actions" doc:"Who did what, oldest first."`
}

// FailureActionBody is what somebody did with a failure.
type FailureActionBody struct {
	At       time.Time `json:"at" doc:"UTC."`
	Operator string    `json:"operator"`
	Action   string    `json:"action"`
	Reason   string    `json:"reason"`
}

// FailureGroupBody are failures with the same handler and error.
type FailureGroupBody struct {
	Service string    `json:"service"`
	Handler string    `json:"handler"`
	Class   string    `json:"class"`
	Code    string    `json:"code"`
	Error   string    `json:"error" doc:"With <order> and <message> in place of their ids."`
	Count   int       `json:"count"`
	First   time.Time `json:"first" doc:"UTC."`
	Last    time.Time `json:"last" doc:"UTC."`
	Example string    `json:"example" doc:"The id of the newest of them."`
}

// FailureListBody is a page of failures.
type FailureListBody struct {
	Items       []FailureBody `json:"items"`
	NextCursor  string        `json:"next_cursor" doc:"Empty on the last page."`
	Unavailable []string      `json:"unavailable" doc:"Services whose database is away: their failures are missing here."`
}

// FailureGroupsBody are groups of failures.
type FailureGroupsBody struct {
	Items       []FailureGroupBody `json:"items"`
	Unavailable []string           `json:"unavailable" doc:"Services whose database is away: their failures are missing here."`
}

// RetriedBody is what a retry of many did, or would do.
type RetriedBody struct {
	DryRun      bool               `json:"dry_run"`
	Count       int                `json:"count" doc:"How many are retried; with dry_run, how many the filter chooses, of which limit are retried."`
	IDs         []string           `json:"ids" doc:"In the order in which they are retried; with dry_run, the first of each service."`
	Groups      []FailureGroupBody `json:"groups" doc:"With dry_run: what is chosen, by handler and error."`
	TooLarge    []string           `json:"too_large" doc:"Left open because their messages are too large to be retried."`
	Batch       string             `json:"batch" doc:"With stop_on_failure: names the retries that stop together."`
	Unavailable []string           `json:"unavailable" doc:"Services whose database is away: nothing is retried there."`
}

func failureBody(f app.KeptFailure) FailureBody {
	body := FailureBody{
		ID: f.ID.String(), Handler: f.Consumer, Class: f.Class, Code: f.Code, Error: f.Error, OrderID: f.OrderID, MessageID: f.MessageID,
		State: f.State, Attempts: f.Attempts, Occurrences: f.Occurrences, PayloadSize: f.PayloadSize,
		FirstFailedAt: f.FirstFailedAt, LastFailedAt: f.LastFailedAt, ReplacedBy: f.ReplacedBy,
	}
	if !f.ClosedAt.IsZero() {
		body.ClosedAt = &f.ClosedAt
	}
	return body
}

func groupBodies(groups []app.FailureGroup) []FailureGroupBody {
	bodies := make([]FailureGroupBody, 0, len(groups))
	for _, g := range groups {
		bodies = append(bodies, FailureGroupBody{
			Service: g.Example.Service, Handler: g.Handler, Class: g.Class, Code: g.Code, Error: g.Error,
			Count: g.Count, First: g.First, Last: g.Last, Example: g.Example.String(),
		})
	}
	return bodies
}

// FailureFilterInput chooses failures. It is exported because huma does not see what is in an embedded type that is not.
type FailureFilterInput struct {
	Handler string    `query:"handler" doc:"The queue."`
	Class   string    `query:"class"`
	Code    string    `query:"code"`
	OrderID string    `query:"order_id"`
	State   string    `query:"state" enum:"open,retrying,resolved,discarded,replaced,any" default:"open"`
	Since   time.Time `query:"since" doc:"That failed at this time or later, RFC 3339."`
	Until   time.Time `query:"until" doc:"That failed before this time, RFC 3339."`
	Text    string    `query:"text" doc:"In the error, the message id or the payload."`
}

func (in *FailureFilterInput) filter() (app.FailureFilter, error) {
	f := app.FailureFilter{
		Handler: in.Handler, Class: in.Class, Code: in.Code, OrderID: in.OrderID, State: in.State,
		Since: in.Since, Until: in.Until, Text: in.Text,
	}
	if f.State == "any" {
		f.State = ""
	}
	if err, ok := errors.AsType[*domain.Error](checkFilter(f)); ok {
		p := newProblem(http.StatusBadRequest, err.Code, err.Message)
		p.Errors = []FieldProblem{{err.Field, err.Code, err.Message}}
		return f, p
	}
	return f, nil
}

// checkFilter says what in a filter no failure can have.
func checkFilter(f app.FailureFilter) error {
	for _, name := range [][2]string{{"handler", f.Handler}, {"class", f.Class}, {"code", f.Code}, {"order_id", f.OrderID}} {
		if len(name[1]) > 64 || strings.ContainsFunc(name[1], func(r rune) bool { return r <= ' ' || r > '~' }) {
			return domain.InvalidField(name[0], "filter_invalid", "%s must be at most 64 visible ASCII characters", name[0])
		}
	}
	if !utf8.ValidString(f.Text) || utf8.RuneCountInString(f.Text) > 200 {
		return domain.InvalidField("text", "filter_invalid", "text must be at most 200 characters of UTF-8")
	}
	if !f.Since.IsZero() && !f.Until.IsZero() && !f.Since.Before(f.Until) {
		return domain.InvalidField("since", "filter_invalid", "since must be before until")
	}
	return nil
}

// OperatorInput says who acts.
type OperatorInput struct {
	Operator string `header:"X-Operator" doc:"Who does this, for the record: 1 to 64 characters; unknown if absent."`
}

// Resolve implements huma.Resolver.
func (in *OperatorInput) Resolve(huma.Context) []error {
	if in.Operator == "" {
		in.Operator = "unknown"
	}
	if err, ok := errors.AsType[*domain.Error](domain.CheckName("operator", in.Operator, maxOperator)); ok {
		p := newProblem(http.StatusBadRequest, err.Code, "X-Operator: "+err.Message)
		p.Errors = []FieldProblem{{"X-Operator", p.Code, p.Detail}}
		return []error{p}
	}
	return nil
}

// action is what the operator does. Only some actions need a reason.
func (in *OperatorInput) action(reason string, needed bool) (app.FailureAction, error) {
	a := app.FailureAction{Operator: in.Operator, Reason: reason}
	if reason == "" && !needed {
		return a, nil
	}
	return a, domain.CheckName("reason", reason, maxReason)
}

type failureIDInput struct {
	ID string `path:"id" example:"dispatch-17"`
}

func (in *failureIDInput) id() (app.FailureID, error) {
	id, ok := app.ParseFailureID(in.ID)
	if !ok {
		return id, newProblem(http.StatusNotFound, "failure_not_found", "there is no such failure; an id is such as dispatch-17")
	}
	return id, nil
}

type actionInput struct {
	OperatorInput
	ID      string `path:"id" example:"dispatch-17"`
	RawBody []byte `contentType:"application/json"`
}

func (in *actionInput) id() (app.FailureID, error) { return (&failureIDInput{in.ID}).id() }

type retryBody struct {
	Reason string `json:"reason,omitempty" maxLength:"500"`
}

type discardBody struct {
	Reason string `json:"reason" minLength:"1" maxLength:"500" doc:"Why the message need not be handled."`
}

type editBody struct {
	Data    json.RawMessage `json:"data,omitempty" doc:"The event's new data; subject and orderversion follow it."`
	Payload *string         `json:"payload,omitempty" doc:"Instead of data: the whole event, CloudEvents JSON as text."`
	Reason  string          `json:"reason,omitempty" maxLength:"500"`
}

type failureFilterBody struct {
	Handler string    `json:"handler,omitempty"`
	Class   string    `json:"class,omitempty"`
	Code    string    `json:"code,omitempty"`
	OrderID string    `json:"order_id,omitempty"`
	Since   time.Time `json:"since,omitzero" doc:"That failed at this time or later."`
	Until   time.Time `json:"until,omitzero" doc:"That failed before this time."`
	Text    string    `json:"text,omitempty" maxLength:"200" doc:"In the error, the message id or the payload."`
}

type retryManyBody struct {
	Filter        *failureFilterBody `json:"filter,omitempty" doc:"Which of the open failures."`
	All           bool               `json:"all,omitempty" doc:"Needed if the filter is empty."`
	DryRun        bool               `json:"dry_run,omitempty" doc:"Only say what would be retried."`
	RatePerSecond *int               `json:"rate_per_second,omitempty" minimum:"1" maximum:"1000" default:"10"`
	StopOnFailure bool               `json:"stop_on_failure,omitempty" doc:"When one fails again, those of its service that still wait are open again."`
	Limit         *int               `json:"limit,omitempty" minimum:"1" maximum:"10000" default:"1000" doc:"The oldest of each service first."`
	Reason        string             `json:"reason,omitempty" maxLength:"500"`
}

type retryManyInput struct {
	OperatorInput
	RawBody []byte `contentType:"application/json"`
}

type listFailuresInput struct {
	FailureFilterInput
	Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50"`
	Cursor string `query:"cursor" maxLength:"128" doc:"next_cursor of the page before."`
}

type groupFailuresInput struct {
	FailureFilterInput
	Limit int `query:"limit" minimum:"1" maximum:"200" default:"50"`
}

type (
	failureList   struct{ Body FailureListBody }
	failureGroups struct{ Body FailureGroupsBody }
	failureView   struct{ Body FailureBody }
	failureDetail struct{ Body FailureDetailBody }
	retriedView   struct{ Body RetriedBody }
)

type payloadOutput struct {
	ContentType        string `header:"Content-Type"`
	ContentDisposition string `header:"Content-Disposition"`
	Body               []byte
}

func (s *server) registerFailures(api huma.API) {
	operation := func(id, method, path, summary string, errs ...int) huma.Operation {
		return huma.Operation{
			OperationID: id, Method: method, Path: "/v1/failures" + path, Summary: summary,
			Tags: []string{"failures"}, Errors: append(errs, http.StatusServiceUnavailable),
		}
	}
	huma.Register(api, operation("list-failures", http.MethodGet, "", "List messages that could not be handled, newest first", 400), s.listFailures)
	huma.Register(api, operation("group-failures", http.MethodGet, "/groups", "Count failures by handler and error", 400), s.groupFailures)
	huma.Register(api, operation("get-failure", http.MethodGet, "/{id}", "Show a failure", 404), s.getFailure)
	download := operation("get-failure-payload", http.MethodGet, "/{id}/payload", "Download the failed message", 404)
	download.Responses = map[string]*huma.Response{"200": {Description: "The message as it came.", Content: map[string]*huma.MediaType{
		"application/octet-stream": {Schema: &huma.Schema{Type: huma.TypeString, Format: "binary"}},
	}}}
	huma.Register(api, download, s.getFailurePayload)
	retry := operation("retry-failure", http.MethodPost, "/{id}/retry", "Try to handle a message once more", 404, 409)
	retry.RequestBody = &huma.RequestBody{} // may be left out
	register[retryBody](api, retry, s.retryFailure)
	register[retryManyBody](api, operation("retry-failures", http.MethodPost, "/retry", "Try to handle many messages once more", 409), s.retryFailures)
	register[editBody](api, operation("edit-failure", http.MethodPost, "/{id}/edit", "Send a corrected message in place of one that failed", 404, 409), s.editFailure)
	register[discardBody](api, operation("discard-failure", http.MethodPost, "/{id}/discard", "Close a failure whose message need not be handled", 404, 409), s.discardFailure)
}

func (s *server) listFailures(ctx context.Context, in *listFailuresInput) (*failureList, error) {
	filter, err := in.filter()
	if err != nil {
		return nil, err
	}
	after, err := parseCursor(in.Cursor)
	if err != nil {
		return nil, err
	}
	page, err := s.Failures.List(ctx, filter, after, in.Limit)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	out := &failureList{FailureListBody{
		Items: make([]FailureBody, 0, len(page.Failures)), NextCursor: strings.Join(idTexts(page.Next), "."),
		Unavailable: append([]string{}, page.Unavailable...),
	}}
	for _, f := range page.Failures {
		out.Body.Items = append(out.Body.Items, failureBody(f))
	}
	return out, nil
}

// parseCursor reads the ids behind which a page begins, one for each service.
func parseCursor(cursor string) ([]app.FailureID, error) {
	if cursor == "" {
		return nil, nil
	}
	var after []app.FailureID
	for part := range strings.SplitSeq(cursor, ".") {
		id, ok := app.ParseFailureID(part)
		if !ok {
			p := newProblem(http.StatusBadRequest, "cursor_invalid", "cursor must be the next_cursor of another page")
			p.Errors = []FieldProblem{{"cursor", p.Code, p.Detail}}
			return nil, p
		}
		after = append(after, id)
	}
	return after, nil
}

// idTexts are ids for a JSON array, which is never null.
func idTexts(ids []app.FailureID) []string {
	texts := make([]string, 0, len(ids))
	for _, id := range ids {
		texts = append(texts, id.String())
	}
	return texts
}

func (s *server) groupFailures(ctx context.Context, in *groupFailuresInput) (*failureGroups, error) {
	filter, err := in.filter()
	if err != nil {
		return nil, err
	}
	groups, away, err := s.Failures.Groups(ctx, filter, in.Limit)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &failureGroups{FailureGroupsBody{groupBodies(groups), append([]string{}, away...)}}, nil
}

// failure returns the failure that a request names, and at most limit bytes of its message. The error is a Problem.
func (s *server) failure(ctx context.Context, in *failureIDInput, limit int64) (app.KeptFailure, []byte, error) {
	id, err := in.id()
	if err != nil {
		return app.KeptFailure{}, nil, err
	}
	f, err := s.Failures.Get(ctx, id)
	if err != nil {
		return app.KeptFailure{}, nil, s.problem(ctx, err)
	}
	payload, err := s.Failures.Payload(ctx, f, limit)
	if err != nil {
		return app.KeptFailure{}, nil, s.problem(ctx, err)
	}
	return f, payload, nil
}

func (s *server) getFailure(ctx context.Context, in *failureIDInput) (*failureDetail, error) {
	f, payload, err := s.failure(ctx, in, maxShownPayload)
	if err != nil {
		return nil, err
	}
	out := &failureDetail{FailureDetailBody{
		FailureBody: failureBody(f), Headers: f.Headers, PayloadTruncated: int64(len(payload)) < f.PayloadSize,
		Actions: make([]FailureActionBody, 0, len(f.Actions)),
	}}
	out.Body.Payload, out.Body.PayloadEncoding = readable(payload, out.Body.PayloadTruncated)
	for _, a := range f.Actions {
		out.Body.Actions = append(out.Body.Actions, FailureActionBody(a))
	}
	return out, nil
}

// readable returns the payload as text if it is, and how it is encoded. One that was cut may end within a character.
func readable(payload []byte, cut bool) (text, encoding string) {
	whole := payload
	for n := 1; cut && n < utf8.UTFMax && n <= len(payload) && !utf8.Valid(whole); n++ {
		whole = payload[:len(payload)-n]
	}
	if utf8.Valid(whole) {
		return string(whole), "text"
	}
	return base64.StdEncoding.EncodeToString(payload), "base64"
}

func (s *server) getFailurePayload(ctx context.Context, in *failureIDInput) (*payloadOutput, error) {
	f, payload, err := s.failure(ctx, in, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	return &payloadOutput{"application/octet-stream", `attachment; filename="` + f.ID.String() + `.bin"`, payload}, nil
}

func (s *server) retryFailure(ctx context.Context, in *actionInput) (*failureView, error) {
	var body retryBody
	if len(in.RawBody) > 0 {
		if err := decode(in.RawBody, &body); err != nil {
			return nil, err
		}
	}
	return s.act(ctx, in, body.Reason, false, s.Failures.Retry)
}

func (s *server) discardFailure(ctx context.Context, in *actionInput) (*failureView, error) {
	var body discardBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	return s.act(ctx, in, body.Reason, true, s.Failures.Discard)
}

func (s *server) editFailure(ctx context.Context, in *actionInput) (*failureView, error) {
	var body editBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	if (body.Data == nil) == (body.Payload == nil) {
		return nil, s.problem(ctx, domain.InvalidField("data", "edit_ambiguous", "say either data, the event's new data, or payload, the whole event as text"))
	}
	edit := app.FailureEdit{EventID: "evt_" + uuid.Must(uuid.NewV7()).String(), Data: body.Data}
	if body.Payload != nil {
		edit.Payload = []byte(*body.Payload)
	}
	return s.act(ctx, in, body.Reason, false, func(ctx context.Context, id app.FailureID, a app.FailureAction) (app.KeptFailure, error) {
		return s.Failures.Edit(ctx, id, edit, a)
	})
}

// act does one thing with one failure, and shows what became of it.
func (s *server) act(ctx context.Context, in *actionInput, reason string, needsReason bool,
	do func(context.Context, app.FailureID, app.FailureAction) (app.KeptFailure, error)) (*failureView, error) {
	id, err := in.id()
	if err != nil {
		return nil, err
	}
	action, err := in.action(reason, needsReason)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	f, err := do(ctx, id, action)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	s.logger.Info("somebody acted on a failure", "failure", id.String(), "state", f.State, "order_id", f.OrderID,
		"operator", action.Operator, "reason", action.Reason, "request_id", requestID(ctx))
	return &failureView{failureBody(f)}, nil
}

func (s *server) retryFailures(ctx context.Context, in *retryManyInput) (*retriedView, error) {
	var body retryManyBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	cmd, err := body.command(in)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	if body.DryRun {
		preview, err := s.Failures.Preview(ctx, cmd.Filter)
		if err != nil {
			return nil, s.problem(ctx, err)
		}
		return &retriedView{RetriedBody{
			DryRun: true, Count: preview.Matching, IDs: idTexts(preview.First), Groups: groupBodies(preview.Groups),
			TooLarge: []string{}, Unavailable: append([]string{}, preview.Unavailable...),
		}}, nil
	}
	retried, err := s.Failures.RetryMany(ctx, cmd)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	s.logger.Info("somebody retries failures", "count", len(retried.IDs), "batch", cmd.Batch,
		"operator", cmd.Operator, "reason", cmd.Reason, "request_id", requestID(ctx))
	return &retriedView{RetriedBody{
		Count: len(retried.IDs), IDs: idTexts(retried.IDs), Groups: []FailureGroupBody{}, TooLarge: idTexts(retried.TooLarge),
		Batch: cmd.Batch, Unavailable: append([]string{}, retried.Unavailable...),
	}}, nil
}

// command checks the request and turns it into what the use case takes.
func (b *retryManyBody) command(in *retryManyInput) (app.RetryFailures, error) {
	cmd := app.RetryFailures{Limit: 1000, PerSecond: 10}
	if b.Filter != nil {
		cmd.Filter = app.FailureFilter{
			Handler: b.Filter.Handler, Class: b.Filter.Class, Code: b.Filter.Code, OrderID: b.Filter.OrderID,
			Since: b.Filter.Since, Until: b.Filter.Until, Text: b.Filter.Text,
		}
	}
	if b.RatePerSecond != nil {
		cmd.PerSecond = *b.RatePerSecond
	}
	if b.Limit != nil {
		cmd.Limit = *b.Limit
	}
	if b.StopOnFailure {
		cmd.Batch = "batch_" + uuid.Must(uuid.NewV7()).String()
	}
	var err error
	switch {
	case cmd.Filter == (app.FailureFilter{}) && !b.All:
		return cmd, domain.InvalidField("all", "filter_empty", `the filter chooses every open failure; say "all": true if that is meant`)
	case cmd.PerSecond < 1 || cmd.PerSecond > 1000:
		return cmd, domain.InvalidField("rate_per_second", "rate_out_of_range", "rate_per_second must be between 1 and 1000")
	case cmd.Limit < 1 || cmd.Limit > app.MaxRetries:
		return cmd, domain.InvalidField("limit", "limit_out_of_range", "limit must be between 1 and %d", app.MaxRetries)
	}
	if cmd.FailureAction, err = in.action(b.Reason, false); err != nil {
		return cmd, err
	}
	return cmd, checkFilter(cmd.Filter)
}
