package app_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/app"
)

// busy returns a handler of messages that come together, while one of them is being handled until release is called.
func busy(t *testing.T) (handle func(ctx context.Context, id string) error, release func()) {
	t.Helper()
	held, ctx := make(chan struct{}), t.Context()
	together := app.HandleTogether(0, func(_ context.Context, id string) error {
		if id == "first" {
			<-held
		}
		return nil
	}, func(context.Context, []string) error { return nil })
	handle = func(ctx context.Context, id string) error {
		return together(app.WithDelivery(ctx, app.Delivery{Consumer: "q", EventID: id}), id)
	}
	go func() { _ = handle(ctx, "first") }()
	synctest.Wait()
	return handle, func() { close(held) }
}

func TestMessageThatIsApartWaitsForNoOther(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		handle, release := busy(t)
		defer release()
		began := time.Now()
		require.NoError(t, handle(app.Apart(t.Context()), "apart"))
		require.NoError(t, handle(app.WithRetry(t.Context(), app.Retry{Tier: 1}), "retried"))
		require.Zero(t, time.Since(began))
	})
}

// Otherwise it would be an error of the message, which spends an attempt.
func TestMessageWhoseConnectionIsLostWhileItWaitsGoesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		handle, release := busy(t)
		defer release()
		ctx, lose := context.WithCancelCause(t.Context())
		result := make(chan error, 1)
		go func() { result <- handle(ctx, "waits") }()
		synctest.Wait()
		lose(errors.New("the connection is lost"))
		require.Equal(t, context.Canceled, <-result)
	})
}
