package sqlstore

import (
	"context"
	"database/sql"
	"errors"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/order"
)

// dispatches implements dispatch.Repository on platoon.
type dispatches struct {
	q  querier
	db *sqldb.DB
}

const dispatchColumns = "orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at, delivered_at, released_at"

func (r dispatches) Add(ctx context.Context, d dispatch.Dispatch) error {
	_, err := r.q.ExecContext(ctx, sqldb.Insert("platoon", dispatchColumns, 1), dispatchValues(d)...)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "dispatched_before", "order %s has a dispatch", d.Job.OrderID)
	}
	return err
}

func (r dispatches) AddMany(ctx context.Context, all []dispatch.Dispatch) error {
	err := insertByOrder(ctx, r.q, "platoon", dispatchColumns, all, func(d dispatch.Dispatch) order.ID { return d.Job.OrderID }, dispatchValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "dispatched_before", "one of %d orders has a dispatch", len(all))
	}
	return err
}

// dispatchValues are the values of dispatchColumns.
func dispatchValues(d dispatch.Dispatch) []any {
	return []any{
		d.Job.OrderID.String(), nullString(d.CourierID.String()), d.State.String(), d.Job.Name, d.Job.Money.Amount(), d.Job.Money.Currency(),
		d.Job.PlacedAt, d.Job.Version, nullTime(d.AssignedAt), nullTime(d.DeliveredAt), nullTime(d.ReleasedAt),
	}
}

func (r dispatches) Get(ctx context.Context, id order.ID) (dispatch.Dispatch, error) {
	return r.get(ctx, id, lockingRead(r.q, r.db))
}

func (r dispatches) get(ctx context.Context, id order.ID, lock string) (dispatch.Dispatch, error) {
	d, err := scanDispatch(r.q.QueryRowContext(ctx, "SELECT "+dispatchColumns+" FROM platoon WHERE orderId = ?"+lock, id.String()))
	if errors.Is(err, sql.ErrNoRows) {
		return d, domain.Errorf(domain.NotFound, "dispatch_not_found", "order %s has no dispatch", id)
	}
	return d, err
}

func (r dispatches) Update(ctx context.Context, id order.ID, change func(*dispatch.Dispatch) (bool, error)) error {
	d, err := r.get(ctx, id, r.db.ForUpdate)
	if err != nil {
		return err
	}
	if changed, err := change(&d); err != nil || !changed {
		return err
	}
	return r.save(ctx, d)
}

// save saves a dispatch whose row is locked.
func (r dispatches) save(ctx context.Context, d dispatch.Dispatch) error {
	_, err := r.q.ExecContext(ctx, "UPDATE platoon SET takeout_userId = ?, state = ?, name = ?, placed_at = ?, order_version = ?, "+
		"assigned_at = ?, delivered_at = ?, released_at = ? WHERE orderId = ?",
		nullString(d.CourierID.String()), d.State.String(), d.Job.Name, d.Job.PlacedAt, d.Job.Version,
		nullTime(d.AssignedAt), nullTime(d.DeliveredAt), nullTime(d.ReleasedAt), d.Job.OrderID.String())
	return err
}

func (r dispatches) UpdateWaiting(ctx context.Context, limit int, change func([]dispatch.Dispatch) (int, error)) (damaged, err error) {
	var waiting []dispatch.Dispatch
	err = each(ctx, r.q, "SELECT "+dispatchColumns+" FROM platoon WHERE state = 'waiting' ORDER BY placed_at LIMIT ?"+r.db.ForUpdate+r.db.SkipLocked,
		[]any{limit}, func(row scanner) error {
			d, err := scanDispatch(row)
			if isDamaged(err) {
				damaged = err
				return nil
			}
			waiting = append(waiting, d)
			return err
		})
	if err != nil || len(waiting) == 0 {
		return damaged, err
	}
	changed, err := change(waiting)
	if err != nil {
		return damaged, err
	}
	for _, d := range waiting[:changed] {
		if err := r.save(ctx, d); err != nil {
			return damaged, err
		}
	}
	return damaged, nil
}

func (r dispatches) Backlog(ctx context.Context) (dispatch.Backlog, error) {
	var b dispatch.Backlog
	var oldest string
	err := r.q.QueryRowContext(ctx, "SELECT orderId, placed_at, (SELECT COUNT(*) FROM (SELECT 1 FROM platoon WHERE state = 'waiting' LIMIT ?) w), "+
		"EXISTS (SELECT 1 FROM courier WHERE on_duty = 1) FROM platoon WHERE state = 'waiting' ORDER BY placed_at LIMIT 1", dispatch.MaxBacklog).
		Scan(&oldest, &b.Oldest, &b.Waiting, &b.OnDuty)
	if errors.Is(err, sql.ErrNoRows) {
		return dispatch.Backlog{}, nil
	}
	b.Oldest = b.Oldest.UTC()
	return b, scanned("platoon", oldest, err)
}

func scanDispatch(row scanner) (dispatch.Dispatch, error) {
	var (
		d                             dispatch.Dispatch
		id, state, currency           string
		courier                       sql.NullString
		amount                        int64
		assigned, delivered, released sql.NullTime
	)
	err := row.Scan(&id, &courier, &state, &d.Job.Name, &amount, &currency, &d.Job.PlacedAt, &d.Job.Version,
		&assigned, &delivered, &released)
	if err != nil {
		return d, scanned("platoon", id, err)
	}
	var errs [3]error
	d.Job.OrderID, errs[0] = order.ParseID(id)
	d.Job.Money, errs[1] = domain.NewMoney(amount, currency)
	if courier.Valid {
		d.CourierID, errs[2] = dispatch.ParseCourierID(courier.String)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return d, damaged("platoon", id, err)
	}
	d.State, d.Job.PlacedAt = dispatch.RestoreState(state), d.Job.PlacedAt.UTC()
	d.AssignedAt, d.DeliveredAt, d.ReleasedAt = utc(assigned), utc(delivered), utc(released)
	return d, nil
}
