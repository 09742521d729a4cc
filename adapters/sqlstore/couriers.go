package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/dispatch"
)

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

// TakeAll takes those without a limit first, and both kinds in the order of their ids, so that two who do so at once do not
// end in a deadlock.
func (r couriers) TakeAll(ctx context.Context, orders int) ([]dispatch.CourierID, error) {
	free, err := r.candidates(ctx)
	if err != nil {
		return nil, err
	}
	taken := spread(free, orders)
	if len(taken) < orders {
		return nil, errNoCourier
	}
	count := map[dispatch.CourierID]int{}
	for _, id := range taken {
		count[id]++
	}
	var limited, unlimited []dispatch.CourierID
	for _, c := range free {
		switch {
		case count[c.ID()] == 0:
		case c.Capacity() > 0:
			limited = append(limited, c.ID())
		default:
			unlimited = append(unlimited, c.ID())
		}
	}
	kept, err := r.keep(ctx, unlimited)
	if err != nil {
		return nil, err
	}
	counted, err := r.count(ctx, limited, count)
	if err != nil {
		return nil, err
	}
	if !kept || !counted { // they were taken, or went off duty, since they were read
		return nil, errNoCourier
	}
	return taken, nil
}

// keep keeps couriers without a limit as they are until the transaction ends, and reports whether all of them still are.
func (r couriers) keep(ctx context.Context, ids []dispatch.CourierID) (bool, error) {
	n := 0
	for some := range slices.Chunk(ids, mostRows) {
		var kept int
		err := r.q.QueryRowContext(ctx, "SELECT COUNT(*) FROM courier"+r.db.Force("courier_courier_id")+" WHERE "+among("courier_id", len(some))+
			" AND on_duty = 1 AND capacity = 0"+r.db.ForShare, texts(some)...).Scan(&kept)
		if err != nil {
			return false, err
		}
		n += kept
	}
	return n == len(ids), nil
}

// count adds so many orders to what each of the couriers with a limit carries, and reports whether all have room.
func (r couriers) count(ctx context.Context, ids []dispatch.CourierID, orders map[dispatch.CourierID]int) (bool, error) {
	n := 0
	slices.SortFunc(ids, func(a, b dispatch.CourierID) int { return strings.Compare(a.String(), b.String()) })
	for some := range slices.Chunk(ids, mostRows) {
		var more []any
		for _, id := range some {
			more = append(more, id.String(), orders[id])
		}
		then := "(active + CASE courier_id" + strings.Repeat(" WHEN ? THEN ?", len(some)) + " END)"
		result, err := r.q.ExecContext(ctx, "UPDATE courier"+r.db.Force("courier_courier_id")+" SET active = "+then+
			" WHERE "+among("courier_id", len(some))+" AND on_duty = 1 AND capacity >= "+then, slices.Concat(more, texts(some), more)...)
		if err != nil {
			return false, err
		}
		counted, err := result.RowsAffected()
		if err != nil {
			return false, err
		}
		n += int(counted)
	}
	return n == len(ids), nil
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
