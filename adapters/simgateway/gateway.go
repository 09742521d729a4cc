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
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
)

//go:embed mysql sqlite
var migrations embed.FS

// Schema is the table of the gateway's books.
func Schema() sqldb.Schema { return sqldb.Schema{Name: "gateway", Files: migrations} }

// Gateway implements app.Gateway.
type Gateway struct {
	db                 *sqldb.DB
	refusals, timeouts float64

	together *app.Together[*charge]
}

// New returns a gateway that keeps its books in db, which must have its Schema. It refuses the part refusals of all
// orders, always the same ones, and the part timeouts of its calls, by chance, takes effect and fails. Both are between
// 0 and 1.
func New(db *sqldb.DB, refusals, timeouts float64) *Gateway {
	g := &Gateway{db: db, refusals: refusals, timeouts: timeouts}
	g.together = &app.Together[*charge]{One: g.chargeOne, Many: g.chargeMany, Most: 100, Parallel: 1, Patience: 100 * time.Millisecond}
	return g
}

// line is one order in the books.
type line struct {
	money              domain.Money
	reference          string
	charged, cancelled bool
}

// charge is a call of Charge.
type charge struct {
	bill order.Terms
	at   sql.NullTime // not valid if it is refused
	line line         // in the books
}

// Charge implements app.Gateway. It is Invalid if the order was charged with another amount.
func (g *Gateway) Charge(ctx context.Context, bill order.Terms) (string, error) {
	c := &charge{bill: bill, at: sql.NullTime{Time: domain.Micro(time.Now()), Valid: !g.refuses(bill.OrderID)}}
	switch err := g.together.Do(ctx, c); {
	case err != nil:
		return "", err
	case c.line.money != bill.Money:
		return "", domain.Errorf(domain.Invalid, "amount_mismatch", "the gateway knows order %s with the amount %s", bill.OrderID, c.line.money)
	case g.late():
		return "", errLate
	case c.line.cancelled:
		return "", domain.Errorf(domain.Conflict, "payment_refused", "the payment was cancelled")
	case !c.line.charged:
		return "", domain.Errorf(domain.Conflict, "payment_refused", "the card was declined")
	}
	return c.line.reference, nil
}

func (g *Gateway) chargeOne(ctx context.Context, c *charge) error {
	return g.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
		c.line, err = g.open(ctx, tx, c.bill, c.at, sql.NullTime{})
		return err
	})
}

// chargeMany enters orders that are not in the books.
func (g *Gateway) chargeMany(ctx context.Context, all []*charge) (map[int]error, error) {
	slices.SortFunc(all, func(a, b *charge) int { return strings.Compare(a.bill.OrderID.String(), b.bill.OrderID.String()) })
	var values []any
	for _, c := range all {
		c.line = fresh(c.bill, c.at, sql.NullTime{})
		values = append(values, c.line.values(c.bill.OrderID, c.at, sql.NullTime{})...)
	}
	return nil, g.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, sqldb.Insert("simulated_charge", columns, len(all)), values...)
		return err
	})
}

const columns = "orderId, amount, currency, reference, charged_at, cancelled_at, calls"

// fresh is the line of an order that was not in the books.
func fresh(bill order.Terms, charged, cancelled sql.NullTime) line {
	return line{bill.Money, "sim_" + bill.OrderID.String(), charged.Valid, cancelled.Valid}
}

// values are those of columns after the first call.
func (l line) values(id order.ID, charged, cancelled sql.NullTime) []any {
	return []any{id.String(), l.money.Amount(), l.money.Currency(), l.reference, charged, cancelled, 1}
}

// Cancel implements app.Gateway.
func (g *Gateway) Cancel(ctx context.Context, bill order.Terms) error {
	now := sql.NullTime{Time: domain.Micro(time.Now()), Valid: true}
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
func (g *Gateway) open(ctx context.Context, tx *sql.Tx, bill order.Terms, charged, cancelled sql.NullTime) (line, error) {
	id := bill.OrderID.String()
	known, err := count(ctx, tx, id)
	if err != nil {
		return line{}, err
	}
	if !known {
		l := fresh(bill, charged, cancelled)
		_, err := tx.ExecContext(ctx, sqldb.Insert("simulated_charge", columns, 1), l.values(bill.OrderID, charged, cancelled)...)
		if !g.db.IsDuplicate(err) {
			return l, err
		}
		if _, err := count(ctx, tx, id); err != nil { // somebody asked at the same time
			return line{}, err
		}
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
