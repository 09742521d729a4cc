package domain

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// CheckName says whether s can be the name of something that people read: 1 to limit code points of valid UTF-8,
// something in it that can be seen, and nothing that moves the cursor, splits a line or turns the reading direction
// of what follows. It returns an Invalid error about the field otherwise.
func CheckName(field, s string, limit int) error {
	switch {
	case !utf8.ValidString(s):
		return InvalidField(field, field+"_not_utf8", "%s must be valid UTF-8", field)
	case strings.TrimSpace(s) == "":
		return InvalidField(field, field+"_empty", "%s must not be empty or only spaces", field)
	case utf8.RuneCountInString(s) > limit:
		return InvalidField(field, field+"_too_long", "%s must be at most %d characters", field, limit)
	case strings.ContainsFunc(s, unreadable):
		return InvalidField(field, field+"_unreadable",
			"%s must not contain control characters, line breaks or text direction overrides", field)
	case !strings.ContainsFunc(s, visible):
		return InvalidField(field, field+"_empty", "%s must not be only characters that cannot be seen", field)
	}
	return nil
}

// unreadable reports control characters, line and paragraph separators, and the bidirectional overrides and
// isolates of Unicode's UAX #9, with which text can be made to show something other than what it says.
func unreadable(r rune) bool {
	return unicode.Is(unicode.Cc, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) ||
		(r >= 0x202A && r <= 0x202E) || (r >= 0x2066 && r <= 0x2069) || r == 0xFEFF || r == utf8.RuneError
}

// visible reports letters, numbers, punctuation and symbols, but for the fillers among them that have no shape.
func visible(r rune) bool {
	return unicode.In(r, unicode.L, unicode.N, unicode.P, unicode.S) && !unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r) && r != '\u2800'
}

// CheckID says whether s can be an id that a client chose: 1 to 64 of A-Z a-z 0-9 _ and -. It returns an Invalid
// error about the field otherwise.
func CheckID(field, s string) error {
	valid := len(s) >= 1 && len(s) <= 64
	for i := 0; valid && i < len(s); i++ {
		c := s[i]
		valid = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
	}
	if !valid {
		return InvalidField(field, field+"_invalid", "%s must be 1 to 64 of the characters A-Z a-z 0-9 _ -", field)
	}
	return nil
}
