package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTextOfOthersDoesNothingToTheTerminal(t *testing.T) {
	t.Parallel()
	require.Equal(t, "a [31mb c", brief("a\x1b[31mb\nc"))
	require.Len(t, []rune(brief(string(make([]byte, 1000)))), 70)
}

func TestTablesAreStraightWithNamesInAnyScript(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	require.NoError(t, output{out: &table}.write(formatFlag{Output: "table"}, nil, [][]string{
		{"COURIER", "NAME", "ON DUTY"},
		{"a", "王小明", "yes"},
		{"courier-b", "Jose\u0301", "no"},
		{"c", "", "ｙｅｓ"},
		{},
		{"a line that has no columns and is as long as it likes"},
	}))
	require.Equal(t, `COURIER     NAME     ON DUTY
a           王小明   yes
courier-b   Jose`+"\u0301"+`     no
c                    ｙｅｓ

a line that has no columns and is as long as it likes
`, table.String())
}
