package check

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"takeout/verify/history"
)

// pageRows is how many rows one statement reads: it ends well before the driver gives up.
const pageRows = 20_000

// each reads all rows of a table that has an id, page by page in its order.
func (c *checker) each(ctx context.Context, service, table, columns string, row func(scan func(...any) error) error) error {
	var last int64
	query := "SELECT id, " + columns + " FROM " + table + " WHERE id > ? ORDER BY id LIMIT ?"
	return c.pages(ctx, service, query, func() []any { return []any{last, pageRows} }, func(rows *sql.Rows) error {
		return row(func(into ...any) error { return rows.Scan(append([]any{&last}, into...)...) })
	})
}

// pages runs the query with the arguments, which say where the page begins and how long it is, until a page is not full.
func (c *checker) pages(ctx context.Context, service, query string, args func() []any, row func(*sql.Rows) error) error {
	for n := pageRows; n == pageRows; {
		n = 0
		err := c.page(ctx, service, query, args(), func(rows *sql.Rows) error {
			n++
			return row(rows)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) page(ctx context.Context, service, query string, args []any, row func(*sql.Rows) error) error {
	rows, err := c.dbs[service].Reader().QueryContext(ctx, query, args...)
	if err != nil {
		return c.dbs[service].Error(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows); err != nil {
			return err
		}
	}
	return c.dbs[service].Error(rows.Err())
}

func (c *checker) readOrders(ctx context.Context) error {
	var (
		row, amount, version, points         int64
		id, name, currency, status, why      string
		courier                              sql.NullString
		placedAt                             time.Time
		assignedAt, deliveredAt, cancelledAt sql.NullTime
	)
	return c.each(ctx, "order", "order_info", "id, orderId, name, order_money, currency, status, version, courier_id, assigned_at, "+
		"placed_at, delivered_at, cancelled_at, cancel_reason, points", func(scan func(...any) error) error {
		err := scan(&row, &id, &name, &amount, &currency, &status, &version, &courier, &assignedAt, &placedAt, &deliveredAt, &cancelledAt, &why, &points)
		if err != nil {
			return err
		}
		c.report.Stored++
		i := c.recordOf(id, name)
		r := &c.records[i]
		r.row, r.order, r.version, r.points, r.reason = row, stateOf(status), version, points, reasonOf(why)
		r.placed, r.courier = micros(placedAt), courierOf(courier.String, assignedAt.Time, deliveredAt.Time)
		r.setIf(courier.String != "", hasCourier)
		r.setIf(courier.Valid != assignedAt.Valid || deliveredAt.Valid != r.is(delivered) || cancelledAt.Valid != r.is(cancelled), timesWrong)
		r.name, r.money, r.amount = history.Hash(name), moneyOf(amount, currency), amount
		if int(i) < c.in.Plan.Orders {
			o := c.in.Plan.Order(int(i))
			r.name, r.money, r.amount = history.Hash(o.Name), moneyOf(o.Amount, o.Currency), o.Amount
			r.setIf(r.differs(name, amount, currency, placedAt), orderDiffers)
		}
		switch r.order {
		case placed:
			c.report.Placed++
		case dispatched:
			c.report.Dispatched++
		case delivered:
			c.report.Delivered++
		case cancelled:
			c.report.Cancelled++
		}
		return nil
	})
}

// recordOf returns the record for a row of order_info: that of the plan's order of this name or, if somebody changed the
// name, of this id. A row that is not of the plan, or is the second one of an order, gets a record of its own.
func (c *checker) recordOf(id, name string) int32 {
	number, planned := c.in.Plan.Number(name)
	if !planned && !c.invited[id] {
		number, planned = c.told(history.Hash(id))
	}
	i := int32(number)
	switch {
	case !planned:
		i = c.newRecord()
		if c.invited[id] {
			c.records[i].set(invited)
		} else {
			c.records[i].set(stranger)
		}
	case c.records[i].stored():
		i = c.newRecord()
		c.records[i].set(twin)
	}
	c.know(i, id)
	return i
}

func (c *checker) readDispatches(ctx context.Context) error {
	var (
		id, state, name, currency string
		courier                   sql.NullString
		amount, version           int64
		placedAt                  time.Time
		assignedAt, deliveredAt   sql.NullTime
	)
	return c.each(ctx, "dispatch", "platoon", "orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, "+
		"assigned_at, delivered_at", func(scan func(...any) error) error {
		err := scan(&id, &courier, &state, &name, &amount, &currency, &placedAt, &version, &assignedAt, &deliveredAt)
		if err != nil {
			return err
		}
		r := &c.records[c.at(id)]
		r.setIf(r.platoon != none, twoDispatches)
		r.platoon = stateOf(state)
		r.setIf(courier.String != "", sent)
		r.setIf(r.differs(name, amount, currency, placedAt), dispatchDiffers)
		r.setIf(version > r.version, newer)
		if !r.is(delivered) {
			deliveredAt.Time = time.Time{}
		}
		r.setIf(r.has(hasCourier) && courierOf(courier.String, assignedAt.Time, deliveredAt.Time) != r.courier, courierDiffers)
		if r.platoon == assigned {
			c.assigned[courier.String]++
		}
		return nil
	})
}

func (c *checker) readCouriers(ctx context.Context) error {
	var (
		id               string
		onDuty           bool
		capacity, active int
	)
	return c.each(ctx, "dispatch", "courier", "courier_id, on_duty, capacity, active", func(scan func(...any) error) error {
		if err := scan(&id, &onDuty, &capacity, &active); err != nil {
			return err
		}
		c.room = c.room || onDuty && (capacity == 0 || active < capacity)
		if has := c.assigned[id]; capacity > 0 && active != has {
			c.add("I11", "mismatch", "", -1, says("courier %s has %d assigned rows in platoon, and courier.active says %d", id, has, active))
		}
		return nil
	})
}

func (c *checker) readPayments(ctx context.Context) error {
	var (
		id, state, name, currency string
		amount, version           int64
		placedAt                  time.Time
	)
	return c.each(ctx, "payment", "payment", "orderId, state, name, order_money, currency, placed_at, order_version", func(scan func(...any) error) error {
		if err := scan(&id, &state, &name, &amount, &currency, &placedAt, &version); err != nil {
			return err
		}
		r := &c.records[c.at(id)]
		r.setIf(r.payment != none, twoPayments)
		r.payment = stateOf(state)
		r.setIf(r.differs(name, amount, currency, placedAt), paymentDiffers)
		r.setIf(version > r.version, newer)
		return nil
	})
}

func (c *checker) readBooks(ctx context.Context) error {
	var (
		id, currency  string
		amount        int64
		taken, closed bool
	)
	return c.each(ctx, "payment", "simulated_charge", "orderId, amount, currency, charged_at IS NOT NULL, cancelled_at IS NOT NULL",
		func(scan func(...any) error) error {
			if err := scan(&id, &amount, &currency, &taken, &closed); err != nil {
				return err
			}
			r := &c.records[c.at(id)]
			r.setIf(r.has(inBooks), twoCharges)
			r.set(inBooks)
			r.setIf(taken, charged)
			r.setIf(closed, givenBack)
			r.setIf(r.stored() && moneyOf(amount, currency) != r.money, booksDiffer)
			return nil
		})
}

func (c *checker) readPoints(ctx context.Context) error {
	var (
		id, kind string
		points   int64
		placedAt time.Time
	)
	return c.each(ctx, "points", "points_entry", "orderId, kind, points, placed_at", func(scan func(...any) error) error {
		if err := scan(&id, &kind, &points, &placedAt); err != nil {
			return err
		}
		r := &c.records[c.at(id)]
		r.setIf(r.stored() && micros(placedAt) != r.placed, pointsDiffer)
		flag, sum := award, &r.awarded
		if kind == "revoke" {
			flag, sum = revoke, &r.revoked
		}
		r.setIf(r.has(flag), twoEntries)
		r.set(flag)
		*sum += points
		return nil
	})
}

// readEvents reads what was announced: the log of effects, which has no unique key that could hide a second one.
func (c *checker) readEvents(ctx context.Context) error {
	var eventID, key, id string
	for _, service := range services {
		for _, table := range []string{"outbox", "outbox_confirmed"} {
			err := c.each(ctx, service, table, "event_id, event_key, order_id", func(scan func(...any) error) error {
				if err := scan(&eventID, &key, &id); err != nil {
					return err
				}
				k, known := c.key[key]
				if !known || announcer(key) != service {
					c.add("I8", "unexpected", id, -1, says("%s.%s has event %s of key %s, which the %s service never announces",
						service, table, eventID, key, service))
					return nil
				}
				i := c.at(id)
				c.observe(k, i, history.Hash(eventID))
				if table == "outbox" {
					c.records[i].set(pending)
					c.addTo(i, verdict{"I4", "stuck", says("event %s of key %s is left in the outbox of the %s database", eventID, key, service)})
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) observe(k int, i int32, event uint64) {
	r := &c.records[i]
	switch {
	case r.events[k] == 0:
		r.events[k] = event
	case r.events[k] == event || c.extra[event] != nil:
		c.report.ConfirmedAgain++ // one relay outlived its lease: the same event twice
		return
	default:
		c.extra[event] = &extra{record: i, key: k}
		m := c.moreOf(i)
		m.extra = append(m.extra, event)
	}
	c.report.Events++
}

func (c *checker) readInboxes(ctx context.Context) error {
	for _, service := range services {
		for last := ""; ; {
			var consumer sql.NullString
			err := c.dbs[service].Reader().QueryRowContext(ctx, "SELECT MIN(consumer) FROM inbox WHERE consumer > ?", last).Scan(&consumer)
			if err != nil {
				return c.dbs[service].Error(err)
			}
			if !consumer.Valid {
				break
			}
			last = consumer.String
			i, known := c.route[last]
			if !known || c.routes[i].Role.Service() != service {
				c.add("I8", "unexpected", "", -1, says("the inbox of the %s database has events of the consumer %q, which does not work there", service, last))
				continue
			}
			if err := c.readInbox(ctx, service, i); err != nil {
				return err
			}
		}
	}
	return nil
}

// readInbox reads which events the consumer of the route has handled.
func (c *checker) readInbox(ctx context.Context, service string, route int) error {
	queue, bit, key := c.routes[route].Queue, uint16(1)<<route, c.key[c.routes[route].Event]
	last := ""
	var eventID, id string
	return c.pages(ctx, service, "SELECT event_id, order_id FROM inbox WHERE consumer = ? AND event_id > ? ORDER BY event_id LIMIT ?",
		func() []any { return []any{queue, last, pageRows} }, func(rows *sql.Rows) error {
			if err := rows.Scan(&eventID, &id); err != nil {
				return err
			}
			last = eventID
			c.report.Handled++
			event := history.Hash(eventID)
			i, known := c.find(id)
			if known {
				c.records[i].any |= bit
			}
			switch e := c.extra[event]; {
			case known && c.records[i].events[key] == event:
				c.records[i].marked |= bit
			case e != nil && e.record == i && e.key == key:
				e.marked |= bit
			case !c.foreign[event]:
				c.add("I8", "unexpected", id, -1, says("%s has handled event %s, which the %s service never announced as %s for this order",
					queue, eventID, announcer(c.routes[route].Event), c.routes[route].Event))
			}
			return nil
		})
}

// stepsOfRepair are the steps in a history with which something is repaired.
var stepsOfRepair = map[string]bool{
	"recreated": true, "cancelled_again": true, "announced_again": true,
	"dispatch_restored": true, "dispatch_corrected": true, "payment_corrected": true,
}

// readRepairs reads what was done beside the ordinary course, and what reconciliation found.
func (c *checker) readRepairs(ctx context.Context) error {
	var id, step, detail string
	for _, service := range services {
		err := c.each(ctx, service, "history", "order_id, step, detail", func(scan func(...any) error) error {
			if err := scan(&id, &step, &detail); err != nil {
				return err
			}
			c.search(detail, says("a step %s in the history of the %s database", step, service), id)
			if step == "attempt_failed" {
				c.triedAgain(id, detail)
			}
			if !stepsOfRepair[step] {
				return nil
			}
			i := c.at(id)
			c.records[i].set(repaired)
			m := c.moreOf(i)
			m.step = step + " in the history of the " + service + " database: " + detail
			switch step {
			case "recreated":
				m.recreated++
				c.report.Recreated++
				return nil
			case "announced_again":
				m.again[service]++
			}
			c.report.Repairs++
			return nil
		})
		if err != nil {
			return err
		}
	}
	return c.readFindings(ctx)
}

// campaigns is how often a message may begin its delays anew, because its ack was lost, before that is a loop.
const campaigns = 8

// triedAgain counts how often a message was delayed. The detail begins with its consumer and its id.
func (c *checker) triedAgain(id, detail string) {
	c.report.DelayedTries++
	which, _, _ := strings.Cut(detail, " failed,")
	message := history.Hash(id + "\x00" + which)
	if c.failing[message]++; c.failing[message] == campaigns*c.in.RetryDelays+1 {
		c.add("I10", "unbounded", id, -1, says("%s was delayed more than %d times; one campaign has %d delays", which, campaigns*c.in.RetryDelays, c.in.RetryDelays))
	}
}

func (c *checker) readFindings(ctx context.Context) error {
	var id, class, state, repair string
	var evidence []byte
	return c.each(ctx, "order", "finding", "orderId, class, state, repair, evidence", func(scan func(...any) error) error {
		if err := scan(&id, &class, &state, &repair, &evidence); err != nil {
			return err
		}
		c.report.Findings++
		c.search(repair, says("a finding of class %s", class), id)
		i, known := c.find(id)
		if !known {
			if c.invited[id] && state == "resolved" {
				return nil
			}
			c.add("I1", "unresolved", id, -1, says("reconciliation found %s about an order that no table knows; it is %s", class, state))
			return nil
		}
		c.records[i].set(found)
		c.records[i].setIf(state != "resolved", unresolved)
		c.moreOf(i).class = class + ", now " + state
		return nil
	})
}

// readAnswers compares what requests with an Idempotency-Key are answered with the orders that they made.
func (c *checker) readAnswers(ctx context.Context) error {
	last := []byte{}
	var id string
	var body []byte
	return c.pages(ctx, "order", "SELECT request_key, orderId, body FROM idempotency_answer WHERE request_key > ? ORDER BY request_key LIMIT ?",
		func() []any { return []any{bytes.Clone(last), pageRows} }, func(rows *sql.Rows) error {
			if err := rows.Scan(&last, &id, &body); err != nil {
				return err
			}
			i, known := c.find(id)
			if !known || !c.records[i].stored() {
				c.add("I6", "lost", id, -1, says("the key %q is answered with an order that is not stored", last))
				return nil
			}
			r := &c.records[i]
			if r.has(twin | stranger) {
				return nil
			}
			r.set(answered)
			var o answer
			if err := json.Unmarshal(body, &o); err != nil {
				c.addTo(i, verdict{"I6", "mismatch", says("the answer stored under the key %q cannot be read: %v", last, err)})
			} else if o.OrderID != id || r.differs(o.Name, o.Amount, o.Currency, o.PlacedAt) || o.Status != "placed" || o.Version != 1 {
				answer := string(body)
				c.addTo(i, verdict{"I6", "mismatch", func() string {
					return fmt.Sprintf("the key %q is answered with %s; order_info: %s", last, answer, c.describe("order", "order_info", id))
				}})
			} else if n := c.number(i); n >= 0 && c.in.Plan.Order(n).Key != string(last) {
				c.addTo(i, verdict{"I6", "mismatch", says("it is answered under the key %q and was asked for with %q", last, c.in.Plan.Order(n).Key)})
			}
			return nil
		})
}

// answer is what clients are told of an order.
type answer struct {
	OrderID  string    `json:"order_id"`
	Name     string    `json:"name"`
	Amount   int64     `json:"amount"`
	Currency string    `json:"currency"`
	Status   string    `json:"status"`
	Version  int64     `json:"version"`
	PlacedAt time.Time `json:"placed_at"`
}

// orderID returns the id of the record's order, empty if nobody knows it.
func (c *checker) orderID(i int32) string {
	if id, ok := c.ids[i]; ok {
		return id
	}
	var id string
	if row := c.records[i].row; row != 0 {
		_ = c.dbs["order"].Reader().QueryRowContext(context.Background(), "SELECT orderId FROM order_info WHERE id = ?", row).Scan(&id)
	} else if int(i) < c.in.Plan.Orders {
		if other, ok := c.index[c.in.History.Of(int(i)).ID]; ok { // other tables have the order that this one lost
			return c.ids[other]
		}
		id = c.in.Plan.Order(int(i)).ID
	}
	return id
}

// eventID returns the id of an event about the order that has the hash.
func (o order) eventID(key int, hash uint64) string {
	service, id := announcer(o.keys[key]), ""
	_ = o.page(context.Background(), service, "SELECT event_id FROM outbox_confirmed WHERE order_id = ? AND event_key = ?",
		[]any{o.orderID(o.i), o.keys[key]}, func(rows *sql.Rows) error {
			var one string
			err := rows.Scan(&one)
			if history.Hash(one) == hash {
				id = one
			}
			return err
		})
	return id
}

// columns are what a row is described by.
var columns = map[string]string{
	"order_info":       "name, order_money, currency, status, version, courier_id, assigned_at, placed_at, delivered_at, cancelled_at, cancel_reason, points",
	"platoon":          "name, order_money, currency, state, order_version, takeout_userId, assigned_at, placed_at, delivered_at, released_at",
	"payment":          "name, order_money, currency, state, order_version, placed_at, decided_at, refunded_at",
	"points_entry":     "kind, points, placed_at",
	"simulated_charge": "amount, currency, charged_at, cancelled_at",
}

// describe tells what a table has of an order.
func (c *checker) describe(service, table, orderID string) string {
	rows, err := c.dbs[service].Reader().QueryContext(context.Background(), "SELECT "+columns[table]+" FROM "+table+" WHERE orderId = ? LIMIT 3", orderID)
	if err != nil {
		return err.Error()
	}
	defer rows.Close()
	names := strings.Split(columns[table], ", ")
	var all []string
	for rows.Next() {
		values, into := make([]any, len(names)), make([]any, len(names))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			return err.Error()
		}
		var cells []string
		for i, v := range values {
			switch v := v.(type) {
			case nil:
			case []byte:
				cells = append(cells, fmt.Sprintf("%s=%s", names[i], v))
			case time.Time:
				cells = append(cells, fmt.Sprintf("%s=%s", names[i], v.UTC().Format("15:04:05.000000")))
			default:
				cells = append(cells, fmt.Sprintf("%s=%v", names[i], v))
			}
		}
		all = append(all, strings.Join(cells, " "))
	}
	if err := rows.Err(); err != nil {
		return err.Error()
	}
	if len(all) == 0 {
		return "no row"
	}
	return strings.Join(all, "; ")
}
