package mutants

// All are the mutants. Where the program has two guards, one behind the other, the change goes deep enough to be seen from
// outside.
var All = []Mutant{
	{
		Name: "ack_before_commit",
		What: "A consumer acks a message before it handles it: what it had in hand when it dies is lost.",
		Changes: []Change{{
			File: "ports/messaging/consumer.go",
			Old:  `return c.route.handle(msg, c.route.Queue, c.accept)`,
			New: `msg.SetContext(context.WithoutCancel(msg.Context()))
		msg.Ack()
		return c.route.handle(msg, c.route.Queue, c.accept)`,
		}},
		Orders: 3000, Faults: 6, Kinds: "kill",
		Expect: []string{"I8 lost"},
		Quick:  true,
	},
	{
		Name: "delete_before_confirm",
		What: "The relay takes an event out of the outbox before the broker has confirmed it: what is under way when the relay or the " +
			"broker dies is lost.",
		Changes: []Change{{
			File: "ports/messaging/relay.go",
			Old:  `err := p.Publisher.Publish(topic, messages...)`,
			New: `var err error
	go func() { _ = p.Publisher.Publish(topic, messages...) }()`,
		}},
		Servers: true,
		Orders:  1000, Faults: 8, Kinds: "publish-cut,ack-lost,commit-lost-after,unbind",
		Expect: []string{"I8 lost"},
	},
	{
		Name: "no_inbox",
		What: "A message that comes again is handled again. Because a second dispatch of an order is refused by its unique key, the " +
			"dispatch service also believes that whoever asks again has not heard its answer, so that an order is assigned twice.",
		Changes: []Change{{
			File: "adapters/sqlstore/inbox.go",
			Old:  `return app.ErrDuplicate`,
			New:  `return nil`,
		}, {
			File: "app/dispatches.go",
			Old:  `return ErrDuplicate`,
			New: `if stored.Active() {
			return tx.Outbox.Publish(ctx, assignedEvent(stored))
		}
		return ErrDuplicate`,
		}},
		Orders: 3000, Faults: 6, Kinds: "kill",
		Expect: []string{"I3 duplicated"},
	},
	{
		Name: "no_unique",
		What: "Nothing keeps an order from being dispatched twice when it is announced again under another event id: the inbox knows " +
			"messages and not orders.",
		Changes: []Change{{
			File: "adapters/sqlstore/migrations/dispatch/mysql/00001_dispatch.sql",
			Old:  `UNIQUE KEY platoon_orderId (orderId)`,
			New:  `KEY platoon_orderId (orderId)`,
		}, {
			File: "adapters/sqlstore/migrations/dispatch/sqlite/00002_repair.sql",
			Old:  ",\n    UNIQUE (orderId)",
			New:  "",
		}, {
			File: "adapters/sqlstore/migrations/dispatch/sqlite/00002_repair.sql",
			Old:  `CREATE INDEX platoon_placed_at ON platoon (placed_at);`,
			New: `CREATE INDEX platoon_placed_at ON platoon (placed_at);
CREATE INDEX platoon_orderId ON platoon (orderId);`,
		}},
		Orders: 300, Faults: 3, Kinds: "another-id,forged,duplicate",
		Expect: []string{"I3 duplicated"},
		Quick:  true,
	},
	{
		Name: "no_mandatory_returns",
		What: "The broker is not asked to return what it cannot route: it confirms the event and forgets it.",
		Changes: []Change{{
			File: "adapters/rabbitmq/pipeline.go",
			Old:  `(p.exchange, topic, true, false, publishing)`,
			New:  `(p.exchange, topic, false, false, publishing)`,
		}},
		Servers: true,
		Orders:  1000, Faults: 8, Kinds: "publish-cut,ack-lost,commit-lost-after,unbind",
		Expect: []string{"I8 lost"},
	},
	{
		Name: "offset_pointer",
		What: "The relay remembers the last row that it took and asks for later ones: a row that is committed after one with a higher " +
			"number, or that could not be published, is passed over.",
		Changes: []Change{{
			File: "adapters/sqlqueue/reader.go",
			Old:  `mu       sync.Mutex`,
			New: `last     int64
	mu       sync.Mutex`,
		}, {
			File: "adapters/sqlqueue/reader.go",
			Old:  `rows, err := s.claim(taking, free)`,
			New: `rows, err := s.claim(taking, free)
		for _, r := range rows {
			if s.cfg.Table == "outbox" {
				s.last = max(s.last, r.ID)
			}
		}`,
		}, {
			File: "adapters/sqlqueue/claim.go",
			Old:  `"available_at <= "+s.db.Now, []any{}`,
			New:  `fmt.Sprintf("id > %d AND available_at <= ", s.last)+s.db.Now, []any{}`,
		}},
		Servers: true,
		Orders:  1000, Faults: 8, Kinds: "publish-cut,ack-lost,commit-lost-after,unbind",
		Expect: []string{"I4 stuck"},
	},
	{
		Name: "no_version",
		What: "An event that comes late undoes what is newer: an assignment makes an order dispatched that is delivered or cancelled.",
		Changes: []Change{{
			File: "domain/order/order.go",
			Old:  `if o.now.Status != Placed {`,
			New:  `if o.now.Status == Dispatched {`,
		}},
		Orders: 3000, Faults: 6, Kinds: "kill",
		Expect: []string{"I5 resurrected", "I8 repaired"},
	},
	{
		Name: "physical_delete_cancel",
		What: "Cancelling an order deletes its row, and one that is cancelled is not made again: the compensation then takes a late " +
			"announcement for that of an order that was lost, and the order is active again.",
		Changes: []Change{{
			File: "adapters/sqlstore/orders.go",
			Old:  `_, err = r.q.ExecContext(ctx, "UPDATE order_info SET status = ?`,
			New: `if s.Status == order.Cancelled {
		_, err = r.q.ExecContext(ctx, "DELETE FROM order_info WHERE orderId = ?", s.ID.String())
		return err
	}
	_, err = r.q.ExecContext(ctx, "UPDATE order_info SET status = ?`,
		}, {
			File: "adapters/sqlstore/orders.go",
			Old:  `err := insertByOrder(ctx, r.q, "order_info", orderColumns, many,`,
			New: `many = slices.DeleteFunc(many, func(o *order.Order) bool { return o.Snapshot().Status == order.Cancelled })
	err := insertByOrder(ctx, r.q, "order_info", orderColumns, many,`,
		}},
		Orders: 300, Faults: 3, Kinds: "another-id,forged,duplicate",
		Expect: []string{"I5 resurrected"},
	},
	{
		Name: "comp_unsigned",
		What: "The compensation believes announcements that nobody signed: whoever reaches the broker makes orders that nobody placed.",
		Changes: []Change{{
			File: "ports/messaging/consumer.go",
			Old:  `if err := accept.signed(msg); err != nil {`,
			New:  `if err := accept.signed(msg); err != nil && queue != "compensation.recreate-order" {`,
		}},
		Orders: 300, Faults: 3, Kinds: "another-id,forged,duplicate",
		Expect: []string{"I7 unexpected"},
		Quick:  true,
	},
	{
		Name: "poison_on_ctx_cancel",
		What: "A message whose handling is cut off, because its connection is lost, is taken for one that will never work, and is given up.",
		Changes: []Change{{
			File: "ports/messaging/classify.go",
			Old:  `errors.Is(err, errStopping), errors.Is(err, context.Canceled):`,
			New: `errors.Is(err, context.Canceled):
		return permanent
	case errors.Is(err, errStopping):`,
		}},
		Servers: true,
		Orders:  1000, Faults: 8, Kinds: "publish-cut,ack-lost,commit-lost-after,unbind",
		Expect: []string{"I8 given_up"},
	},
	{
		Name: "commit_error_means_failed",
		What: "A COMMIT without an answer is taken for one that failed: the order is refused for good, and is stored.",
		Changes: []Change{{
			File: "adapters/sqldb/sqldb.go",
			Old:  `if committing && db.outcomeUnknown(err) {`,
			New: `if committing && db.outcomeUnknown(err) {
			return db.kind(domain.Invalid, "not_stored", "the %s database did not store this", err)
		}
		if committing && db.outcomeUnknown(err) {`,
		}},
		Servers: true,
		Orders:  1000, Faults: 8, Kinds: "commit-lost-after",
		Expect: []string{"I7 unexpected"},
	},
	{
		Name: "retry_to_shared_exchange",
		What: "A message that failed goes back to the exchange that all consumers share, and not to the one that failed: the others are " +
			"given it again each time, and nobody counts how often.",
		Changes: []Change{{
			File: "adapters/sqlstore/failures.go",
			Old:  `_, err := tx.ExecContext(ctx, "INSERT INTO retry (`,
			New: `var of struct{ Type string }
		if json.Unmarshal(f.Payload, &of) == nil {
			key := strings.TrimSuffix(strings.TrimPrefix(of.Type, "takeout."), ".v1")
			envelope, err := json.Marshal(map[string]any{
				"destination_topic": key, "uuid": f.MessageID, "payload": f.Payload, "metadata": f.Headers,
			})
			if err != nil {
				return err
			}
			_, err = tx.ExecContext(ctx, "INSERT INTO outbox (uuid, payload, created_at, event_id, event_key, order_id, available_at) "+
				"VALUES (?, ?, ?, ?, ?, ?, "+d.db.Now+" + ?)", f.MessageID, envelope, now(), f.MessageID, key, f.OrderID, after.Microseconds())
			return err
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO retry (`,
		}},
		Orders: 300, Faults: 3, Kinds: "early",
		Expect: []string{"I8 unexpected"},
	},
	{
		Name: "inbox_outside_tx",
		What: "A message is noted as handled in a transaction of its own before it is handled: when the second one does not happen, the " +
			"message is taken for a copy the next time, and is lost.",
		Changes: []Change{{
			File: "adapters/sqlstore/store.go",
			Old:  `var out *outbox`,
			New: `if all := app.DeliveriesFrom(ctx); len(all) > 0 {
		err := s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error { return record(ctx, s.db, tx, all) })
		if err != nil {
			return err
		}
		ctx = app.WithoutDelivery(ctx)
	}
	var out *outbox`,
		}},
		Orders: 3000, Faults: 6, Kinds: "kill",
		Expect: []string{"I1 lost", "I1 mismatch"},
	},
	{
		Name: "reconcile_no_verify",
		What: "The reconciler repairs what differs at first sight: it does not wait whether an order is under way, and does not look " +
			"again, so that orders are announced again for no reason.",
		Changes: []Change{{
			File: "app/reconcile/pass.go",
			Old:  `startOf(0), p.now.Add(-p.policy.Grace), startOf(0)`,
			New:  `startOf(0), p.now, startOf(0)`,
		}, {
			File: "app/reconcile/findings.go",
			Old:  `differ = append(differ, s.orderID)`,
			New:  `p.found(c, s)`,
		}},
		Orders: 3000, Faults: 6, Kinds: "kill",
		Expect: []string{"I8 repaired", "I1 unresolved"},
	},
}
