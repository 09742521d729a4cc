package sqlstore

import "context"

// history implements app.History.
type history struct{ q querier }

func (h history) Add(ctx context.Context, orderID, step, detail string) error {
	_, err := h.q.ExecContext(ctx, "INSERT INTO history (order_id, at, step, detail) VALUES (?, ?, ?, ?)",
		orderID, now(), step, clip(detail, 1024))
	return err
}
