package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/order"
	"takeout/domain/payment"
)

// payments implements payment.Repository.
type payments struct {
	q  querier
	db *sqldb.DB
}

const paymentColumns = "orderId, name, order_money, currency, placed_at, order_version, state, reference, reason, decided_at, refunded_at"

// paymentValues are the values of paymentColumns.
func paymentValues(p payment.Payment) []any {
	return []any{
		p.Bill.OrderID.String(), p.Bill.Name, p.Bill.Money.Amount(), p.Bill.Money.Currency(), p.Bill.PlacedAt, p.Bill.Version,
		p.State.String(), p.Reference, clip(p.Reason, maxReason), nullTime(p.DecidedAt), nullTime(p.RefundedAt),
	}
}

// changeablePayment are the columns of a payment that may change.
var changeablePayment = []string{"name", "placed_at", "order_version", "state", "reference", "reason", "decided_at", "refunded_at"}

// changeablePaymentValues are the values of changeablePayment.
func changeablePaymentValues(p payment.Payment) []any {
	return []any{
		p.Bill.Name, p.Bill.PlacedAt, p.Bill.Version, p.State.String(), p.Reference, clip(p.Reason, maxReason),
		nullTime(p.DecidedAt), nullTime(p.RefundedAt),
	}
}

func (r payments) Add(ctx context.Context, p payment.Payment) error {
	_, err := r.q.ExecContext(ctx, sqldb.Insert("payment", paymentColumns, 1), paymentValues(p)...)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "payment_exists", "order %s has a payment", p.Bill.OrderID)
	}
	return err
}

func (r payments) AddMany(ctx context.Context, all []payment.Payment) error {
	err := insertByOrder(ctx, r.q, "payment", paymentColumns, all, func(p payment.Payment) order.ID { return p.Bill.OrderID }, paymentValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "payment_exists", "one of %d orders has a payment", len(all))
	}
	return err
}

// maxReason is how much of a gateway's reason is kept, in code points.
const maxReason = 200

func (r payments) Get(ctx context.Context, id order.ID) (payment.Payment, error) {
	return r.get(ctx, id, lockingRead(r.q, r.db))
}

func (r payments) get(ctx context.Context, id order.ID, lock string) (payment.Payment, error) {
	p, err := scanPayment(r.q.QueryRowContext(ctx, "SELECT "+paymentColumns+" FROM payment WHERE orderId = ?"+lock, id.String()))
	if errors.Is(err, sql.ErrNoRows) {
		return p, domain.Errorf(domain.NotFound, "payment_not_found", "order %s has no payment", id)
	}
	return p, err
}

func (r payments) Update(ctx context.Context, id order.ID, change func(*payment.Payment) (bool, error)) error {
	p, err := r.get(ctx, id, r.db.ForUpdate)
	if err != nil {
		return err
	}
	if changed, err := change(&p); err != nil || !changed {
		return err
	}
	_, err = r.q.ExecContext(ctx, "UPDATE payment SET "+strings.Join(changeablePayment, " = ?, ")+" = ? WHERE orderId = ?",
		append(changeablePaymentValues(p), id.String())...)
	return err
}

func (r payments) UpdateMany(ctx context.Context, ids []order.ID, change func(*payment.Payment) (bool, error)) error {
	return changing[*payment.Payment]{
		table: "payment", columns: paymentColumns, index: "payment_orderId",
		scan: func(row scanner, before ...any) (*payment.Payment, error) {
			p, err := scanPayment(row, before...)
			return &p, err
		},
		changeable: changeablePayment, values: func(p *payment.Payment) []any { return changeablePaymentValues(*p) },
	}.update(ctx, r.q, r.db, ids, change)
}

func scanPayment(row scanner, before ...any) (payment.Payment, error) {
	var (
		p                   payment.Payment
		id, currency, state string
		amount              int64
		decided, refunded   sql.NullTime
	)
	err := row.Scan(append(before, &id, &p.Bill.Name, &amount, &currency, &p.Bill.PlacedAt, &p.Bill.Version, &state, &p.Reference,
		&p.Reason, &decided, &refunded)...)
	if err != nil {
		return p, scanned("payment", id, err)
	}
	var errs [2]error
	p.Bill.OrderID, errs[0] = order.ParseID(id)
	p.Bill.Money, errs[1] = domain.NewMoney(amount, currency)
	if err := errors.Join(errs[:]...); err != nil {
		return p, damaged("payment", id, err)
	}
	p.Bill.PlacedAt, p.State = p.Bill.PlacedAt.UTC(), payment.RestoreState(state)
	p.DecidedAt, p.RefundedAt = utc(decided), utc(refunded)
	return p, nil
}
