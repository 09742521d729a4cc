package sqlqueue

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
)

// claim takes up to limit rows that are available, lowest id first. After a batch that was full of rows that came again it
// takes new ones only: what cannot be sent, however much it is, does not keep the others waiting.
func (s *subscription) claim(ctx context.Context, limit int) ([]Row, error) {
	where, args := "available_at <= "+s.db.Now, []any{}
	if s.stale {
		where = "available_at = 0"
	}
	if s.cfg.Queue != "" {
		where, args = where+" AND queue = ?", append(args, s.cfg.Queue)
	}
	columns := strings.Join(append([]string{"id, uuid, payload, metadata, attempts"}, s.cfg.Columns...), ", ")
	lease := "attempts = attempts + 1, available_at = " + s.lease()
	args = append(args, limit)
	var rows []Row
	if s.db.Engine == "sqlite" {
		err := s.db.Unsynced(ctx, func(c sqldb.Conn) (err error) {
			rows, err = s.scan(c.QueryContext(ctx, "UPDATE "+s.cfg.Table+" SET "+lease+" "+
				"WHERE id IN (SELECT id FROM "+s.cfg.Table+" WHERE "+where+" ORDER BY id LIMIT ?) RETURNING "+columns, args...))
			return err
		})
		slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.ID, b.ID) })
		return rows, s.db.Error(err)
	}
	// The commit also sees to it that whatever stored the rows is on disk: InnoDB shows it to others before that, and an event
	// must not be sent of what a crash can still undo. So without it nothing was taken.
	err := s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
		rows, err = s.scan(tx.QueryContext(ctx, "SELECT "+columns+" FROM "+s.cfg.Table+" WHERE "+where+
			" ORDER BY id LIMIT ?"+s.db.ForUpdate+s.db.SkipLocked, args...))
		if err != nil || len(rows) == 0 {
			return err
		}
		ids := make([]any, len(rows))
		for i := range rows {
			rows[i].attempts++
			ids[i] = rows[i].ID
		}
		_, err = tx.ExecContext(ctx, s.db.UpdateByID(s.cfg.Table, lease, len(ids)), ids...)
		return err
	})
	if err != nil {
		return nil, err
	}
	return rows, nil
}

func (s *subscription) scan(rows *sql.Rows, err error) ([]Row, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []Row
	for rows.Next() {
		r := Row{taken: time.Now()}
		further := make([]sql.NullString, len(s.cfg.Columns))
		into := []any{&r.ID, &r.UUID, &r.Payload, &r.Metadata, &r.attempts}
		for i := range further {
			into = append(into, &further[i])
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		for _, value := range further {
			r.further = append(r.further, value.String)
		}
		all = append(all, r)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return all, nil
}

// lease is when the lease of a row that is taken now ends, as an SQL expression.
func (s *subscription) lease() string {
	return fmt.Sprintf("%s + %d", s.db.Now, s.cfg.Lease.Microseconds())
}

// renew keeps the leases of the messages in flight.
func (s *subscription) renew(stop <-chan struct{}) {
	ticker := time.NewTicker(s.cfg.Lease / 4)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		var old []Row
		s.mu.Lock()
		for id, lease := range s.leases {
			if time.Since(lease.taken) > s.cfg.Lease/4 {
				old = append(old, Row{ID: id, UUID: lease.uuid})
			}
		}
		s.mu.Unlock()
		for part := range slices.Chunk(old, batch) {
			ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Lease/2)
			err := s.write(ctx, "available_at = "+s.lease(), part)
			cancel()
			if err != nil {
				s.logger.Debug("leases could not be renewed", "error", err)
			}
		}
	}
}
