package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
)

// OrderBody is an order as clients see it.
type OrderBody struct {
	OrderID  string          `json:"order_id" example:"ord_01938c1e-7a2b-7c3d-8e4f-5a6b7c8d9e0f"`
	Name     string          `json:"name" example:"Mapo tofu"`
	Amount   int64           `json:"amount" doc:"Minor units." example:"2850"`
	Currency string          `json:"currency" doc:"ISO 4217." example:"CNY"`
	Status   string          `json:"status" enum:"placed,dispatched,delivered,cancelled"`
	Version  int64           `json:"version" doc:"1 when placed, one more with each change."`
	PlacedAt time.Time       `json:"placed_at" doc:"UTC."`
	Dispatch *AssignmentBody `json:"dispatch" doc:"null until a courier has the order."`

	DeliveredAt  *time.Time `json:"delivered_at,omitempty" doc:"UTC."`
	CancelledAt  *time.Time `json:"cancelled_at,omitempty" doc:"UTC."`
	CancelReason string     `json:"cancel_reason,omitempty"`
	Points       int64      `json:"points" doc:"What paying for it earned."`
}

// AssignmentBody says which courier has an order.
type AssignmentBody struct {
	CourierID  string    `json:"courier_id"`
	AssignedAt time.Time `json:"assigned_at" doc:"UTC."`
}

func orderBody(o order.Snapshot) OrderBody {
	body := OrderBody{
		OrderID: o.ID.String(), Name: o.Name, Amount: o.Money.Amount(), Currency: o.Money.Currency(),
		Status: o.Status.String(), Version: o.Version, PlacedAt: o.PlacedAt,
		DeliveredAt: timeOrNull(o.DeliveredAt), CancelledAt: timeOrNull(o.CancelledAt), CancelReason: o.CancelReason, Points: o.Points,
	}
	if o.CourierID != "" {
		body.Dispatch = &AssignmentBody{o.CourierID, o.AssignedAt}
	}
	return body
}

type placeOrderBody struct {
	OrderID  *string `json:"order_id,omitempty" minLength:"1" maxLength:"64" pattern:"^[A-Za-z0-9_-]+$" doc:"Chosen by the client; made here if absent."`
	Name     string  `json:"name" minLength:"1" maxLength:"30" doc:"1 to 30 characters (Unicode code points)."`
	Amount   int64   `json:"amount" minimum:"1" maximum:"2147483647" doc:"Minor units."`
	Currency *string `json:"currency,omitempty" default:"CNY" pattern:"^[A-Z]{3}$" doc:"ISO 4217."`
}

type placeOrderInput struct {
	KeyInput
	RawBody []byte `contentType:"application/json"`
}

// KeyInput reads the Idempotency-Key header of draft-ietf-httpapi-idempotency-key-header, quoted as there or bare. It
// is exported because huma does not see what is in an embedded type that is not.
type KeyInput struct {
	Key string `header:"Idempotency-Key" doc:"1 to 255 visible characters. The same request under the same key has one effect and gets the same answer."`

	sent bool
}

// Resolve implements huma.Resolver.
func (in *KeyInput) Resolve(ctx huma.Context) []error {
	var values []string
	ctx.EachHeader(func(name, value string) {
		if strings.EqualFold(name, "Idempotency-Key") {
			values = append(values, value)
		}
	})
	if len(values) == 0 {
		return nil
	}
	in.sent, in.Key = true, values[0]
	if quoted := strings.TrimSuffix(strings.TrimPrefix(in.Key, `"`), `"`); len(quoted) == len(in.Key)-2 {
		in.Key = quoted
	}
	if len(values) > 1 || in.Key == "" || len(in.Key) > 255 || strings.ContainsFunc(in.Key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		p := newProblem(http.StatusBadRequest, "idempotency_key_invalid", "Idempotency-Key must be one value of 1 to 255 visible ASCII characters")
		p.Errors = []FieldProblem{{"Idempotency-Key", p.Code, p.Detail}}
		return []error{p}
	}
	return nil
}

type orderOutput struct {
	Status   int
	Location string `header:"Location"`
	Replayed string `header:"Idempotent-Replayed"`
	Body     json.RawMessage
}

func (s *server) registerOrders(api huma.API) {
	theOrder := map[string]*huma.MediaType{"application/json": {Schema: api.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[OrderBody](), true, "")}}
	register[placeOrderBody](api, huma.Operation{
		OperationID: "place-order", Method: http.MethodPost, Path: "/v1/orders", Summary: "Place an order",
		Description: "The order is durable when 201 is sent. The same order under the same order_id is not placed twice: 200.",
		Tags:        []string{"orders"}, DefaultStatus: http.StatusCreated,
		Responses: map[string]*huma.Response{
			"200": {Description: "The order had been placed before, without an Idempotency-Key.", Content: theOrder},
			"201": {Description: "The order is placed.", Content: theOrder},
		},
		Errors: []int{409, 503},
	}, s.placeOrder)
	huma.Register(api, huma.Operation{
		OperationID: "get-order", Method: http.MethodGet, Path: "/v1/orders/{order_id}", Summary: "Show an order",
		Tags: []string{"orders"}, Errors: []int{404, 503},
	}, s.getOrder)
	huma.Register(api, huma.Operation{
		OperationID: "list-orders", Method: http.MethodGet, Path: "/v1/orders", Summary: "List orders, newest first",
		Tags: []string{"orders"}, Errors: []int{400, 503},
	}, s.listOrders)
}

func (s *server) placeOrder(ctx context.Context, in *placeOrderInput) (*orderOutput, error) {
	cmd, err := in.command()
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	placed, err := s.Orders.Place(ctx, cmd)
	if err != nil {
		p := s.problem(ctx, err)
		if p.Status == http.StatusServiceUnavailable {
			p.OrderID = cmd.ID.String()
		}
		return nil, p
	}
	out := &orderOutput{Status: http.StatusCreated, Location: "/v1/orders/" + placed.Order.ID.String(), Body: placed.Answer}
	if placed.Before {
		out.Replayed = "true"
	}
	if out.Body == nil {
		if placed.Before {
			out.Status = http.StatusOK
		}
		if out.Body, err = json.Marshal(orderBody(placed.Order)); err != nil {
			return nil, s.problem(ctx, err)
		}
	}
	s.logger.LogAttrs(ctx, slog.LevelDebug, "order placed", slog.String("order_id", placed.Order.ID.String()),
		slog.String("request_id", requestID(ctx)), slog.Bool("before", placed.Before))
	return out, nil
}

// command checks the request and turns it into what the use case takes.
func (in *placeOrderInput) command() (app.PlaceOrder, error) {
	var body placeOrderBody
	if err := decode(in.RawBody, &body); err != nil {
		return app.PlaceOrder{}, err
	}
	currency, id := "CNY", "ord_"+uuid.Must(uuid.NewV7()).String()
	if body.Currency != nil {
		currency = *body.Currency
	}
	if body.OrderID != nil {
		id = *body.OrderID
	}
	orderID, idErr := order.ParseID(id)
	money, moneyErr := domain.NewMoney(body.Amount, currency)
	nameErr := domain.CheckName("name", body.Name, order.MaxName)
	if err := allOf(idErr, nameErr, moneyErr); err != nil {
		return app.PlaceOrder{}, err
	}
	cmd := app.PlaceOrder{ID: orderID, Name: body.Name, Money: money}
	if in.sent {
		fingerprint, err := json.Marshal(body)
		if err != nil {
			return app.PlaceOrder{}, err
		}
		cmd.Request = &app.Request{
			Key: in.Key, Fingerprint: sha256.Sum256(fingerprint),
			Answer: func(o order.Snapshot) ([]byte, error) { return json.Marshal(orderBody(o)) },
		}
	}
	return cmd, nil
}

// allOf makes one answer of all that is wrong.
func allOf(errs ...error) error {
	var wrong []FieldProblem
	for _, err := range errs {
		if known, ok := errors.AsType[*domain.Error](err); ok {
			wrong = append(wrong, FieldProblem{known.Field, known.Code, known.Message})
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	p := newProblem(http.StatusUnprocessableEntity, wrong[0].Code, wrong[0].Detail)
	p.Errors = wrong
	return p
}

type orderIDInput struct {
	OrderID string `path:"order_id"`
}

type orderView struct{ Body OrderBody }

func (s *server) getOrder(ctx context.Context, in *orderIDInput) (*orderView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil { // no order can have this id
		return nil, newProblem(http.StatusNotFound, "order_not_found", "there is no such order")
	}
	o, err := s.Orders.Get(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &orderView{orderBody(o)}, nil
}

type listOrdersInput struct {
	Status string `query:"status" enum:"placed,dispatched,delivered,cancelled" doc:"Only orders with this status."`
	Limit  int    `query:"limit" minimum:"1" maximum:"200" default:"50"`
	Cursor string `query:"cursor" maxLength:"32" doc:"next_cursor of the page before."`
}

type orderList struct {
	Body struct {
		Items      []OrderBody `json:"items"`
		NextCursor string      `json:"next_cursor" doc:"Empty on the last page."`
	}
}

func (s *server) listOrders(ctx context.Context, in *listOrdersInput) (*orderList, error) {
	q := order.Query{Limit: in.Limit}
	var err error
	if in.Status != "" {
		if q.Status, err = order.ParseStatus(in.Status); err != nil {
			return nil, s.problem(ctx, err)
		}
	}
	if in.Cursor != "" {
		if q.Before, err = strconv.ParseInt(in.Cursor, 36, 64); err != nil || q.Before < 1 {
			p := newProblem(http.StatusBadRequest, "cursor_invalid", "cursor must be the next_cursor of another page")
			p.Errors = []FieldProblem{{"cursor", p.Code, p.Detail}}
			return nil, p
		}
	}
	page, err := s.Orders.List(ctx, q)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	out := &orderList{}
	out.Body.Items = make([]OrderBody, 0, len(page.Orders))
	for _, o := range page.Orders {
		out.Body.Items = append(out.Body.Items, orderBody(o.Snapshot()))
	}
	if page.Next > 0 {
		out.Body.NextCursor = strconv.FormatInt(page.Next, 36)
	}
	return out, nil
}
