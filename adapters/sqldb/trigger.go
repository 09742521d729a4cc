package sqldb

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/go-sql-driver/mysql"
)

// NoteChanges returns the statements that make three triggers on the table, by the triggers' names, which begin with the
// table's and _noted_. They insert into reconcile_dirty the minute of the placed_at of each row that is inserted, deleted,
// or changed in one of the columns, if that is more than fresh seconds ago. They use nothing but what every client of the
// database has. A trigger that does something else has another name.
func (d Dialect) NoteChanges(table string, columns []string, fresh int) map[string]string {
	changed := make([]string, len(columns))
	for i, column := range columns {
		changed[i] = d.differ("OLD."+column, "NEW."+column)
	}
	anyChange := "(" + strings.Join(changed, " OR ") + ")"
	triggers := map[string]string{}
	create := func(event string, notes ...string) {
		does := strings.Join(notes, "; ")
		name := fmt.Sprintf("%s_noted_%s_%.8x", table, strings.ToLower(event), sha256.Sum256([]byte(does)))
		triggers[name] = fmt.Sprintf("CREATE TRIGGER IF NOT EXISTS %s AFTER %s ON %s FOR EACH ROW BEGIN %s; END", name, event, table, does)
	}
	create("INSERT", d.note("NEW", fresh))
	create("UPDATE", d.note("OLD", fresh, anyChange), d.note("NEW", fresh, d.differ("OLD.placed_at", "NEW.placed_at")))
	create("DELETE", d.note("OLD", fresh))
	return triggers
}

func (d Dialect) differ(a, b string) string {
	if d.Engine == "sqlite" {
		return a + " IS NOT " + b
	}
	return "NOT (" + a + " <=> " + b + ")"
}

// note inserts the minute of the row, OLD or NEW, if it is not fresh and the conditions hold.
func (d Dialect) note(row string, fresh int, conditions ...string) string {
	also := strings.Join(append([]string{""}, conditions...), " AND ")
	if d.Engine == "sqlite" {
		return fmt.Sprintf("INSERT INTO reconcile_dirty (minute, at) SELECT COALESCE(CAST(strftime('%%s', substr(%[1]s.placed_at, 1, 19)) AS INTEGER) / 60, 0), "+
			"strftime('%%Y-%%m-%%d %%H:%%M:%%f+00:00', 'now') WHERE %[1]s.placed_at < strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now', '-%[2]d seconds')%[3]s", row, fresh, also)
	}
	// An INSERT with a condition would cost each row of each order a statement.
	return fmt.Sprintf("IF %[1]s.placed_at < UTC_TIMESTAMP(6) - INTERVAL %[3]d SECOND%[4]s THEN "+
		"INSERT INTO reconcile_dirty (minute, at) VALUES (%[2]s, UTC_TIMESTAMP(6)); END IF", row, d.Minute(row+".placed_at"), fresh, also)
}

// MayNotMakeTriggers reports whether err says that this user may not make triggers on this server.
func MayNotMakeTriggers(err error) bool {
	e, ok := errors.AsType[*mysql.MySQLError](err)
	return ok && (e.Number == 1419 || e.Number == 1227 || e.Number == 1142)
}
