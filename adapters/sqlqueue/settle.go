package sqlqueue

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"takeout/adapters/sqldb"
	"takeout/crashpoint"
)

// settle deletes acked rows and gives nacked ones back, as many in one statement as have come together.
func (s *subscription) settle(stop <-chan struct{}) {
	for first := range s.settled {
		outcomes := []outcome{first}
		others := time.NewTimer(settleDelay)
	more:
		for len(outcomes) < min(batch, s.cfg.Window) {
			select {
			case o, open := <-s.settled:
				if !open {
					break more
				}
				outcomes = append(outcomes, o)
			case <-others.C:
				break more
			}
		}
		others.Stop()
		s.settleBatch(outcomes, stop)
		for _, o := range outcomes {
			s.free(o.Row)
		}
	}
}

// free makes room for another row in the place of r.
func (s *subscription) free(r Row) {
	s.mu.Lock()
	delete(s.leases, r.ID)
	s.mu.Unlock()
	if r.promised {
		s.fulfil(1)
	} else {
		<-s.slots
	}
}

func (s *subscription) settleBatch(outcomes []outcome, stop <-chan struct{}) {
	var acked []Row
	nacked := map[int][]Row{} // by attempts
	for _, o := range outcomes {
		if o.acked {
			acked = append(acked, o.Row)
		} else {
			nacked[o.attempts] = append(nacked[o.attempts], o.Row)
		}
	}
	if len(acked) > 0 {
		s.delete(acked, stop)
	}
	for attempts, rows := range nacked {
		rest := int64(0)
		if attempts > 0 {
			rest = s.cfg.Backoff(attempts)
		}
		s.exec(fmt.Sprintf("available_at = %s + %d", s.db.Now, rest), rows, stop)
		s.cfg.Bell.RingIn(time.Duration(rest)*time.Microsecond, s.cfg.Queue)
	}
	s.cfg.OnSettled(len(acked), len(outcomes)-len(acked))
}

// delete deletes acked rows, once what must outlive them is kept.
func (s *subscription) delete(rows []Row, stop <-chan struct{}) {
	crashpoint.In(s.cfg.Table, "acked")
	statement, names := s.db.DeleteByID(s.cfg.Table, len(rows), "uuid"), names(rows)
	var deleted int64
	s.persist(len(rows), stop, func(ctx context.Context) error {
		return s.db.Unsynced(ctx, func(c sqldb.Conn) (err error) {
			if s.cfg.Archive == nil {
				deleted, err = affected(c.ExecContext(ctx, statement, names...))
				return s.db.WriteError(ctx, err)
			}
			return s.db.InTxOn(ctx, c, func(ctx context.Context, tx *sql.Tx) error {
				if err := s.cfg.Archive(ctx, tx, len(rows), names); err != nil {
					return err
				}
				deleted, err = affected(tx.ExecContext(ctx, statement, names...))
				crashpoint.In(s.cfg.Table, "deleted")
				return err
			})
		})
	})
	if s.cfg.Archive == nil {
		crashpoint.In(s.cfg.Table, "deleted")
	}
	if deleted < int64(len(rows)) && slices.ContainsFunc(rows, func(r Row) bool { return r.promised }) {
		s.cfg.Handover.missed()
	}
}

func affected(result sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// exec persists the assignment in the rows.
func (s *subscription) exec(set string, rows []Row, stop <-chan struct{}) {
	s.persist(len(rows), stop, func(ctx context.Context) error { return s.write(ctx, set, rows) })
}

// write makes an assignment in the rows that may be lost in a power cut: then they are delivered again.
func (s *subscription) write(ctx context.Context, set string, rows []Row) error {
	return s.db.Unsynced(ctx, func(c sqldb.Conn) error {
		_, err := c.ExecContext(ctx, s.db.UpdateByID(s.cfg.Table, set, len(rows), "uuid"), names(rows)...)
		return s.db.WriteError(ctx, err)
	})
}

// persist does the work until it succeeds. When the reader stops it tries only a little longer: a row that was not
// deleted is delivered again, which is a duplicate, and one that was not given back comes when its lease is over.
func (s *subscription) persist(rows int, stop <-chan struct{}, work func(ctx context.Context) error) {
	trouble, began := false, time.Now()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		patience := 10 * time.Second
		select {
		case <-stop:
			patience = 2 * time.Second
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := work(ctx)
		cancel()
		if err == nil {
			if trouble {
				s.logger.Info("rows can be settled again", "rows", rows)
			}
			return
		}
		if !trouble && pause > 500*time.Millisecond {
			trouble = true
			s.logger.Warn("rows cannot be settled; trying until they can, and taking no more than the window has room for",
				"rows", rows, "error", s.db.Error(err))
		}
		select {
		case <-stop:
			if pause > 500*time.Millisecond || time.Since(began) > 2*time.Second {
				s.logger.Warn("rows could not be settled; they will be delivered again", "rows", rows, "error", s.db.Error(err))
				return
			}
		default:
		}
		time.Sleep(pause)
	}
}

// giveBack makes rows available that were taken and not handed out, which was no attempt.
func (s *subscription) giveBack(rows []Row) {
	for _, r := range rows {
		s.free(r)
	}
	s.exec("available_at = 0, attempts = attempts - 1", rows, past.Done())
}
