package sqldb

import (
	"database/sql"
	"fmt"
	"slices"
	"strings"
)

// Insert returns the statement that inserts n rows into the columns of table. The last columns of each row are the
// expressions fixed, which take no arguments.
func Insert(table, columns string, n int, fixed ...string) string {
	values := slices.Concat(slices.Repeat([]string{"?"}, strings.Count(columns, ",")+1-len(fixed)), fixed)
	row := "(" + strings.Join(values, ", ") + ")"
	return "INSERT INTO " + table + " (" + columns + ") VALUES " + row + strings.Repeat(", "+row, n-1)
}

// FirstID returns the id of the first of n rows that one statement inserted. The ids of the others follow it, but with
// gaps where a cluster numbers rows so that its members do not collide (auto_increment_increment).
func (d Dialect) FirstID(inserted sql.Result, n int) (int64, error) {
	id, err := inserted.LastInsertId()
	if d.Engine == "sqlite" { // it tells the last one
		id -= int64(n - 1)
	}
	return id, err
}

// DeleteByID returns the statement that deletes from table the n rows whose ids are its arguments. If further columns are
// named, the row must have in each of them one of the n values that follow as arguments.
func (d Dialect) DeleteByID(table string, n int, also ...string) string {
	if d.Engine == "sqlite" {
		return "DELETE FROM " + table + withIDs(n, also)
	}
	// A DELETE takes no hint. A table of ids to join with leaves the server no other way than the primary key.
	var where strings.Builder
	separator := " WHERE t."
	for _, column := range also {
		where.WriteString(separator + oneOf(column, n))
		separator = " AND t."
	}
	return "DELETE t FROM (SELECT ? AS id" + strings.Repeat(" UNION ALL SELECT ?", n-1) + ") ids STRAIGHT_JOIN " + table + " t ON t.id = ids.id" + where.String()
}

// UpdateByID returns the statement that makes the assignments of set, which take no arguments, in the n rows of table
// that its arguments name as those of DeleteByID do.
func (d Dialect) UpdateByID(table, set string, n int, also ...string) string {
	return "UPDATE " + table + d.Force("PRIMARY") + " SET " + set + withIDs(n, also)
}

// CopyByID returns the statement that inserts into the columns of target the values, which are expressions over table's
// columns, of the n rows of table that its last arguments name as those of DeleteByID do. Arguments of the values come
// first.
func (d Dialect) CopyByID(table, target, columns, values string, n int, also ...string) string {
	return "INSERT INTO " + target + " (" + columns + ") SELECT " + values + " FROM " + table + d.Force("PRIMARY") + withIDs(n, also)
}

func withIDs(n int, also []string) string {
	where := " WHERE " + oneOf("id", n)
	for _, column := range also {
		where += " AND " + oneOf(column, n)
	}
	return where
}

func oneOf(column string, n int) string { return column + " IN (?" + strings.Repeat(",?", n-1) + ")" }

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
