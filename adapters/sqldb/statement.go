package sqldb

import "strings"

// DeleteByID returns the statement that deletes from table the n rows whose ids are its arguments.
func (d Dialect) DeleteByID(table string, n int) string {
	if d.Engine == "sqlite" {
		return "DELETE FROM " + table + " WHERE id IN (?" + strings.Repeat(",?", n-1) + ")"
	}
	return "DELETE t FROM " + ids(n) + " STRAIGHT_JOIN " + table + " t ON t.id = ids.id"
}

// UpdateByID returns the statement that makes the assignments of set, which take no arguments, in the n rows of table
// whose ids are its arguments.
func (d Dialect) UpdateByID(table, set string, n int) string {
	if d.Engine == "sqlite" {
		return "UPDATE " + table + " SET " + set + " WHERE id IN (?" + strings.Repeat(",?", n-1) + ")"
	}
	return "UPDATE " + ids(n) + " STRAIGHT_JOIN " + table + " t ON t.id = ids.id SET " + set
}

// ids is a table of n ids to join with. MySQL reads a whole table for "id IN (…)" while its statistics say that
// the table is tiny, as they do of a queue, and then waits for rows that another process has locked.
func ids(n int) string {
	return "(SELECT ? AS id" + strings.Repeat(" UNION ALL SELECT ?", n-1) + ") ids"
}

// NotNull keeps an empty value from being stored as NULL.
func NotNull(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
