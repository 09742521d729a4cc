package reconcile

import (
	"context"

	"takeout/app"
	"takeout/domain/order"
)

// RestoreFromDispatch is the repair of an order of which only its dispatch is left.
func RestoreFromDispatch(ctx context.Context, u app.UseCases, id order.ID) error {
	return restoreFromDispatch.do(ctx, repairs{UseCases: u}, id, "a test")
}

// RestoreFromPayment is the repair of an order of which only its payment is left.
func RestoreFromPayment(ctx context.Context, u app.UseCases, id order.ID) error {
	return restoreFromPayment.do(ctx, repairs{UseCases: u}, id, "a test")
}
