package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"takeout/domain/order"
)

// orderActionInput asks for something to be done with an order. A body may be left out.
type orderActionInput struct {
	OrderID string `path:"order_id"`
	RawBody []byte `contentType:"application/json"`
}

func (in *orderActionInput) decode(body any) error {
	if len(in.RawBody) == 0 {
		return nil
	}
	return decode(in.RawBody, body)
}

type cancelOrderBody struct {
	Reason string `json:"reason,omitempty" maxLength:"200" doc:"Why, for people."`
}

func (s *server) registerCancel(api huma.API) {
	register[cancelOrderBody](api, huma.Operation{
		OperationID: "cancel-order", Method: http.MethodPost, Path: "/v1/orders/{order_id}/cancel", Summary: "Cancel an order",
		Description: "The courier is released, and what was paid is paid back. Cancelling again changes nothing.",
		Tags:        []string{"orders"}, RequestBody: &huma.RequestBody{}, Errors: []int{404, 409, 503},
	}, s.cancelOrder)
}

func (s *server) cancelOrder(ctx context.Context, in *orderActionInput) (*orderView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil { // no order can have this id
		return nil, newProblem(http.StatusNotFound, "order_not_found", "there is no such order")
	}
	var body cancelOrderBody
	if err := in.decode(&body); err != nil {
		return nil, err
	}
	o, err := s.Orders.Cancel(ctx, id, body.Reason)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	s.logger.Info("order cancelled", "order_id", in.OrderID, "request_id", requestID(ctx))
	return &orderView{orderBody(o)}, nil
}
