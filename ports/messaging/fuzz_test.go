package messaging

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/simgateway"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// everything returns the whole topology over real databases, with a courier on duty.
func everything(f *testing.F) (app.UseCases, []Route) {
	f.Helper()
	dir, quiet := f.TempDir(), slog.New(slog.DiscardHandler)
	place := func(name string) string { return "sqlite:" + filepath.Join(dir, name+".db") }
	opened := func(store interface {
		Migrate(ctx context.Context) ([]string, error)
		Close() error
	}, err error) {
		f.Helper()
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { _ = store.Close() })
		if _, err := store.Migrate(context.Background()); err != nil {
			f.Fatal(err)
		}
	}
	orders, err := sqlstore.OpenOrders(place("order"), nil, quiet)
	opened(orders, err)
	dispatches, err := sqlstore.OpenDispatches(place("dispatch"), nil, quiet)
	opened(dispatches, err)
	payments, err := sqlstore.OpenPayments(place("payment"), nil, quiet, simgateway.Schema())
	opened(payments, err)
	ledger, err := sqlstore.OpenPoints(place("points"), nil, quiet)
	opened(ledger, err)
	u := app.UseCases{
		Orders: app.NewOrders(orders), Compensation: app.NewCompensation(orders, 1<<30), Dispatches: app.NewDispatches(dispatches, app.DispatchPolicy{}),
		Payments: app.NewPayments(payments, simgateway.New(payments.DB(), 0, 0)), Points: app.NewPoints(ledger),
	}
	zhao, err := dispatch.ParseCourierID("zhao")
	if err != nil {
		f.Fatal(err)
	}
	courier, err := dispatch.NewCourier(zhao, "Zhao", true, 0)
	if err != nil {
		f.Fatal(err)
	}
	if err := u.Dispatches.AddCourier(context.Background(), courier); err != nil {
		f.Fatal(err)
	}
	return u, Topology(u, true)
}

// Whatever comes to a consumer, it is handled, or refused with a reason; and what is stored then can be shown and announced.
func FuzzEveryMessageIsHandledOrRefusedWithAReason(f *testing.F) {
	u, routes := everything(f)
	at := time.Now().UTC().Truncate(time.Second)
	o := event.Order{OrderID: "o1", Name: "x", Amount: 100, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: at}
	cancelled := o
	cancelled.Status, cancelled.Version = "cancelled", 2
	for i, r := range routes {
		for _, e := range []event.Event{
			event.OrderPlaced{Order: o}, event.OrderPlaced{Order: o, Dispatch: &event.Courier{CourierID: "zhao", AssignedAt: at, DeliveredAt: &at}},
			event.OrderCancelled{Order: cancelled, Reason: "rain", CancelledAt: at},
			event.DispatchAssigned{OrderID: "o1", CourierID: "zhao", AssignedAt: at, Version: 1, Correction: true},
			event.DispatchDelivered{OrderID: "o1", CourierID: "zhao", AssignedAt: at, DeliveredAt: at, Version: 1}, event.DispatchImpossible{Order: o, GivenUpAt: at},
			event.PaymentSucceeded{Order: o, Reference: "r", PaidAt: at}, event.PaymentRefused{Order: o, Reason: "no", RefusedAt: at},
			event.PaymentRefunded{Order: cancelled, Reference: "r", RefundedAt: at}, event.PointsAwarded{OrderID: "o1", Points: 1, AwardedAt: at, Version: 1},
		} {
			if e.Key() != r.Event {
				continue
			}
			body, err := event.Encode("evt_1", at, e)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(uint8(i), "evt_1", body)
			f.Add(uint8(i), "", []byte(strings.ReplaceAll(string(body), at.Format(time.RFC3339), "9999-12-31T23:59:59-14:00")))
			f.Add(uint8(i), "", []byte(strings.ReplaceAll(string(body), "zhao", "")))
			f.Add(uint8(i), "", regexp.MustCompile(`version":\d+`).ReplaceAll(body, fmt.Appendf(nil, `version":%d`, event.MaxVersion)))
			f.Add(uint8(i), "", body[:len(body)-1])
		}
		f.Add(uint8(i), "\xff", []byte("null"))
	}
	f.Fuzz(func(t *testing.T, which uint8, id string, body []byte) {
		r := routes[int(which)%len(routes)]
		err := r.handle(message.NewMessage(id, body), r.Queue, Acceptance{Horizon: 1 << 62})
		switch domain.KindOf(err) {
		case domain.Unknown:
			if err != nil && !errors.Is(err, app.ErrDuplicate) {
				t.Fatalf("%s: %v", r.Queue, err)
			}
		case domain.Invalid:
			if known := brief(err); known == "" || len(known) > 512 {
				t.Fatalf("%s: %q", r.Queue, known)
			}
		case domain.NotFound, domain.Conflict:
		default:
			t.Fatalf("%s: a message is not what is away: %v", r.Queue, err)
		}
		subject, idErr := order.ParseID(event.SubjectOf(body))
		if err != nil || idErr != nil {
			return
		}
		if stored, err := u.Orders.Get(t.Context(), subject); err == nil {
			if _, err := json.Marshal(stored); err != nil {
				t.Fatalf("the order cannot be shown: %v", err)
			}
			if stored.Version >= event.MaxVersion {
				t.Fatalf("version %d has no next", stored.Version)
			}
		}
		if stored, err := u.Dispatches.Get(t.Context(), subject); err == nil {
			if _, err := json.Marshal(stored.ReleasedAt); err != nil {
				t.Fatalf("the dispatch cannot be shown: %v", err)
			}
		}
	})
}
