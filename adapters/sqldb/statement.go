package sqldb

import (
	"fmt"
	"strings"
)

// Insert returns the statement that inserts n rows into the columns of table.
func Insert(table, columns string, n int) string {
	row := "(?" + strings.Repeat(", ?", strings.Count(columns, ",")) + ")"
	return "INSERT INTO " + table + " (" + columns + ") VALUES " + row + strings.Repeat(", "+row, n-1)
}

// DeleteByID returns the statement that deletes from table the n rows whose ids are its arguments.
func (d Dialect) DeleteByID(table string, n int) string {
	if d.Engine == "sqlite" {
		return "DELETE FROM " + table + withIDs(n)
	}
	// A DELETE takes no hint. A table of ids to join with leaves the server no other way than the primary key.
	return "DELETE t FROM (SELECT ? AS id" + strings.Repeat(" UNION ALL SELECT ?", n-1) + ") ids STRAIGHT_JOIN " + table + " t ON t.id = ids.id"
}

// UpdateByID returns the statement that makes the assignments of set, which take no arguments, in the n rows of table
// whose ids are its arguments.
func (d Dialect) UpdateByID(table, set string, n int) string {
	return "UPDATE " + table + d.Force("PRIMARY") + " SET " + set + withIDs(n)
}

// CopyByID returns the statement that inserts into the columns of target the values, which are expressions over table's
// columns, of the n rows of table whose ids are its last arguments. Arguments of the values come first.
func (d Dialect) CopyByID(table, target, columns, values string, n int) string {
	return "INSERT INTO " + target + " (" + columns + ") SELECT " + values + " FROM " + table + d.Force("PRIMARY") + withIDs(n)
}

func withIDs(n int) string { return " WHERE id IN (?" + strings.Repeat(",?", n-1) + ")" }

// DeleteOldest returns the statement that deletes from table up to as many rows as its last argument says, those with
// the lowest value of the column by first, of the rows for which where holds, whose arguments come before. key are the
// columns of the table's primary key.
func (d Dialect) DeleteOldest(table, key, where, by string) string {
	oldest := " WHERE " + where + " ORDER BY " + by + " LIMIT ?"
	if d.Engine == "sqlite" {
		return "DELETE FROM " + table + " WHERE (" + key + ") IN (SELECT " + key + " FROM " + table + oldest + ")"
	}
	return "DELETE FROM " + table + oldest
}

// UpdateRows returns the statement that gives n rows of table values in these columns, each its own. Its arguments are, one
// row after the other, the row's id and its values.
func (d Dialect) UpdateRows(table string, columns []string, n int) string {
	var set, row strings.Builder
	separator := " SET "
	if d.Engine == "sqlite" {
		for i, column := range columns {
			fmt.Fprintf(&set, "%s%s = v.column%d", separator, column, i+2)
			separator = ", "
		}
		tuple := "(?" + strings.Repeat(", ?", len(columns)) + ")"
		return "UPDATE " + table + set.String() + " FROM (VALUES " + tuple + strings.Repeat(", "+tuple, n-1) + ") v WHERE " + table + ".id = v.column1"
	}
	for _, column := range columns {
		fmt.Fprintf(&set, "%st.%s = v.%s", separator, column, column)
		fmt.Fprintf(&row, ", ? AS %s", column)
		separator = ", "
	}
	return "UPDATE (SELECT ? AS id" + row.String() + strings.Repeat(" UNION ALL SELECT ?"+strings.Repeat(", ?", len(columns)), n-1) +
		") v STRAIGHT_JOIN " + table + " t ON t.id = v.id" + set.String()
}

// Force follows a table's name, and makes MySQL find rows by this index, and so lock them in its order and no others:
// while its statistics say that the table is tiny, as they do of a queue, it reads the whole of it, and waits for rows that
// another process has locked.
func (d Dialect) Force(index string) string {
	if d.Engine == "sqlite" {
		return ""
	}
	return " FORCE INDEX (" + index + ")"
}

// NotNull keeps an empty value from being stored as NULL.
func NotNull(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
