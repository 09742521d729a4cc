// Package httpapi is the HTTP port, for customers and operators: orders and their timelines, couriers, dispatches,
// payments, points, failures, reconciliation, and the state of the process.
package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"reflect"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
	"github.com/swaggest/swgui/v5emb"

	"takeout/app"
	"takeout/app/reconcile"
	"takeout/domain"
)

// Limits of one request.
const (
	maxURL         = 8 << 10         // bytes
	requestTimeout = 5 * time.Second // for the use case
	bodyTimeout    = 10 * time.Second
)

// Config says what a process serves. A nil use case is one of a role that runs elsewhere.
type Config struct {
	Orders       *app.Orders
	Dispatches   *app.Dispatches
	Payments     *app.Payments
	Points       *app.Points
	Compensation *app.Compensation
	Failures     *app.FailureDesk
	Timeline     *app.Timeline

	Reconciliation *reconcile.Reconciliation
	Reconcile      func(ctx context.Context, q reconcile.Request) (reconcile.Report, error) // goes on when ctx ends

	Health  func(ctx context.Context) Health
	Metrics http.Handler
	Version string
}

// Health is what /readyz says.
type Health struct {
	Status string           `json:"status" enum:"ready,degraded,unavailable" doc:"unavailable comes with status 503; degraded means that orders are taken and something else is wrong."`
	Checks map[string]Check `json:"checks"`
}

// Check is the state of one thing that the process depends on.
type Check struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

type server struct {
	Config
	logger   *slog.Logger
	refusals refusals
}

// useProblems makes huma answer with Problem. huma has this one hook for the whole program.
var useProblems = sync.OnceFunc(func() { huma.NewError = humaProblem })

// New returns the handler of the whole API.
func New(cfg Config, logger *slog.Logger) http.Handler {
	useProblems()
	s := &server{Config: cfg, logger: logger, refusals: refusals{byCode: map[string]refused{}}}
	mux := http.NewServeMux()

	config := huma.DefaultConfig("takeout", cfg.Version)
	config.Info.Description = "Orders and their dispatch. Every error is application/problem+json (RFC 9457)."
	config.CreateHooks = nil // no $schema member in bodies
	config.DocsPath = ""     // huma's page loads from elsewhere
	config.OpenAPIPath = "/openapi"
	config.RejectUnknownQueryParameters = true
	config.Components.Schemas = huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer)
	api := humago.New(mux, config)

	if cfg.Orders != nil {
		s.registerOrders(api)
		s.registerCancel(api)
	}
	if cfg.Dispatches != nil {
		s.registerDispatches(api)
		s.registerCouriers(api)
	}
	if cfg.Payments != nil {
		s.registerPayments(api)
	}
	if cfg.Points != nil {
		s.registerPoints(api)
	}
	if cfg.Compensation != nil {
		s.registerCompensation(api)
	}
	if cfg.Failures != nil {
		s.registerFailures(api)
	}
	if cfg.Timeline != nil {
		s.registerTimeline(api)
	}
	if cfg.Reconciliation != nil {
		s.registerReconciliation(api)
	}
	s.registerHealth(api)
	mux.Handle("GET /metrics", cfg.Metrics)
	mux.Handle("GET /docs/", v5emb.New("takeout", "/openapi.json", "/docs/"))
	mux.Handle("GET /docs", http.RedirectHandler("/docs/", http.StatusMovedPermanently))
	return s.guard(mux)
}

// NewServer returns an HTTP server with the limits that this API needs: slow and large requests end by themselves.
func NewServer(handler http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       bodyTimeout,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,

		DisableGeneralOptionsHandler: true, // which would answer OPTIONS * with 200
		ErrorLog:                     slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}

type requestIDKey struct{}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// guard does for every request what no handler should have to think of.
func (s *server) guard(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-Id")
		if id == "" || domain.CheckID("request_id", id) != nil {
			id = "req_" + uuid.Must(uuid.NewV7()).String()
		}
		r = r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id))
		w.Header().Set("X-Request-Id", id)
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		defer func() {
			if cause := recover(); cause != nil {
				s.logger.Error("a request panicked", "request_id", id, "path", r.URL.Path, "panic", cause, "stack", string(debug.Stack()))
				writeProblem(w, r, newProblem(http.StatusInternalServerError, "internal_error",
					"something unexpected went wrong; the log has it under the request_id"))
			}
		}()
		p := s.refuse(r, mux)
		if p == nil && takesBody(r) {
			p = readBody(r)
		}
		if p != nil {
			if p.Status == http.StatusMethodNotAllowed {
				w.Header().Set("Allow", allowed(mux, r))
			}
			if p.Status == http.StatusRequestEntityTooLarge {
				w.Header().Set("Connection", "close")
			}
			writeProblem(w, r, p)
			return
		}
		began := time.Now()
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		r = r.WithContext(ctx)
		mux.ServeHTTP(&problemWriter{ResponseWriter: w, request: r}, r)
		if s.logger.Enabled(ctx, slog.LevelDebug) {
			s.logger.Debug("request served", "request_id", id, "method", r.Method, "path", r.URL.Path, "took", time.Since(began).String())
		}
	})
}

// refuse says what is wrong with a request that no handler should see.
func (s *server) refuse(r *http.Request, mux *http.ServeMux) *Problem {
	if len(r.RequestURI) > maxURL {
		return newProblem(http.StatusRequestURITooLong, "url_too_long", "the URL is longer than 8 KiB")
	}
	// The mux would redirect a path such as //v1 or /v1/../v1 to what it means.
	clean := path.Clean(r.URL.Path)
	if clean != r.URL.Path && clean+"/" != r.URL.Path {
		return newProblem(http.StatusNotFound, "path_not_found", "there is nothing at this path")
	}
	if _, pattern := mux.Handler(r); pattern == "" {
		if allowed(mux, r) != "" {
			return newProblem(http.StatusMethodNotAllowed, "method_not_allowed", "this path does not take "+strings.ToUpper(clip(r.Method, 16))+"; see the Allow header")
		}
		return s.notFound(r)
	}
	if p := checkQuery(r.URL); p != nil {
		return p
	}
	if r.ContentLength > maxBody {
		return newProblem(http.StatusRequestEntityTooLarge, "body_too_large", "the body is larger than 64 KiB")
	}
	if takesBody(r) && (r.ContentLength != 0 || r.Body != http.NoBody) {
		return checkContentType(r)
	}
	return nil
}

func takesBody(r *http.Request) bool {
	return r.Method == http.MethodPost || r.Method == http.MethodPatch
}

// readBody takes the whole body in before the time for the use case begins: a slow client is not a slow database.
func readBody(r *http.Request) *Problem {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return newProblem(http.StatusRequestTimeout, "body_too_slow", "the body did not come within 10 seconds")
	case err != nil:
		return newProblem(http.StatusBadRequest, "body_incomplete", "the body could not be read to its end")
	case len(body) > maxBody:
		return newProblem(http.StatusRequestEntityTooLarge, "body_too_large", "the body is larger than 64 KiB")
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return nil
}

// checkQuery refuses what could be read in two ways.
func checkQuery(u *url.URL) *Problem {
	if !strings.HasPrefix(u.Path, "/v1/") {
		return nil
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return newProblem(http.StatusBadRequest, "parameter_invalid", "the query of the URL cannot be read")
	}
	for name, values := range query {
		if len(values) > 1 {
			return fieldProblem(jsontext.Pointer(name), "parameter_invalid", "comes twice")
		}
	}
	return nil
}

// notFound tells a path that does not exist from one whose role runs in another process.
func (s *server) notFound(r *http.Request) *Problem {
	elsewhere := func(role string) *Problem {
		return newProblem(http.StatusNotFound, "served_elsewhere", "this process does not run the role "+role+", which serves this path")
	}
	below := func(path string) bool { return strings.HasPrefix(r.URL.Path+"/", path+"/") }
	switch {
	case s.Orders == nil && below("/v1/orders"):
		return elsewhere("order")
	case s.Dispatches == nil && (below("/v1/dispatches") || below("/v1/couriers")):
		return elsewhere("dispatch")
	case s.Compensation == nil && below("/v1/compensation"):
		return elsewhere("compensation")
	case s.Payments == nil && below("/v1/payments"):
		return elsewhere("payment")
	case s.Points == nil && below("/v1/points"):
		return elsewhere("points")
	case s.Reconciliation == nil && below("/v1/reconciliation"):
		return elsewhere("reconcile")
	}
	return newProblem(http.StatusNotFound, "path_not_found", "there is nothing at this path; see /docs")
}

func checkContentType(r *http.Request) *Problem {
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return newProblem(http.StatusUnsupportedMediaType, "content_encoding_unsupported", "the body must not be compressed")
	}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" {
		return newProblem(http.StatusUnsupportedMediaType, "content_type_unsupported", "the body must come with Content-Type: application/json")
	}
	if charset, named := params["charset"]; named && !strings.EqualFold(charset, "utf-8") {
		return newProblem(http.StatusUnsupportedMediaType, "charset_unsupported", "the body must be UTF-8")
	}
	return nil
}

// allowed lists the methods that the request's path takes.
func allowed(mux *http.ServeMux, r *http.Request) string {
	var methods []string
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPatch, http.MethodPut, http.MethodDelete} {
		probe := &http.Request{Method: method, URL: r.URL, Host: r.Host}
		if _, pattern := mux.Handler(probe); pattern != "" {
			methods = append(methods, method)
		}
	}
	return strings.Join(methods, ", ")
}

func clip(s string, limit int) string { return s[:min(len(s), limit)] }

// problemWriter adds to problems what only the request knows.
type problemWriter struct {
	http.ResponseWriter
	request *http.Request
	problem bool
}

func (w *problemWriter) WriteHeader(status int) {
	w.problem = w.Header().Get("Content-Type") == "application/problem+json"
	w.ResponseWriter.WriteHeader(status)
}

func (w *problemWriter) Write(body []byte) (int, error) {
	if w.problem {
		var p Problem
		if json.Unmarshal(body, &p) == nil {
			p.complete(w.request)
			if full, err := json.Marshal(p); err == nil {
				_, err := w.ResponseWriter.Write(full)
				return len(body), err
			}
		}
	}
	return w.ResponseWriter.Write(body)
}

// Unwrap lets http.ResponseController reach the connection, for deadlines.
func (w *problemWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func writeProblem(w http.ResponseWriter, r *http.Request, p *Problem) {
	p.complete(r)
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

// register registers an operation whose handler decodes the body itself, and describes that body as a B. The body must
// be there, unless op.RequestBody says otherwise.
func register[B, I, O any](api huma.API, op huma.Operation, handler func(context.Context, *I) (*O, error)) {
	// readBody has read the body. Its deadline must not stay: net/http would cancel the connection's next request.
	op.MaxBodyBytes, op.BodyReadTimeout, op.SkipValidateBody = maxBody+1, -1, true
	op.Errors = append(op.Errors, http.StatusBadRequest, http.StatusRequestTimeout, http.StatusRequestEntityTooLarge,
		http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity)
	body := &huma.MediaType{}
	if op.RequestBody == nil {
		op.RequestBody = &huma.RequestBody{Required: true}
	}
	required := op.RequestBody.Required
	op.RequestBody.Content = map[string]*huma.MediaType{"application/json": body}
	huma.Register(api, op, handler)
	op.RequestBody.Required = required // huma requires raw bytes
	body.Schema = huma.SchemaFromType(api.OpenAPI().Components.Schemas, reflect.TypeFor[B]())
	op.RequestBody.Content["application/json"] = body // in place of the plain bytes that huma takes it for
}
