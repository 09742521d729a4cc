package sqldb

import (
	"crypto/sha256" // MySQL 9.6 has no MD5 and no SHA1
	"database/sql/driver"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"modernc.org/sqlite"
)

// Minute is an expression: the whole minutes from 1970 to the column's time. It depends on no session's time zone.
func (d Dialect) Minute(column string) string {
	if d.Engine == "sqlite" {
		return "(takeout_micros(" + column + ") / 60000000)"
	}
	return "(" + d.Micros(column) + " DIV 60000000)"
}

// Micros is an expression: the microseconds from 1970 to the column's time. It depends on no session's time zone.
func (d Dialect) Micros(column string) string {
	if d.Engine == "sqlite" {
		return "takeout_micros(" + column + ")"
	}
	return "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', " + column + ")"
}

// Digest is an expression: a number of 40 bits that differs, but for a chance of 1 in 2⁴⁰, when one of the parts does.
// It is the same on both engines. Eight million of them can be added up.
func (d Dialect) Digest(parts ...string) string {
	list := strings.Join(parts, ", ")
	if d.Engine == "sqlite" {
		return "takeout_digest(" + list + ")"
	}
	return "CAST(CONV(LEFT(SHA2(CONCAT_WS('|', " + list + "), 256), 10), 16, 10) AS SIGNED)"
}

// Divide is an expression: the quotient of two positive whole numbers without its fraction.
func (d Dialect) Divide(a, b string) string {
	if d.Engine == "sqlite" {
		return "(" + a + " / " + b + ")"
	}
	return "(" + a + " DIV " + b + ")"
}

// SQLite has neither function. Both are for reading only: a trigger that used one would keep every other program from
// writing to the file.
func init() {
	sqlite.MustRegisterDeterministicScalarFunction("takeout_micros", 1, sqliteMicros)
	sqlite.MustRegisterDeterministicScalarFunction("takeout_digest", -1, sqliteDigest)
}

func sqliteMicros(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
	text, _ := args[0].(string)
	for _, layout := range []string{"2006-01-02 15:04:05.999999999-07:00", "2006-01-02 15:04:05.999999999", time.RFC3339Nano} {
		if at, err := time.Parse(layout, text); err == nil {
			return at.UnixMicro(), nil
		}
	}
	return int64(0), nil // unreadable: in a minute of its own, where it shows
}

func sqliteDigest(_ *sqlite.FunctionContext, args []driver.Value) (driver.Value, error) {
	var text strings.Builder
	for i, arg := range args {
		if i > 0 {
			text.WriteByte('|')
		}
		fmt.Fprint(&text, arg)
	}
	sum := sha256.Sum256([]byte(text.String()))
	return int64(binary.BigEndian.Uint64(sum[:8]) >> 24), nil
}
