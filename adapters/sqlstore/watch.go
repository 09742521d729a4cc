package sqlstore

import (
	"context"
	"fmt"
	"log/slog"

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

// watch makes the triggers of the service's table that are missing, and warns if it must not.
func watch(ctx context.Context, db *sqldb.DB, logger *slog.Logger) error {
	done, err := watched(ctx, db)
	if err != nil || done {
		return err
	}
	table := tablesOf[db.Name()]
	for _, statement := range db.NoteChanges(table.name, table.watched, fresh) {
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

// watched reports whether the database has all triggers.
func watched(ctx context.Context, db *sqldb.DB) (bool, error) {
	query := "SELECT COUNT(*) FROM information_schema.TRIGGERS WHERE TRIGGER_SCHEMA = DATABASE() AND EVENT_OBJECT_TABLE = ? AND TRIGGER_NAME LIKE ?"
	if db.Engine == "sqlite" {
		query = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? AND name LIKE ?"
	}
	var n int
	table := tablesOf[db.Name()].name
	err := db.Reader().QueryRowContext(ctx, query, table, table+"_noted_%").Scan(&n)
	return n == 3, db.Error(err)
}

// Watched implements app.Book.
func (b *Book) Watched(ctx context.Context) (bool, error) { return watched(ctx, b.db) }
