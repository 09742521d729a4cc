package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"time"

	"takeout/adapters/sqldb"
	"takeout/app/reconcile"
)

// Findings implements reconcile.Findings on the order service's database.
type Findings struct{ db *sqldb.DB }

// NewFindings returns the findings that are kept in the order service's database.
func NewFindings(orders *sqldb.DB) *Findings { return &Findings{orders} }

// Unresolved implements reconcile.Findings.
func (s *Findings) Unresolved(ctx context.Context, limit int) ([]reconcile.Finding, error) {
	return readAll(ctx, s.db, scanFinding, "SELECT class, orderId, minute, state, evidence, repair, repairs, first_seen, last_seen, repaired_at "+
		"FROM finding WHERE state IN ('open', 'repairing', 'person') ORDER BY id LIMIT ?", limit)
}

func scanFinding(row scanner) (f reconcile.Finding, err error) {
	var evidence []byte
	var repaired sql.NullTime
	err = row.Scan(&f.Class, &f.OrderID, &f.Minute, &f.State, &evidence, &f.Repair, &f.Repairs, &f.FirstSeen, &f.LastSeen, &repaired)
	if err != nil {
		return f, scanned("finding", f.OrderID, err)
	}
	if err := json.Unmarshal(evidence, &f.Evidence); err != nil {
		return f, damaged("finding", f.OrderID, err)
	}
	f.FirstSeen, f.LastSeen = f.FirstSeen.UTC(), f.LastSeen.UTC()
	if repaired.Valid {
		at := utc(repaired)
		f.RepairedAt = &at
	}
	return f, nil
}

// findingsInTx is how many findings are stored in one transaction, which on SQLite keeps all other writers waiting.
const findingsInTx = 200

// Put implements reconcile.Findings.
func (s *Findings) Put(ctx context.Context, findings []*reconcile.Finding) error {
	for len(findings) > 0 {
		some := findings[:min(len(findings), findingsInTx)]
		err := s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
			for _, f := range some {
				err := s.put(ctx, tx, f)
				if s.db.IsDuplicate(err) { // another run found the same at the same time
					err = s.put(ctx, tx, f)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		findings = findings[len(some):]
	}
	return nil
}

func (s *Findings) put(ctx context.Context, tx *sql.Tx, f *reconcile.Finding) error {
	evidence, err := json.Marshal(f.Evidence)
	if err != nil {
		return err
	}
	values := []any{f.Minute, f.State, evidence, clip(f.Repair, 200), f.Repairs, f.FirstSeen, f.LastSeen, f.RepairedAt, f.ResolvedAt, f.OrderID, f.Class}
	result, err := tx.ExecContext(ctx, "UPDATE finding SET minute = ?, state = ?, evidence = ?, repair = ?, repairs = ?, first_seen = ?, "+
		"last_seen = ?, repaired_at = ?, resolved_at = ? WHERE orderId = ? AND class = ?", values...)
	if err != nil {
		return err
	}
	if n, err := result.RowsAffected(); err != nil || n == 1 {
		return err
	}
	_, err = tx.ExecContext(ctx, "INSERT INTO finding (minute, state, evidence, repair, repairs, first_seen, last_seen, repaired_at, resolved_at, "+
		"orderId, class) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values...)
	return err
}

// Counts implements reconcile.Findings.
func (s *Findings) Counts(ctx context.Context) ([]reconcile.FindingCount, error) {
	return readAll(ctx, s.db, func(row scanner) (n reconcile.FindingCount, err error) {
		err = row.Scan(&n.Class, &n.State, &n.Findings)
		return n, err
	}, "SELECT class, state, COUNT(*) FROM finding WHERE state IN ('open', 'repairing', 'person') GROUP BY class, state")
}

// reportsKept is how many reports are kept.
const reportsKept = 100

// SaveReport implements reconcile.Findings.
func (s *Findings) SaveReport(ctx context.Context, r reconcile.Report) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, "INSERT INTO reconcile_report (started_at, report) VALUES (?, ?)", r.StartedAt, body)
		if err != nil {
			return err
		}
		id, err := result.LastInsertId()
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM reconcile_report WHERE id <= ?", id-reportsKept)
		return err
	})
}

// LastReport implements reconcile.Findings.
func (s *Findings) LastReport(ctx context.Context) (reconcile.Report, bool, error) {
	var r reconcile.Report
	var body []byte
	err := s.db.Reader().QueryRowContext(ctx, "SELECT report FROM reconcile_report ORDER BY id DESC LIMIT 1").Scan(&body)
	if errors.Is(err, sql.ErrNoRows) {
		return r, false, nil
	}
	if err != nil {
		return r, false, s.db.Error(err)
	}
	return r, true, json.Unmarshal(body, &r)
}

// Lease implements reconcile.Findings. The server's clock decides: those of two processes may differ.
func (s *Findings) Lease(ctx context.Context, owner string, lasts time.Duration) (bool, error) {
	micros := max(lasts, time.Minute).Microseconds()
	result, err := s.db.Writer().ExecContext(ctx, "UPDATE reconcile_lease SET owner = ?, expires = "+s.db.Now+" + ? "+
		"WHERE id = 1 AND (owner = ? OR expires < "+s.db.Now+")", owner, micros, owner)
	if err != nil {
		return false, s.db.WriteError(ctx, err)
	}
	if n, err := result.RowsAffected(); err != nil || n == 1 {
		return n == 1, err
	}
	_, err = s.db.Writer().ExecContext(ctx, "INSERT INTO reconcile_lease (id, owner, expires) VALUES (1, ?, "+s.db.Now+" + ?)", owner, micros)
	if s.db.IsDuplicate(err) {
		return false, nil
	}
	return err == nil, s.db.WriteError(ctx, err)
}

// Release implements reconcile.Findings.
func (s *Findings) Release(ctx context.Context, owner string) error {
	_, err := s.db.Writer().ExecContext(ctx, "UPDATE reconcile_lease SET expires = 0 WHERE id = 1 AND owner = ?", owner)
	return s.db.WriteError(ctx, err)
}
