package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
)

// answers implements app.Answers on idempotency_answer.
type answers struct {
	q  querier
	db *sqldb.DB
}

func (r answers) Add(ctx context.Context, a app.Answer) error {
	return r.AddMany(ctx, []app.Answer{a})
}

func (r answers) AddMany(ctx context.Context, many []app.Answer) error {
	created, rows := now(), make([][]any, len(many))
	for i, a := range slices.SortedFunc(slices.Values(many), func(a, b app.Answer) int { return strings.Compare(a.Key, b.Key) }) {
		rows[i] = []any{[]byte(a.Key), a.Fingerprint[:], a.OrderID.String(), a.Body, created}
	}
	err := insertRows(ctx, r.q, "idempotency_answer", "request_key, fingerprint, orderId, body, created_at", rows)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "idempotency_key_used", "the Idempotency-Key was used before")
	}
	return err
}

func (r answers) Amend(ctx context.Context, key string, body []byte) error {
	_, err := r.q.ExecContext(ctx, "UPDATE idempotency_answer SET body = ? WHERE request_key = ?", body, []byte(key))
	return err
}

func (r answers) Used(ctx context.Context, keys []string) ([]string, error) {
	var used []string
	for some := range slices.Chunk(keys, mostRows) {
		args := make([]any, len(some))
		for i, key := range some {
			args[i] = []byte(key)
		}
		err := each(ctx, r.q, "SELECT request_key FROM idempotency_answer WHERE "+among("request_key", len(some)), args, func(row scanner) error {
			var key []byte
			err := row.Scan(&key)
			used = append(used, string(key))
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return used, nil
}

func (r answers) Get(ctx context.Context, key string) (app.Answer, error) {
	a := app.Answer{Key: key}
	var fingerprint []byte
	var id string
	err := r.q.QueryRowContext(ctx, "SELECT fingerprint, orderId, body FROM idempotency_answer WHERE request_key = ?"+lockingRead(r.q, r.db), []byte(key)).
		Scan(&fingerprint, &id, &a.Body)
	if errors.Is(err, sql.ErrNoRows) {
		return a, domain.Errorf(domain.NotFound, "idempotency_key_unknown", "the Idempotency-Key was not used before")
	}
	if err != nil {
		return a, err
	}
	copy(a.Fingerprint[:], fingerprint)
	if a.OrderID, err = order.ParseID(id); err != nil {
		return a, damaged("idempotency_answer", key, err)
	}
	return a, nil
}
