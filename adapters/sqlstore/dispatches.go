package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"math/rand/v2"

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

// dispatchValues are the values of dispatchColumns.
func dispatchValues(d dispatch.Dispatch) []any {
	return []any{
		d.Job.OrderID.String(), nullString(d.CourierID.String()), d.State.String(), d.Job.Name, d.Job.Money.Amount(), d.Job.Money.Currency(),
		d.Job.PlacedAt, d.Job.OrderVersion, nullTime(d.AssignedAt), nullTime(d.DeliveredAt), nullTime(d.ReleasedAt),
	}
}

func (r dispatches) Get(ctx context.Context, id order.ID) (dispatch.Dispatch, error) {
	return r.get(ctx, id, current(r.q, r.db))
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
		nullString(d.CourierID.String()), d.State.String(), d.Job.Name, d.Job.PlacedAt, d.Job.OrderVersion,
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
	err := r.q.QueryRowContext(ctx, "SELECT placed_at, (SELECT COUNT(*) FROM (SELECT 1 FROM platoon WHERE state = 'waiting' LIMIT ?) w), "+
		"EXISTS (SELECT 1 FROM courier WHERE on_duty = 1) FROM platoon WHERE state = 'waiting' ORDER BY placed_at LIMIT 1", dispatch.MaxBacklog).
		Scan(&b.Oldest, &b.Waiting, &b.OnDuty)
	if errors.Is(err, sql.ErrNoRows) {
		return dispatch.Backlog{}, nil
	}
	b.Oldest = b.Oldest.UTC()
	return b, err
}

func scanDispatch(row scanner) (dispatch.Dispatch, error) {
	var (
		d                             dispatch.Dispatch
		id, state, currency           string
		courier                       sql.NullString
		amount                        int64
		assigned, delivered, released sql.NullTime
	)
	err := row.Scan(&id, &courier, &state, &d.Job.Name, &amount, &currency, &d.Job.PlacedAt, &d.Job.OrderVersion,
		&assigned, &delivered, &released)
	if err != nil {
		return d, err
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

// couriers implements dispatch.Roster on courier.
type couriers struct {
	q  querier
	db *sqldb.DB
}

func (r couriers) Add(ctx context.Context, c dispatch.Courier) error {
	_, err := r.q.ExecContext(ctx, "INSERT INTO courier (courier_id, name, on_duty, capacity, active) VALUES (?, ?, ?, ?, 0)",
		c.ID().String(), c.Name(), c.OnDuty(), c.Capacity())
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "courier_id_taken", "courier %s exists", c.ID())
	}
	return err
}

// load counts a courier's orders in platoon: the column active knows only those of couriers with a limit.
const load = "(SELECT COUNT(*) FROM platoon WHERE takeout_userId = courier.courier_id AND state = 'assigned')"

func (r couriers) List(ctx context.Context) ([]dispatch.Courier, error) {
	return collect(ctx, r.q, scanCourier, "SELECT courier_id, name, on_duty, capacity, "+load+" FROM courier ORDER BY courier_id")
}

func (r couriers) Update(ctx context.Context, id dispatch.CourierID, change func(dispatch.Courier) (dispatch.Courier, error)) (dispatch.Courier, error) {
	c, err := scanCourier(r.q.QueryRowContext(ctx,
		"SELECT courier_id, name, on_duty, capacity, "+load+" FROM courier WHERE courier_id = ?"+r.db.ForUpdate, id.String()))
	if errors.Is(err, sql.ErrNoRows) {
		return c, domain.Errorf(domain.NotFound, "courier_not_found", "there is no courier %s", id)
	}
	if err != nil {
		return c, err
	}
	if c, err = change(c); err != nil {
		return c, err
	}
	// A courier without a limit is not counted while orders are taken, so the count is made good here, where the
	// lock keeps everybody else from taking this courier.
	_, err = r.q.ExecContext(ctx, "UPDATE courier SET name = ?, on_duty = ?, capacity = ?, active = "+load+" WHERE courier_id = ?",
		c.Name(), c.OnDuty(), c.Capacity(), id.String())
	return c, err
}

// Take reads who could be taken without a lock, begins with one of them by chance, and takes the first who still can
// be: only that courier's row is locked, and only shared if there is no count to keep.
func (r couriers) Take(ctx context.Context) (dispatch.CourierID, error) {
	candidates, err := r.candidates(ctx)
	if err != nil {
		return dispatch.CourierID{}, err
	}
	for i, start := 0, rand.IntN(max(len(candidates), 1)); i < len(candidates); i++ {
		c := candidates[(start+i)%len(candidates)]
		taken, err := r.take(ctx, c)
		if err != nil {
			return dispatch.CourierID{}, err
		}
		if taken {
			return c.ID(), nil
		}
	}
	return dispatch.CourierID{}, errNoCourier
}

var errNoCourier = domain.Errorf(domain.Exhausted, "no_courier", "no courier on duty has room for one more order")

// TakeMany locks in the order of the rows, so that two who do so at once do not end in a deadlock.
func (r couriers) TakeMany(ctx context.Context, orders int) ([]dispatch.CourierID, error) {
	if orders == 0 {
		return nil, nil
	}
	free, err := collect(ctx, r.q, scanCourier, "SELECT courier_id, name, on_duty, capacity, active FROM courier "+
		"WHERE on_duty = 1 AND (capacity = 0 OR active < capacity) ORDER BY id"+r.db.ForUpdate)
	if err != nil {
		return nil, err
	}
	taken := spread(free, orders)
	count := map[dispatch.CourierID]int{}
	for _, id := range taken {
		count[id]++
	}
	for id, n := range count {
		if err := r.Count(ctx, id, n); err != nil {
			return nil, err
		}
	}
	return taken, nil
}

// spread gives each of the couriers who has room an order, beginning with one of them by chance, until all are given.
func spread(couriers []dispatch.Courier, orders int) []dispatch.CourierID {
	var taken []dispatch.CourierID
	rand.Shuffle(len(couriers), func(i, j int) { couriers[i], couriers[j] = couriers[j], couriers[i] })
	for round := 0; len(taken) < orders; round++ {
		before := len(taken)
		for _, c := range couriers {
			if len(taken) < orders && (c.Capacity() == 0 || c.Active()+round < c.Capacity()) {
				taken = append(taken, c.ID())
			}
		}
		if len(taken) == before {
			break // nobody has room any more
		}
	}
	return taken
}

// Count keeps a courier without a limit as they are until the transaction ends, and no more than that: whoever gives them
// a limit counts what is committed, and would miss what is done here.
func (r couriers) Count(ctx context.Context, id dispatch.CourierID, orders int) error {
	var limited bool
	err := r.q.QueryRowContext(ctx, "SELECT capacity > 0 FROM courier WHERE courier_id = ?", id.String()).Scan(&limited)
	if err == nil && !limited {
		err = r.q.QueryRowContext(ctx, "SELECT capacity > 0 FROM courier WHERE courier_id = ?"+r.db.ForShare, id.String()).Scan(&limited)
	}
	if errors.Is(err, sql.ErrNoRows) || err == nil && !limited {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = r.q.ExecContext(ctx, "UPDATE courier SET active = CASE WHEN active + ? < 0 THEN 0 ELSE active + ? END "+
		"WHERE courier_id = ? AND capacity > 0", orders, orders, id.String())
	return err
}

// candidates are those who have room for an order that did not wait.
func (r couriers) candidates(ctx context.Context) ([]dispatch.Courier, error) {
	return collect(ctx, r.q, scanCourier, "SELECT courier_id, name, on_duty, capacity, active FROM courier WHERE on_duty = 1 AND "+
		"(capacity = 0 OR active < capacity AND NOT EXISTS (SELECT 1 FROM platoon WHERE state = 'waiting'))")
}

func (r couriers) take(ctx context.Context, c dispatch.Courier) (bool, error) {
	if c.Capacity() > 0 {
		result, err := r.q.ExecContext(ctx,
			"UPDATE courier SET active = active + 1 WHERE courier_id = ? AND on_duty = 1 AND capacity > active", c.ID().String())
		if err != nil {
			return false, err
		}
		n, err := result.RowsAffected()
		return n == 1, err
	}
	var one int
	err := r.q.QueryRowContext(ctx,
		"SELECT 1 FROM courier WHERE courier_id = ? AND on_duty = 1 AND capacity = 0"+r.db.ForShare, c.ID().String()).Scan(&one)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	return err == nil, err
}

func scanCourier(row scanner) (dispatch.Courier, error) {
	var (
		id, name         string
		onDuty           bool
		capacity, active int
	)
	if err := row.Scan(&id, &name, &onDuty, &capacity, &active); err != nil {
		return dispatch.Courier{}, err
	}
	return dispatch.RestoreCourier(id, name, onDuty, capacity, active), nil
}
