package domain

import "time"

// Times that events and tables hold lie between these: JSON and MySQL know no later ones, and nothing here is older.
var (
	earliest = time.Unix(0, 0)
	latest   = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
)

// CheckTime says whether t can be when something happened: it is there, and lies between 1970 and 9999. It returns an
// Invalid error about the field otherwise.
func CheckTime(field string, t time.Time) error {
	switch {
	case t.IsZero():
		return InvalidField(field, field+"_missing", "%s is missing", field)
	case t.Before(earliest) || !t.Before(latest):
		return InvalidField(field, field+"_out_of_range", "%s must lie between 1970 and 9999", field)
	}
	return nil
}

// Micro returns t as events and tables hold times: in UTC, to the microsecond.
func Micro(t time.Time) time.Time { return t.UTC().Truncate(time.Microsecond) }
