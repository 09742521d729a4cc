package sqlstore

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"takeout/adapters/sqldb"
	"takeout/app"
)

// payloadPart is how much of a failed message goes into one row: well below the smallest packet that a server
// takes.
const payloadPart = 1 << 20

// Keep implements app.Failures.
func (m *Messages) Keep(ctx context.Context, f app.Failure) error {
	headers, err := json.Marshal(f.Headers)
	if err != nil {
		return err
	}
	at := now()
	fingerprint := sha256.Sum256(append([]byte(f.MessageID+"\x00"), f.Payload...))
	return m.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, "INSERT INTO failure (consumer, fingerprint, message_id, order_id, error_class, error_code, "+
			"error_text, attempts, headers, payload_size, state, first_failed_at, last_failed_at) "+
			"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'open', ?, ?)",
			f.Consumer, fingerprint[:], clip(f.MessageID, 255), f.OrderID, f.Class, clip(f.Code, 64),
			clip(f.Error, 512), f.Attempts, headers, len(f.Payload), at, at)
		if m.db.IsDuplicate(err) {
			// Kept before, and delivered again because the ack was lost, or sent again by somebody.
			_, err = tx.ExecContext(ctx, "UPDATE failure SET error_class = ?, error_code = ?, error_text = ?, attempts = attempts + ?, "+
				"last_failed_at = ? WHERE consumer = ? AND fingerprint = ?",
				f.Class, clip(f.Code, 64), clip(f.Error, 512), f.Attempts, at, f.Consumer, fingerprint[:])
			return err
		}
		if err != nil {
			return err
		}
		id, err := result.LastInsertId()
		if err != nil {
			return err
		}
		for part, rest := 0, f.Payload; part == 0 || len(rest) > 0; part++ {
			n := min(len(rest), payloadPart)
			_, err := tx.ExecContext(ctx, "INSERT INTO failure_payload (failure_id, part, bytes) VALUES (?, ?, ?)", id, part, sqldb.NotNull(rest[:n]))
			if err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	})
}

// clip cuts text to what its column holds, and makes it valid for it.
func clip(s string, limit int) string {
	s = strings.ToValidUTF8(s, "�")
	if utf8.RuneCountInString(s) > limit {
		s = string([]rune(s)[:limit])
	}
	return s
}

// Delay implements app.Failures.
func (m *Messages) Delay(ctx context.Context, f app.Failure, tier int, after time.Duration) error {
	return errors.ErrUnsupported
}

// Resolve implements app.Failures.
func (m *Messages) Resolve(ctx context.Context, failureID int64) error { return errors.ErrUnsupported }
