package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"

	"takeout/domain/dispatch"
	"takeout/domain/order"
)

// DispatchBody is a dispatch as operators see it.
type DispatchBody struct {
	OrderID      string     `json:"order_id"`
	CourierID    *string    `json:"courier_id" doc:"null while no courier has the order."`
	State        string     `json:"state" enum:"waiting,assigned,delivered,released,impossible" doc:"waiting for a courier, with one, brought, not wanted any more, or without one in time."`
	AssignedAt   *time.Time `json:"assigned_at" doc:"UTC; null while no courier has the order."`
	DeliveredAt  *time.Time `json:"delivered_at,omitempty" doc:"UTC."`
	ReleasedAt   *time.Time `json:"released_at,omitempty" doc:"UTC; when it was released or given up as impossible."`
	Name         string     `json:"name" doc:"The order's, as it was announced."`
	Amount       int64      `json:"amount" doc:"The order's, as it was announced, in minor units."`
	Currency     string     `json:"currency"`
	PlacedAt     time.Time  `json:"placed_at" doc:"UTC."`
	OrderVersion int64      `json:"order_version" doc:"Version of the order as it was announced."`
}

func dispatchBody(d dispatch.Dispatch) DispatchBody {
	body := DispatchBody{
		OrderID: d.Job.OrderID.String(), State: d.State.String(),
		AssignedAt: timeOrNull(d.AssignedAt), DeliveredAt: timeOrNull(d.DeliveredAt), ReleasedAt: timeOrNull(d.ReleasedAt),
		Name: d.Job.Name, Amount: d.Job.Money.Amount(), Currency: d.Job.Money.Currency(),
		PlacedAt: d.Job.PlacedAt, OrderVersion: d.Job.Version,
	}
	if courier := d.CourierID.String(); courier != "" {
		body.CourierID = &courier
	}
	return body
}

// timeOrNull is nil for the zero time.
func timeOrNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

type dispatchView struct{ Body DispatchBody }

func (s *server) registerDispatches(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "get-dispatch", Method: http.MethodGet, Path: "/v1/dispatches/{order_id}", Summary: "Show an order's dispatch",
		Tags: []string{"dispatch"}, Errors: []int{404, 503},
	}, s.getDispatch)
	register[struct{}](api, huma.Operation{
		OperationID: "mark-delivered", Method: http.MethodPost, Path: "/v1/dispatches/{order_id}/delivered", Summary: "Say that the courier brought the order",
		Description: "Doing so again changes nothing.", RequestBody: &huma.RequestBody{},
		Tags: []string{"dispatch"}, Errors: []int{404, 409, 503},
	}, s.markDelivered)
}

func (s *server) getDispatch(ctx context.Context, in *orderIDInput) (*dispatchView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil {
		return nil, newProblem(http.StatusNotFound, "dispatch_not_found", "there is no such dispatch")
	}
	d, err := s.Dispatches.Get(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &dispatchView{dispatchBody(d)}, nil
}

func (s *server) markDelivered(ctx context.Context, in *orderActionInput) (*dispatchView, error) {
	id, err := order.ParseID(in.OrderID)
	if err != nil {
		return nil, newProblem(http.StatusNotFound, "dispatch_not_found", "there is no such dispatch")
	}
	if err := in.decode(&struct{}{}); err != nil {
		return nil, err
	}
	d, err := s.Dispatches.MarkDelivered(ctx, id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &dispatchView{dispatchBody(d)}, nil
}

// CourierBody is a courier as operators see them.
type CourierBody struct {
	CourierID string `json:"courier_id"`
	Name      string `json:"name"`
	OnDuty    bool   `json:"on_duty"`
	Capacity  int    `json:"capacity" doc:"Orders at the same time, 0 for no limit."`
	Active    int    `json:"active" doc:"Orders now."`
}

func courierBody(c dispatch.Courier) CourierBody {
	return CourierBody{CourierID: c.ID().String(), Name: c.Name(), OnDuty: c.OnDuty(), Capacity: c.Capacity(), Active: c.Active()}
}

type addCourierBody struct {
	CourierID *string `json:"courier_id,omitempty" minLength:"1" maxLength:"64" pattern:"^[A-Za-z0-9_-]+$" doc:"Made here if absent."`
	Name      string  `json:"name" minLength:"1" maxLength:"60"`
	OnDuty    *bool   `json:"on_duty,omitempty" default:"true"`
	Capacity  int     `json:"capacity,omitempty" minimum:"0" maximum:"10000" doc:"Orders at the same time, 0 for no limit."`
}

type changeCourierBody struct {
	Name     *string `json:"name,omitempty" minLength:"1" maxLength:"60"`
	OnDuty   *bool   `json:"on_duty,omitempty"`
	Capacity *int    `json:"capacity,omitempty" minimum:"0" maximum:"10000"`
}

type courierView struct {
	Location string `header:"Location"`
	Body     CourierBody
}

type courierList struct {
	Body struct {
		Items []CourierBody `json:"items"`
	}
}

type rawBody struct {
	RawBody []byte `contentType:"application/json"`
}

type changeCourierInput struct {
	CourierID string `path:"courier_id"`
	RawBody   []byte `contentType:"application/json"`
}

func (s *server) registerCouriers(api huma.API) {
	huma.Register(api, huma.Operation{
		OperationID: "list-couriers", Method: http.MethodGet, Path: "/v1/couriers", Summary: "Show the roster",
		Tags: []string{"couriers"}, Errors: []int{503},
	}, s.listCouriers)
	register[addCourierBody](api, huma.Operation{
		OperationID: "add-courier", Method: http.MethodPost, Path: "/v1/couriers", Summary: "Put a courier on the roster",
		Tags: []string{"couriers"}, DefaultStatus: http.StatusCreated, Errors: []int{409, 503},
	}, s.addCourier)
	register[changeCourierBody](api, huma.Operation{
		OperationID: "change-courier", Method: http.MethodPatch, Path: "/v1/couriers/{courier_id}", Summary: "Change a courier",
		Tags: []string{"couriers"}, Errors: []int{404, 503},
	}, s.changeCourier)
}

func (s *server) listCouriers(ctx context.Context, _ *struct{}) (*courierList, error) {
	couriers, err := s.Dispatches.Couriers(ctx)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	out := &courierList{}
	out.Body.Items = make([]CourierBody, 0, len(couriers))
	for _, c := range couriers {
		out.Body.Items = append(out.Body.Items, courierBody(c))
	}
	return out, nil
}

func (s *server) addCourier(ctx context.Context, in *rawBody) (*courierView, error) {
	var body addCourierBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	id, onDuty := "cou_"+uuid.Must(uuid.NewV7()).String(), true
	if body.CourierID != nil {
		id = *body.CourierID
	}
	if body.OnDuty != nil {
		onDuty = *body.OnDuty
	}
	courierID, err := dispatch.ParseCourierID(id)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	c, err := dispatch.NewCourier(courierID, body.Name, onDuty, body.Capacity)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	if err := s.Dispatches.AddCourier(ctx, c); err != nil {
		return nil, s.problem(ctx, err)
	}
	return &courierView{Location: "/v1/couriers/" + id, Body: courierBody(c)}, nil
}

func (s *server) changeCourier(ctx context.Context, in *changeCourierInput) (*courierView, error) {
	var body changeCourierBody
	if err := decode(in.RawBody, &body); err != nil {
		return nil, err
	}
	id, err := dispatch.ParseCourierID(in.CourierID)
	if err != nil {
		return nil, newProblem(http.StatusNotFound, "courier_not_found", "there is no such courier")
	}
	c, err := s.Dispatches.ChangeCourier(ctx, id, body.Name, body.OnDuty, body.Capacity)
	if err != nil {
		return nil, s.problem(ctx, err)
	}
	return &courierView{Body: courierBody(c)}, nil
}
