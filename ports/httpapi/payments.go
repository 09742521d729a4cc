package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"takeout/domain/order"
	"takeout/domain/points"
)

// PaymentBody is an order's payment as operators see it.
type PaymentBody struct {
	OrderID      string     `json:"order_id"`
	State        string     `json:"state" enum:"charging,succeeded,refused,refunded,void" doc:"void: cancelled before anything was charged."`
	Amount       int64      `json:"amount" doc:"Minor units."`
	Currency     string     `json:"currency"`
	Reference    string     `json:"reference,omitempty" doc:"What the gateway calls the payment."`
	Reason       string     `json:"reason,omitempty" doc:"Why the gateway refused."`
	DecidedAt    *time.Time `json:"decided_at" doc:"UTC; null while charging."`
	RefundedAt   *time.Time `json:"refunded_at,omitempty" doc:"UTC."`
	Name         string     `json:"name" doc:"The order's, as it was announced."`
	PlacedAt     time.Time  `json:"placed_at" doc:"UTC."`
	OrderVersion int64      `json:"order_version" doc:"Version of the order as it was announced."`
}

type paymentView struct{ Body PaymentBody }

// PointsBody is what an order earned, as operators see it.
type PointsBody struct {
	OrderID string            `json:"order_id"`
	Points  int64             `json:"points" doc:"The sum of the entries."`
	Entries []PointsEntryBody `json:"entries" doc:"The oldest first."`
}

// PointsEntryBody is one line of the ledger.
type PointsEntryBody struct {
	Kind   string    `json:"kind" enum:"award,revoke"`
	Points int64     `json:"points" doc:"Negative when taken back."`
	At     time.Time `json:"at" doc:"UTC."`
}

type pointsView struct{ Body PointsBody }

func (s *server) registerPayments(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-payment", Method: http.MethodGet, Path: "/v1/payments/{order_id}", Summary: "Show an order's payment",
		Tags: []string{"payment"}, Errors: []int{404, 503},
	}, s.getPayment)
}

func (s *server) registerPoints(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-points", Method: http.MethodGet, Path: "/v1/points/{order_id}", Summary: "Show the points that an order earned",
		Tags: []string{"points"}, Errors: []int{404, 503},
	}, s.getPoints)
}

func (s *server) getPayment(ctx context.Context, in *orderIDInput) (*paymentView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil {
		return nil, newProblem(http.StatusNotFound, "payment_not_found", "there is no such payment")
	}
	p, err := s.Payments.Get(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &paymentView{PaymentBody{
		OrderID: in.OrderID, State: p.State.String(), Amount: p.Bill.Money.Amount(), Currency: p.Bill.Money.Currency(),
		Reference: p.Reference, Reason: p.Reason, DecidedAt: timeOrNull(p.DecidedAt), RefundedAt: timeOrNull(p.RefundedAt),
		Name: p.Bill.Name, PlacedAt: p.Bill.PlacedAt, OrderVersion: p.Bill.Version,
	}}, nil
}

func (s *server) getPoints(ctx context.Context, in *orderIDInput) (*pointsView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil {
		return nil, newProblem(http.StatusNotFound, "points_not_found", "there is no such order in the ledger")
	}
	entries, err := s.Points.Entries(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	out := &pointsView{PointsBody{OrderID: in.OrderID, Points: points.Sum(entries)}}
	for _, e := range entries {
		out.Body.Entries = append(out.Body.Entries, PointsEntryBody{e.Kind.String(), e.Points, e.At})
	}
	return out, nil
}
