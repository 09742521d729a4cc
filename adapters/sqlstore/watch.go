package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"slices"

	"takeout/adapters/sqldb"
)

// Triggers note which minutes were changed after they may have been compared, whoever changes them: this program, or a
// person with a SQL client. A row of an order that was just placed is not noted, because its minute is compared later
// anyhow. That keeps the triggers off the way of new orders.
//
// They are made here and not by a migration, because a server with a binary log lets only its administrator make
// triggers. Without them nothing is missed: everything is compared each time.

// fresh is the age of an order, in seconds, up to which its changes are not noted. It is well below the age from which
// minutes are marked as compared.
const fresh = 5

// watch makes the triggers of the service's table that are missing, and warns if it is not allowed to.
func watch(ctx context.Context, db *sqldb.DB, logger *slog.Logger) error {
	var have []string
	// In a transaction, which runs again: when another process makes triggers, Galera ends whatever looks for them.
	err := db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
		have, err = triggers(ctx, db, tx)
		return err
	})
	if err != nil {
		return fmt.Errorf("look for the triggers of the %s database: %w", db.Name(), err)
	}
	var statements []string
	want := triggersOf(db)
	for name, create := range want {
		if !slices.Contains(have, name) {
			statements = append(statements, create)
		}
	}
	for _, name := range have { // those of an earlier version go last, so that every change is noted meanwhile
		if want[name] == "" {
			statements = append(statements, "DROP TRIGGER IF EXISTS "+name)
		}
	}
	for _, statement := range statements {
		_, err := db.Writer().ExecContext(ctx, statement)
		if sqldb.MayNotMakeTriggers(err) {
			logger.Warn("reconciliation compares everything each time, because this database does not let us make triggers; "+
				"GRANT TRIGGER to the user, and SET GLOBAL log_bin_trust_function_creators = 1 where there is a binary log",
				"database", db.Name(), "error", err)
			return nil
		}
		if err != nil {
			return fmt.Errorf("make the triggers of the %s database: %w", db.Name(), db.Error(err))
		}
	}
	return nil
}

// triggersOf returns the statements that make the triggers of the service's table, by their names.
func triggersOf(db *sqldb.DB) map[string]string {
	table := tablesOf[db.Name()]
	return db.NoteChanges(table.name, table.watched, fresh)
}

// triggers returns the names of those triggers that there are, of whatever version.
func triggers(ctx context.Context, db *sqldb.DB, q querier) ([]string, error) {
	query := "SELECT TRIGGER_NAME FROM information_schema.TRIGGERS WHERE TRIGGER_SCHEMA = DATABASE() AND EVENT_OBJECT_TABLE = ? AND TRIGGER_NAME LIKE ?"
	if db.Engine == "sqlite" {
		query = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? AND name LIKE ?"
	}
	table := tablesOf[db.Name()].name
	return collect(ctx, q, scanOne[string], query, table, table+"_noted_%")
}

// Watched implements reconcile.Book.
func (b *Book) Watched(ctx context.Context) (bool, error) {
	have, err := triggers(ctx, b.db, b.db.Reader())
	if err != nil {
		return false, b.db.Error(err)
	}
	for name := range triggersOf(b.db) {
		if !slices.Contains(have, name) {
			return false, nil
		}
	}
	return true, nil
}
