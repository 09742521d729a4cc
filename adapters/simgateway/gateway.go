// Package simgateway is a payment gateway that takes no money. It keeps books as a real one does, so that the payments
// of a demonstration or a test can be compared with what was really taken.
package simgateway

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"embed"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/order"
	"takeout/domain/payment"
)

//go:embed mysql sqlite
var migrations embed.FS

// Schema is the table of the gateway's books.
func Schema() sqldb.Schema { return sqldb.Schema{Name: "gateway", Files: migrations} }

// Gateway implements app.Gateway.
type Gateway struct {
	db                 *sqldb.DB
	refusals, timeouts float64
}

// New returns a gateway that keeps its books in db, which must have its Schema. It refuses the part refusals of all
// orders, always the same ones, and the part timeouts of its calls, by chance, takes effect and fails. Both are between
// 0 and 1.
func New(db *sqldb.DB, refusals, timeouts float64) *Gateway { return &Gateway{db, refusals, timeouts} }

// line is one order in the books.
type line struct {
	money              domain.Money
	reference          string
	charged, cancelled bool
}

// Charge implements app.Gateway. It is Invalid if the order was charged with another amount.
func (g *Gateway) Charge(ctx context.Context, bill payment.Bill) (string, error) {
	now := sql.NullTime{Time: time.Now().UTC().Truncate(time.Microsecond), Valid: !g.refuses(bill.OrderID)}
	var l line
	err := g.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
		l, err = g.open(ctx, tx, bill, now, sql.NullTime{})
		return err
	})
	switch {
	case err != nil:
		return "", err
	case l.money != bill.Money:
		return "", domain.Errorf(domain.Invalid, "amount_mismatch", "the gateway knows order %s with the amount %s", bill.OrderID, l.money)
	case g.late():
		return "", errLate
	case l.cancelled:
		return "", domain.Errorf(domain.Conflict, "payment_refused", "the payment was cancelled")
	case !l.charged:
		return "", domain.Errorf(domain.Conflict, "payment_refused", "the card was declined")
	}
	return l.reference, nil
}

// Cancel implements app.Gateway.
func (g *Gateway) Cancel(ctx context.Context, bill payment.Bill) error {
	now := sql.NullTime{Time: time.Now().UTC().Truncate(time.Microsecond), Valid: true}
	err := g.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		l, err := g.open(ctx, tx, bill, sql.NullTime{}, now)
		if err != nil || l.cancelled {
			return err
		}
		_, err = tx.ExecContext(ctx, "UPDATE simulated_charge SET cancelled_at = ? WHERE orderId = ?", now, bill.OrderID.String())
		return err
	})
	if err == nil && g.late() {
		err = errLate
	}
	return err
}

// open counts a call about the order and returns its line in the books, locked. If it has none it gets one, as given.
func (g *Gateway) open(ctx context.Context, tx *sql.Tx, bill payment.Bill, charged, cancelled sql.NullTime) (line, error) {
	id := bill.OrderID.String()
	known, err := count(ctx, tx, id)
	if err == nil && !known {
		_, err = tx.ExecContext(ctx, "INSERT INTO simulated_charge (orderId, amount, currency, reference, charged_at, cancelled_at, calls) "+
			"VALUES (?, ?, ?, ?, ?, ?, 1)", id, bill.Money.Amount(), bill.Money.Currency(), "sim_"+id, charged, cancelled)
		if g.db.IsDuplicate(err) { // somebody asked at the same time
			_, err = count(ctx, tx, id)
		}
	}
	if err != nil {
		return line{}, err
	}
	var (
		l        line
		amount   int64
		currency string
	)
	err = tx.QueryRowContext(ctx, "SELECT amount, currency, reference, charged_at IS NOT NULL, cancelled_at IS NOT NULL "+
		"FROM simulated_charge WHERE orderId = ?", id).Scan(&amount, &currency, &l.reference, &l.charged, &l.cancelled)
	if err != nil {
		return l, err
	}
	if l.money, err = domain.NewMoney(amount, currency); err != nil {
		err = fmt.Errorf("the books of the gateway are damaged at order %s: %s", id, err.Error()) // without its kind: the order is not invalid
	}
	return l, err
}

// count counts a call about the order, and reports whether the order is in the books.
func count(ctx context.Context, tx *sql.Tx, id string) (known bool, err error) {
	result, err := tx.ExecContext(ctx, "UPDATE simulated_charge SET calls = calls + 1 WHERE orderId = ?", id)
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n == 1, err
}

var errLate = domain.Errorf(domain.Unknown, "gateway_timeout", "the payment gateway did not answer in time")

func (g *Gateway) late() bool { return rand.Float64() < g.timeouts }

// refuses reports whether orders of that id are refused: by its hash, so that the answer is the same each time.
func (g *Gateway) refuses(id order.ID) bool {
	hash := sha256.Sum256([]byte(id.String()))
	return float64(binary.BigEndian.Uint32(hash[:]))/(1<<32) < g.refusals
}
